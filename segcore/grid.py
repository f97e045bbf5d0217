"""Grids, and how two grids over one extent lie on each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from segcore.box import Box


@dataclass(frozen=True, slots=True)
class Grid:
    """The integer lattice of a scene: names and lengths of its axes, and nothing of where it lies in the world.

    `axes` are one letter each, in array order (`yx` for a raster, `xyz` or `zyx` for a volume); `shape` is in pixels.
    Raises ValueError for an axis without a pixel.
    """

    axes: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape) or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"axes {self.axes!r} and shape {self.shape} do not fit together")
        if any(n < 1 for n in self.shape):
            raise ValueError(f"a grid needs a pixel on every axis: {self.shape}")

    @property
    def box(self) -> Box:
        return Box.of(self.shape)

    @property
    def size(self) -> int:
        """Number of pixels."""
        return self.box.size

    def __str__(self) -> str:
        return " x ".join(map(str, self.shape))


@dataclass(frozen=True, slots=True)
class Rescale:
    """Linear interpolation from one grid to another over the same extent, edge on edge, per axis.

    The centre of target pixel t lies at (t + 1/2) * source / target - 1/2 in source pixels. The kernel is a triangle
    whose half-width is one source pixel when refining and one target pixel when coarsening, so that coarsening
    averages instead of skipping. Which source pixels matter is worked out in integers and in global
    coordinates: it never depends on the box that is asked for.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.source) != len(self.target):
            raise ValueError(f"grids of different dimension: {self.source}, {self.target}")

    @property
    def identity(self) -> bool:
        return self.source == self.target

    def inverse(self) -> Rescale:
        return Rescale(self.target, self.source)

    def first_tap(self, axis: int, t: int) -> int:
        """The first source pixel with weight in target pixel t; it may lie before the border."""
        source, target = self.source[axis], self.target[axis]
        if source == target:
            return t
        centre = (2 * t + 1) * source - target  # twice `target` times the centre: all in integers
        return (centre - 2 * max(source, target)) // (2 * target) + 1

    def taps(self, axis: int) -> int:
        """How many source pixels can have weight in one target pixel."""
        source, target = self.source[axis], self.target[axis]
        return 1 if source == target else 2 * -(-max(source, target) // target)

    def support(self, box: Box) -> Box:
        """The source pixels that the target pixels of `box` are made of, inside the source grid."""
        start, stop = [], []
        for axis, (a, b) in enumerate(zip(box.start, box.stop, strict=True)):
            n = self.source[axis]
            start.append(min(max(self.first_tap(axis, a), 0), n - 1))
            stop.append(min(max(self.first_tap(axis, b - 1) + self.taps(axis), start[-1] + 1), n))
        return Box(tuple(start), tuple(stop))


def mirrored(box: Box, shape: Sequence[int]) -> Box:
    """The pixels of a grid of `shape` that `box` shows when the grid is padded at its end by mirroring.

    Mirroring repeats the border pixel (numpy's `symmetric`). `box` starts inside the grid; where it reaches further
    past the end than the grid is long, it shows the whole axis.
    """
    start, stop = [], []
    for a, b, n in zip(box.start, box.stop, shape, strict=True):
        start.append(a if b <= n else min(a, max(0, 2 * n - b)))
        stop.append(min(b, n))
    return Box(tuple(start), tuple(stop))
