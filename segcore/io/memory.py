"""The fake beside the protocols: a scene that is an array, and labels that are one. For tests and for Python users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segcore.box import Box
from segcore.errors import ProductError
from segcore.grid import Grid
from segcore.io.source import Floats, Frame, LabelReader, Labels, Legend, Source, sample_positions


@dataclass(frozen=True, slots=True)
class ArrayFrame:
    """A frame that lies nowhere: products are `.npy` files."""

    shape: tuple[int, ...]
    suffix: str = ".npy"

    def write_labels(self, path: Path, labels: LabelReader, legend: Legend) -> list[Path]:
        np.save(path, labels.read(Box.of(self.shape)))
        return [path]

    def write_scores(self, path: Path, labels: LabelReader, legend: Legend) -> list[Path]:
        np.save(path, np.stack([labels.read_scores(Box.of(self.shape), index) for index, _, _ in legend.classes]))
        return [path]

    def verify(self, path: Path, labels: LabelReader) -> None:
        if not np.array_equal(np.load(path), labels.read(Box.of(self.shape))):
            raise ProductError(f"{path} does not hold the labels that were written to it; run again")

    def verify_scores(self, path: Path, labels: LabelReader, legend: Legend) -> None:
        scores = [labels.read_scores(Box.of(self.shape), index) for index, _, _ in legend.classes]
        if not np.array_equal(np.load(path), np.stack(scores), equal_nan=True):
            raise ProductError(f"{path} does not hold the scores that were written to it; run again")

    def read_labels(self, path: Path, box: Box) -> Labels:
        return np.load(path)[box.slices()]

    def footprint(self) -> dict[str, Any] | None:
        return None

    def properties(self) -> dict[str, Any]:
        return {}


@dataclass(slots=True)
class ArrayScene:
    """A scene in memory: `array` is (C, *spatial), NaN where invalid."""

    array: Floats
    axes: str
    name: str = "array"
    channels: tuple[str, ...] = ()
    spacing: tuple[float, ...] | None = None
    cell: tuple[float, str] | None = None
    datetime: str | None = None
    warnings: tuple[str, ...] = ()
    uri: str = field(init=False)
    grid: Grid = field(init=False)
    frame: Frame = field(init=False)

    def __post_init__(self) -> None:
        self.uri = f"memory:{self.name}"
        self.grid = Grid(self.axes, self.array.shape[1:])
        self.frame = ArrayFrame(self.grid.shape)
        self.channels = self.channels or tuple(f"channel {i}" for i in range(len(self.array)))

    def identity(self) -> Mapping[str, Any]:
        return {"name": self.name, "shape": list(self.array.shape)}

    @property
    def staged_bytes(self) -> int:
        return 0

    def stage(self, folder: Path) -> ArrayScene:
        return self

    def read(self, box: Box) -> Floats:
        assert box in self.grid.box, f"{box} is outside {self.grid.box}"
        return self.array[(slice(None), *box.slices())].copy()

    def overview(self, shape: Sequence[int], channels: Sequence[int] | None = None) -> Floats:
        index = np.ix_(*(sample_positions(n, m) for n, m in zip(self.grid.shape, shape, strict=True)))
        shown = self.array if channels is None else self.array[list(channels)]
        return np.stack([channel[index] for channel in shown])


@dataclass(frozen=True, slots=True)
class ArrayLabels:
    """Labels (*spatial), and scores (K, *spatial), in memory."""

    labels: NDArray[np.uint8]
    scores: Floats | None = None

    def read(self, box: Box) -> Labels:
        return self.labels[box.slices()]

    def read_scores(self, box: Box, index: int) -> Floats:
        assert self.scores is not None
        return self.scores[index][box.slices()]


def _conforms(scene: ArrayScene, frame: ArrayFrame, labels: ArrayLabels) -> tuple[Source, Frame, LabelReader]:
    return scene, frame, labels
