"""Boxes: half-open n-D integer ranges, the arithmetic that everything else is built on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open range of pixels (or voxels), one `start` and `stop` for each spatial axis.

    A box may reach outside the grid that it is used with (a window at the border does); `start <= stop` always
    holds, on every axis. Raises ValueError otherwise.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop) or not self.start:
            raise ValueError(f"a box needs as many starts as stops, and at least one axis: {self.start}, {self.stop}")
        if any(a > b for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"a box cannot stop before it starts: {self}")

    @classmethod
    def of(cls, shape: Sequence[int]) -> Self:
        """The box of this shape (pixels per axis) at the origin."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def cell(cls, index: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> Self:
        """The cell of this index where a grid of `shape` is cut into cells of `size`; the last ones may be shorter."""
        start = tuple(i * s for i, s in zip(index, size, strict=True))
        return cls(start, tuple(min(a + s, n) for a, s, n in zip(start, size, shape, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def ndim(self) -> int:
        return len(self.start)

    @property
    def size(self) -> int:
        """Number of pixels."""
        return prod(self.shape)

    def __contains__(self, other: Box) -> bool:
        return other.size == 0 or (self & other) == other

    def __and__(self, other: Box) -> Box:
        """The overlap; an empty box (at the nearer corner) where there is none."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box(start, tuple(max(a, b) for a, b in zip(start, stop, strict=True)))

    def __or__(self, other: Box) -> Box:
        """The hull: the smallest box that holds both."""
        return Box(
            tuple(min(a, b) for a, b in zip(self.start, other.start, strict=True)),
            tuple(max(a, b) for a, b in zip(self.stop, other.stop, strict=True)),
        )

    def grow(self, margin: Sequence[tuple[int, int]]) -> Box:
        """The box with `margin` (pixels before and after it, per axis) more."""
        return Box(
            tuple(a - before for a, (before, _) in zip(self.start, margin, strict=True)),
            tuple(b + after for b, (_, after) in zip(self.stop, margin, strict=True)),
        )

    def shift(self, offset: Sequence[int]) -> Box:
        """The box moved by `offset` (pixels per axis)."""
        return Box(
            tuple(a + o for a, o in zip(self.start, offset, strict=True)),
            tuple(b + o for b, o in zip(self.stop, offset, strict=True)),
        )

    def snap(self, stride: Sequence[int]) -> Box:
        """The smallest box around this one whose starts and stops are multiples of `stride`."""
        return Box(
            tuple(a // s * s for a, s in zip(self.start, stride, strict=True)),
            tuple(-(-b // s) * s for b, s in zip(self.stop, stride, strict=True)),
        )

    def coarse(self, factor: Sequence[int]) -> Self:
        """The same part on a grid that is coarser by `factor`, multiples of which its starts and stops must be."""
        return type(self)(
            tuple(a // f for a, f in zip(self.start, factor, strict=True)),
            tuple(b // f for b, f in zip(self.stop, factor, strict=True)),
        )

    def fine(self, factor: Sequence[int]) -> Self:
        """The same part on a grid that is finer by `factor`."""
        return type(self)(
            tuple(a * f for a, f in zip(self.start, factor, strict=True)),
            tuple(b * f for b, f in zip(self.stop, factor, strict=True)),
        )

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Index of this box in an array whose first pixel lies at `origin` (default: the grid's own origin)."""
        at = (0,) * self.ndim if origin is None else origin
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, at, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


def strips(shape: Sequence[int], pixels: int = 2**18) -> Iterator[slice]:
    """Ranges of the first axis that cut an array of this shape into pieces of about so many pixels.

    What is worked at piece by piece stays in the processor's cache, and its intermediate results in memory that the
    process has: those of a whole tile would be new pages every time, which take longer than the arithmetic.
    """
    rows = max(1, pixels * shape[0] // max(1, prod(shape)))
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
