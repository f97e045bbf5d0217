"""A large window of a local network in stages: what that takes, as integers and plain values.

    level 0   image ─ down ┐                     ┌ up ─ scores     down: in chunks, only what is pooled is kept
    level 1          pooled ─ down ┐     ┌ up ─ risen              up: in chunks, the encoder again for the skip
    level 2                  pooled ─ inner ─ risen                inner: the rest of the network, in one piece

Only deep levels see far. So a chunk of a level needs a halo of a few pixels, where a tile of the whole network needs a
hundred; and what an outer level holds, nearly all of the memory, is held for a chunk at a time. Nothing is
approximated: chunks lie on multiples of the downsampling of their level, show their halo, and end at the border of the
window, where the network pads as it would in one pass.

In one pass, too, only deep levels need the whole window. On the way up, where most of the work is, no more rises than
what the wanted part of the window is made of (`rising`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from segcore.box import Box
from segcore.errors import PlanError
from segcore.spec import Runner, Sides, times

#: Sides of chunks to choose from (pixels of their level, halo included), by number of axes.
CHUNKS = {2: (256, 384, 512), 3: (48, 64, 80, 96, 128, 160)}
#: Bytes of a value: float32.
_VALUE = 4
#: What an engine holds beside the arrays of a network, and the heap beside what is in use (measured), as a factor.
_WORKING = {"onnxruntime": 1.1, "openvino": 1.25, "torch": 1.9}
#: The same of one pass.
_ONE_PASS = 1.25
#: The arena of ONNX Runtime grows in powers of two: what chunks hold of it, as a factor.
_ARENA = {"onnxruntime": 1.5, "openvino": 1.0, "torch": 1.0}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a network: multiply-adds, and bytes that the engine holds at its peak, per pixel that it is run on.

    Of a part that takes two images, bytes and work count for each pixel of the larger one. `bytes` counts inputs and
    outputs, too.
    """

    work: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Level:
    """A level that can be run in chunks. Pixels are those of its own grid.

    `factor`: by how much it downsamples, per axis. `down_halo`, `up_halo`: what a chunk must show before and after what
    is kept of it; multiples of `factor`. `pooled`, `risen`: channels of what goes down and what comes up, on a grid
    that is coarser by `factor`. `rise`: multiply-adds per pixel of what is made of what has risen, which need not be
    done where it is not wanted; 0 where that cannot be told apart.
    """

    factor: tuple[int, ...]
    down_halo: Sides
    up_halo: Sides
    down: Part
    up: Part
    pooled: int
    risen: int
    rise: float = 0.0

    def __post_init__(self) -> None:
        if all(f == 1 for f in self.factor) or any(f < 1 for f in self.factor):
            raise PlanError(f"a level that downsamples by {self.factor} is none")
        for sides in (self.down_halo, self.up_halo):
            if any(n < 0 or n % f for pair, f in zip(sides, self.factor, strict=True) for n in pair):
                raise PlanError(f"halo {sides} must be in multiples of the downsampling {self.factor}")

    @property
    def least(self) -> tuple[int, ...]:
        """The smallest chunk: its halo and one cell, per axis."""
        halos = zip(self.down_halo, self.up_halo, self.factor, strict=True)
        return tuple(max(sum(down), sum(up)) + f for down, up, f in halos)


@dataclass(frozen=True, slots=True)
class Staging:
    """How a window is run: so many outer levels in chunks, or (`ONE_PASS`) none, and only what is wanted rises.

    `chunk`: largest side of what is run at once, halo included, per axis in pixels of the level that it lies in. A
    level that fits in one chunk is run in one piece, with all that is inside of it.
    """

    levels: int
    chunk: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.levels < 0 or any(c < 1 for c in self.chunk):
            raise PlanError(f"{self.levels} levels in chunks of {times(self.chunk)} pixels cannot be")


#: One pass, in which only what is wanted rises.
ONE_PASS = Staging(0, ())


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is run at once: `read` is shown, `core` is kept of it. Boxes on the grid of its level."""

    read: Box
    core: Box


Span = tuple[int, int, int, int]


def spans(length: int, start: int, stop: int, halo: tuple[int, int], size: int, step: int) -> list[Span]:
    """Cut `start:stop` of an axis into ranges (read start, read stop, core start, core stop).

    All reads are of one length, at most `size` pixels. They lie on multiples of `step`, as `start`, `stop`, `length`
    and `halo` must, and show `halo` around their cores but where the axis ends. There are as few as can be, and they
    are as short as can be. Raises PlanError where `size` leaves nothing between the halos.
    """
    before, after = halo
    shared = before + after
    low, high = max(0, start - before), min(length, stop + after)
    extent = high - low
    if extent <= size:
        return [(low, high, start, stop)]
    largest = size // step * step
    if largest <= shared:
        raise PlanError(
            f"chunks of {size} pixels leave nothing between halos of {before} and {after}; take larger ones"
        )
    count = -(-(extent - shared) // (largest - shared))
    side = -(-(extent + (count - 1) * shared) // (count * step)) * step
    found = list[Span]()
    while start < stop:
        read = min(max(low, start - before), high - side)
        end = stop if read + side == high else read + side - after
        found.append((read, read + side, start, min(end, stop)))
        start = end
    return found


def reads(
    shape: tuple[int, ...], wanted: Box, halo: Sides, factor: tuple[int, ...], size: tuple[int, ...]
) -> tuple[int, int]:
    """Pixels that a chunk of `chunks` shows, and how many there are of them, without a list of all."""
    along = _along(shape, wanted, halo, factor, size)
    return prod(stop - start for (start, stop, *_), *_ in along), prod(map(len, along))


def chunks(
    shape: tuple[int, ...], wanted: Box, halo: Sides, factor: tuple[int, ...], size: tuple[int, ...]
) -> list[Chunk]:
    """Chunks of an image of this shape whose cores cover the wanted box, each pixel of it once; all reads are alike."""
    return [Chunk(*_boxes(ranges)) for ranges in product(*_along(shape, wanted, halo, factor, size))]


def _along(
    shape: tuple[int, ...], wanted: Box, halo: Sides, factor: tuple[int, ...], size: tuple[int, ...]
) -> list[list[Span]]:
    """The ranges of each axis."""
    cells = wanted.snap(factor)
    return [spans(*axis) for axis in zip(shape, cells.start, cells.stop, halo, size, factor, strict=True)]


def _boxes(ranges: tuple[Span, ...]) -> tuple[Box, Box]:
    read_start, read_stop, core_start, core_stop = zip(*ranges, strict=True)
    return Box(read_start, read_stop), Box(core_start, core_stop)


@dataclass(frozen=True, slots=True)
class Stages:
    """A network that can be run in stages, the outermost level first.

    `inner[n]` is what is inside of n levels, for each pixel of its grid: `inner[0]` is the whole network in one pass.
    `channels`, `scores`: of its input and output.
    """

    levels: tuple[Level, ...]
    inner: tuple[Part, ...]
    channels: int
    scores: int

    def __post_init__(self) -> None:
        if len(self.inner) != len(self.levels) + 1:
            raise PlanError(f"{len(self.levels)} levels have {len(self.levels) + 1} insides, not {len(self.inner)}")

    def depth(self, window: tuple[int, ...], staging: Staging) -> int:
        """How many levels are run in chunks in a window of this shape.

        Raises PlanError where there are not so many levels, or where its chunks are too small for a halo.
        """
        if staging.levels > len(self.levels):
            raise PlanError(f"{staging.levels} levels are to be run in chunks, and the network has {len(self.levels)}")
        shape = window
        for depth, level in enumerate(self.levels[: staging.levels]):
            if all(n <= c for n, c in zip(shape, staging.chunk, strict=True)):
                return depth
            if any(n % f for n, f in zip(shape, level.factor, strict=True)):
                return 0
            if any(c // f * f < least for c, f, least in zip(staging.chunk, level.factor, level.least, strict=True)):
                raise PlanError(
                    f"chunks of {times(staging.chunk)} pixels are too small for level {depth}, which needs "
                    f"{times(level.least)}"
                )
            shape = coarse(shape, level.factor)
        return staging.levels

    def memory(
        self,
        window: tuple[int, ...],
        wanted: Box,
        staging: Staging,
        runner: Runner = "onnxruntime",
        shortness: float = 1.0,
    ) -> int:
        """Bytes that the engine holds at its peak beside the window itself, for one window of which a box is wanted.

        `shortness`: what arrays take inside of it, relative to float32, in which parts give them to one another.
        """
        depth = self.depth(window, staging)
        if depth == 0:
            return int(shortness * _ONE_PASS * (self.inner[0].bytes - _VALUE * self.channels) * prod(window))
        # Pages of the scores that are outside of what is wanted are never touched.
        steps = self._steps(window, wanted, staging, depth, _ARENA[runner], shortness)
        return int(_WORKING[runner] * max(held for held, _ in steps))

    def work(self, window: tuple[int, ...], wanted: Box, staging: Staging) -> float:
        """Multiply-adds of one window of which a box is wanted."""
        depth = self.depth(window, staging)
        if staging.levels == 0:
            rises = rising(window, wanted, self.levels)
            left_out = (
                level.rise * (prod(shape) - prod(level.factor) * box.size)
                for level, (shape, box) in zip(self.levels, rises, strict=True)
            )
            return self.inner[0].work * prod(window) - sum(left_out)
        if depth == 0:
            return self.inner[0].work * prod(window)
        return sum(work for _, work in self._steps(window, wanted, staging, depth))

    def choices(self, window: tuple[int, ...]) -> Iterator[Staging]:
        """Stagings worth a look for a window of this shape, the one pass first; see `memory` and `work`."""
        yield ONE_PASS
        for levels in range(1, len(self.levels) + 1):
            for side in CHUNKS[len(window)]:
                staging = Staging(levels, tuple(min(side, n) for n in window))
                fits = all(
                    c // f * f >= least
                    for level in self.levels[:levels]
                    for c, f, least in zip(staging.chunk, level.factor, level.least, strict=True)
                )
                if fits and self.depth(window, staging) == levels:
                    yield staging

    def _steps(
        self,
        window: tuple[int, ...],
        wanted: Box,
        staging: Staging,
        depth: int,
        arena: float = 1.0,
        shortness: float = 1.0,
    ) -> Iterator[tuple[float, float]]:
        """Bytes held and multiply-adds of every step, in order: down, down, ..., inner, up, up, ..."""
        shapes, boxes, kept = [window], [wanted], [0.0]
        for level in self.levels[:depth]:
            shape = shapes[-1]
            size, count = reads(shape, Box.of(shape), level.down_halo, level.factor, staging.chunk)
            kept.append(kept[-1] + _VALUE * level.pooled * prod(coarse(shape, level.factor)))
            yield kept[-1] + shortness * arena * level.down.bytes * size, level.down.work * size * count
            shapes.append(coarse(shape, level.factor))
            boxes.append(inside(boxes[-1], shape, level))
        inner = self.inner[depth]
        # The input of the inner part is kept already, and counted in `bytes` as well.
        own = shortness * prod(shapes[-1]) * (inner.bytes - _VALUE * self.levels[depth - 1].pooled)
        yield kept[-1] + own, inner.work * prod(shapes[-1])
        # What comes out of the inner part is whole, even if only a box of it is wanted.
        risen = _VALUE * self.levels[depth - 1].risen * prod(shapes[-1])
        for i in reversed(range(depth)):
            level, shape = self.levels[i], shapes[i]
            size, count = reads(shape, boxes[i], level.up_halo, level.factor, staging.chunk)
            above = _VALUE * (self.levels[i - 1].risen if i else self.scores) * boxes[i].size
            yield kept[i] + risen + above + shortness * arena * level.up.bytes * size, level.up.work * size * count
            risen = above


def coarse(shape: tuple[int, ...], factor: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the grid that is coarser by a factor."""
    return tuple(n // f for n, f in zip(shape, factor, strict=True))


def inside(wanted: Box, shape: tuple[int, ...], level: Level) -> Box:
    """Where `up` needs what has risen so as to give a wanted box of an image of this shape; on the coarser grid."""
    shown = wanted.snap(level.factor).grow(level.up_halo) & Box.of(shape)
    return shown.coarse(level.factor)


def rising(window: tuple[int, ...], wanted: Box, levels: Sequence[Level]) -> Iterator[tuple[tuple[int, ...], Box]]:
    """Of every level the shape of its grid, and what must rise to it where a box of a window is wanted.

    These boxes lie on the coarser grid of their level, on which the next one lies.
    """
    shape = window
    for level in levels:
        box = inside(wanted, shape, level)
        yield shape, box
        shape, wanted = coarse(shape, level.factor), box
