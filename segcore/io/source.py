"""What the engine sees of a file: the seam between formats and the rest of the house."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from segcore.box import Box, strips
from segcore.grid import Grid

Floats = NDArray[np.float32]
Labels = NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a model wants to see: channel names in order, axes in array order, and an orientation code or None.

    `aliases`: for each channel, other names that will do; none at all where the tuple is empty.
    """

    channels: tuple[str, ...]
    axes: str
    orientation: str | None = None
    aliases: tuple[tuple[str, ...], ...] = ()

    def pick(self, named: Mapping[str, T]) -> tuple[list[T], list[str]]:
        """What each channel is called by, of things under lower-case names; and the channels that nothing fits."""
        picked, missing = [], []
        for channel, aliases in zip(self.channels, self.aliases or ((),) * len(self.channels), strict=True):
            name = next((n for n in map(str.lower, (channel, *aliases)) if n in named), None)
            if name is None:
                missing.append(channel)
            else:
                picked.append(named[name])
        return picked, missing


@dataclass(frozen=True, slots=True)
class Legend:
    """What the numbers of a mask mean: (index, name, RGB colour) of every class, and the nodata value."""

    classes: tuple[tuple[int, str, tuple[int, int, int]], ...]
    nodata: int = 255


class LabelReader(Protocol):
    """Finished labels, read back piece by piece."""

    def read(self, box: Box) -> Labels:
        """Labels of a box of the scene's grid, (*box.shape)."""
        ...

    def read_scores(self, box: Box, index: int) -> Floats:
        """Scores of one class in a box of the scene's grid, (*box.shape)."""
        ...


class Frame(Protocol):
    """Where a scene lies in the world. Cargo: the engine carries it from a source to a product and never looks inside.

    The files that it writes are complete when a method returns, and hold the same bytes for the same labels.
    """

    @property
    def suffix(self) -> str:
        """File suffix of a product, with its dot."""
        ...

    def write_labels(self, path: Path, labels: LabelReader, legend: Legend) -> list[Path]:
        """Write the mask to `path`, streaming. Returns every file written, `path` first."""
        ...

    def write_scores(self, path: Path, labels: LabelReader, legend: Legend) -> list[Path]:
        """Write the scores, one band or volume for each class, in float32."""
        ...

    def verify(self, path: Path, labels: LabelReader) -> None:
        """Read a written mask back. Raises ProductError unless frame and every label are what they should be."""
        ...

    def verify_scores(self, path: Path, labels: LabelReader, legend: Legend) -> None:
        """The same for scores."""
        ...

    def read_labels(self, path: Path, box: Box) -> Labels:
        """Labels of a written mask in a box of the scene's grid, (*box.shape). Raises ProductError."""
        ...

    def footprint(self) -> dict[str, Any] | None:
        """The scene's outline as a GeoJSON geometry in WGS 84, or None where it does not lie on the Earth."""
        ...

    def properties(self) -> dict[str, Any]:
        """STAC properties that describe the frame (projection extension), JSON values."""
        ...


class Source(Protocol):
    """One scene, opened for one model.

    Constructing reads headers only. A source pickles as what it takes to open it again; `read` may be called from
    several threads at once.
    """

    uri: str
    name: str
    grid: Grid
    """Axes in the order that the model wants."""
    channels: tuple[str, ...]
    spacing: tuple[float, ...] | None
    """Size of a pixel per axis: metres for a raster in a projected CRS, millimetres for a volume, else None."""
    cell: tuple[float, str] | None
    """Area or volume of a pixel and its unit (`m2` or `ml`), None where it is not the same everywhere."""
    datetime: str | None
    """Time of acquisition, ISO 8601, None where the scene does not say."""
    warnings: tuple[str, ...]

    @property
    def frame(self) -> Frame:
        """Where the scene lies, to be carried to its product."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What tells this input from a changed one (sizes, times of change, digests), JSON values."""
        ...

    @property
    def staged_bytes(self) -> int:
        """Bytes that `stage` puts into its folder, from headers alone; 0 where files are read as they are."""
        ...

    def stage(self, folder: Path) -> Self:
        """The same source, ready for random access; what that takes is put into `folder`, once."""
        ...

    def read(self, box: Box) -> Floats:
        """Channels in the model's order, (C, *box.shape), in physical units; NaN where a pixel is not valid.

        The array is new, and the caller's to change.
        `box` lies inside the grid. Raises SceneError.
        """
        ...

    def overview(self, shape: Sequence[int], channels: Sequence[int] | None = None) -> Floats:
        """The whole scene, thinned for a look at it, near the pixels at `sample_positions`.

        `channels`: positions of those that are wanted, by default of all. Returns (len(channels), *shape).
        """
        ...


def sample_positions(length: int, samples: int) -> NDArray[np.intp]:
    """Where an axis of `length` pixels is looked at to show it with `samples` pixels."""
    return ((np.arange(samples) + 0.5) * length / samples).astype(np.intp)


def slabs(grid: Grid, pixels: int = 2**23) -> Iterator[Box]:
    """The grid in full slabs of its first axis, of about `pixels` pixels each: for one pass over everything."""
    for rows in strips(grid.shape, pixels):
        yield Box((rows.start, *(0,) * (len(grid.shape) - 1)), (rows.stop, *grid.shape[1:]))
