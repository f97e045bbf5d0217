"""Large windows of a local network, run in stages or in part on a CPU, by whatever engine (`segcore.staging`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from segcore.box import Box
from segcore.errors import ModelError
from segcore.machine import release_memory
from segcore.model.cut import Cut
from segcore.model.probe import ROUNDING, first_taken
from segcore.model.segmenter import Floats, Part, Segmenter
from segcore.model.stages import find_stages
from segcore.spec import times
from segcore.staging import Staging, chunks, inside

#: What sides of a small window must be multiples of, for most networks and for those that halve it six times or seven.
_CELLS = (32, 64, 128)

LoadPart = Callable[[bytes, int, bool], Part]
"""Makes a part of an ONNX file, the threads that it may use, and whether it is run chunk after chunk."""


class StagedSegmenter:
    """An ONNX file, windows of which that are larger than a chunk are run in stages.

    Windows that fit in one chunk, and those whose sides do not fit the levels, are run in one pass, by what `plain`
    loads when there is one. Raises ModelError where the network has no such stages, and where a part does not load. A
    window in chunks that are too small raises PlanError.
    """

    batch = 1

    def __init__(
        self, path: Path, plain: Callable[[], Segmenter], load: LoadPart, threads: int, channels: int, staging: Staging
    ) -> None:
        self._path, self._channels, self._threads = path, channels, threads
        self._load_plain, self._load = plain, load
        self._plain: Segmenter | None = None
        cut = find_stages(path, channels, threads)
        if cut is None or len(cut.stages.levels) < staging.levels:
            found = len(cut.stages.levels) if cut else 0
            raise ModelError(
                f"{path} is to be run with {staging.levels} levels in chunks, and has {found} that can be; run it in "
                f"one pass"
            )
        self.stages, self._staging, self._takes = cut.stages, staging, cut.takes
        self._down = [load(part.file(), threads, True) for part in cut.down[: staging.levels]]
        self._up = [load(part.file(), threads, True) for part in cut.up[: staging.levels]]
        # What is not run here is not kept: all but the outermost levels have nearly all of the weights.
        self._inner: tuple[int, Part] | None = staging.levels, load(cut.inner[staging.levels].file(), threads, False)
        self.device, self.engine = threading.Lock(), self._down[0].engine

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        window = batch.shape[2:]
        depth = self.stages.depth(window, self._staging)
        if depth == 0:
            self._plain = self._plain or self._load_plain()
            return self._plain(batch)
        box = Box.of(window) if wanted is None else wanted
        # What is not wanted is not touched, and so takes no memory.
        scores = np.empty((len(batch), self.stages.scores, *window), np.float32)
        for image, out in zip(batch, scores, strict=True):
            self._rise(
                out[(None, slice(None), *box.slices())], image[None], 0, box, Staging(depth, self._staging.chunk)
            )
        return scores

    def release(self) -> None:
        self._plain = None

    def prove(self, what: object, rounding: float = ROUNDING["CPU"]) -> None:
        """Run each level on noise, in chunks and in one pass.

        Raises ModelError where these differ by more than rounding makes, relative to the largest number.
        """
        for depth in range(self._staging.levels):
            self._prove(what, depth, rounding)
        self._inner = None  # and what it keeps of the windows of the proof
        self._inside(self._staging.levels)

    def _rise(self, out: Floats, image: Floats, depth: int, wanted: Box, staging: Staging) -> None:
        """Write what rises to a level in a wanted box of its grid. `image`: what has gone down to it."""
        level, shape = self.stages.levels[depth], image.shape[2:]
        below = inside(wanted, shape, level)
        risen = self._risen(self._pooled(image, depth, staging), depth + 1, below, staging)
        pieces = chunks(shape, wanted, level.up_halo, level.factor, staging.chunk)
        for chunk in pieces:
            shown = [image[_at(chunk.read)], risen[_at(chunk.read.coarse(level.factor), below.start)]]
            given = [array for array, taken in zip(shown, self._takes[depth], strict=True) if taken]
            core = chunk.core & wanted
            found = self._up[depth](given, chunk is pieces[-1])
            out[_at(core, wanted.start)] = found[_at(core, chunk.read.start)]

    def _pooled(self, image: Floats, depth: int, staging: Staging) -> Floats:
        """What goes down from a level."""
        level, shape = self.stages.levels[depth], image.shape[2:]
        whole = Box.of(shape)
        pooled = np.empty((1, level.pooled, *whole.coarse(level.factor).shape), np.float32)
        pieces = chunks(shape, whole, level.down_halo, level.factor, staging.chunk)
        for chunk in pieces:
            core, read = chunk.core.coarse(level.factor), chunk.read.coarse(level.factor)
            found = self._down[depth]([image[_at(chunk.read)]], chunk is pieces[-1])
            pooled[_at(core)] = found[_at(core, read.start)]
        release_memory()
        return pooled

    def _risen(self, pooled: Floats, depth: int, wanted: Box, staging: Staging) -> Floats:
        """What rises from a level, in a wanted box of its grid."""
        if depth == staging.levels:
            whole = self._inside(depth)([pooled], True)
            release_memory()
            return whole[_at(wanted)]
        risen = np.empty((1, self.stages.levels[depth - 1].risen, *wanted.shape), np.float32)
        self._rise(risen, pooled, depth, wanted, staging)
        return risen

    def _inside(self, depth: int) -> Part:
        """The part inside of so many levels. One is kept: windows are mostly of one size, and weights are large."""
        if self._inner is None or self._inner[0] != depth:
            self._inner = None
            cut = find_stages(self._path, self._channels, self._threads)
            assert cut is not None, f"{self._path} had stages"
            self._inner = depth, self._load(cut.inner[depth].file(), self._threads, False)
        return self._inner[1]

    def _prove(self, what: object, depth: int, rounding: float) -> None:
        """Compare what a level and all inside of it give in small chunks, and in one pass."""
        level = self.stages.levels[depth]
        channels = self.stages.levels[depth - 1].pooled if depth else self.stages.channels
        # Two chunks along each axis, and more along the first, so that some do not touch the border there.
        all_sides = (
            [-(-(n + 2 * f) // cell) * cell for n, f in zip(level.least, level.factor, strict=True)] for cell in _CELLS
        )
        image, plain = first_taken(
            lambda image: self._inside(depth)([image]),
            ((1, channels, 2 * sides[0], *sides[1:]) for sides in all_sides),
            f"{what} cannot be tried in chunks",
        )
        shape = image.shape[2:]
        sides = (shape[0] // 2, *shape[1:])
        chunk = tuple(
            max(n + f, side * 3 // 4 // f * f) for n, f, side in zip(level.least, level.factor, sides, strict=True)
        )
        staged = np.empty_like(plain)
        self._rise(staged, image, depth, Box.of(shape), Staging(depth + 1, chunk))
        error_size = _error(plain, staged, Box.of(shape))
        if not error_size <= rounding:
            raise ModelError(
                f"{what} gives other scores in chunks than in one pass, by {error_size:.2g} of their size in "
                f"{times(shape)} pixels of level {depth}; run it in one pass"
            )


class CroppedSegmenter:
    """An ONNX file, of whose windows only what is wanted rises (`segcore.staging`).

    `network`: what `Cut.cropped` holds, in whatever numbers. Unless it is `in_part`, all of a window rises.
    """

    batch, in_part = 1, True

    def __init__(self, network: Part, cut: Cut) -> None:
        self.device, self.engine = threading.Lock(), network.engine
        self.cut, self._network = cut, network

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        window = batch.shape[2:]
        risen, ends = self.cut.cropping(window, wanted if wanted and self.in_part else Box.of(window))
        if len(batch) == 1 and risen == Box.of(window):
            return self._network([batch, *ends])
        # What is not wanted is not touched, and so takes no memory.
        scores = np.empty((len(batch), self.cut.stages.scores, *window), np.float32)
        for image, out in zip(batch, scores, strict=True):
            out[(None, slice(None), *risen.slices())] = self._network([image[None], *ends])
        return scores

    def release(self) -> None:
        self._network.release()

    def prove(self, what: object, plain: Segmenter, rounding: float = ROUNDING["CPU"]) -> None:
        """Compare a box in the middle of noise with the same in one pass over all of it.

        Raises ModelError where they differ by more than rounding makes, relative to the largest score.
        """
        others = len(self.cut.crops[0].ratio) - 1
        image, expected = first_taken(
            plain,
            ((1, self.cut.stages.channels, 3 * cell, *[2 * cell] * others) for cell in _CELLS),
            f"{what} cannot be tried in part",
        )
        shape = image.shape[2:]
        box = Box(tuple(3 * n // 8 + 1 for n in shape), tuple(5 * n // 8 for n in shape))
        error_size = _error(expected, self(image, box), box)
        if not error_size <= rounding:
            raise ModelError(
                f"{what} gives other scores where only a part of a window rises, by {error_size:.2g} of their size in "
                f"{times(shape)} pixels; run all of it"
            )


def find_crops(path: Path, channels: int, threads: int) -> tuple[Cut, bytes]:
    """Where the network in an ONNX file is cropped, and that as an ONNX file. Raises ModelError where it cannot be."""
    cut = find_stages(path, channels, threads)
    if cut is None or cut.cropped is None:
        raise ModelError(f"{path} cannot be run in part; run all of it")
    return cut.without_parts(), cut.cropped.file()


def _error(expected: Floats, found: Floats, box: Box) -> float:
    """How far scores in a box are from those that were expected there, relative to the largest of all."""
    at = _at(box)
    return float(np.abs(expected[at] - found[at]).max()) / max(float(np.abs(expected).max()), 1e-6)


def _at(box: Box, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
    """Index of a box in an array (N, C, *spatial) whose first pixel lies at `origin`."""
    return (slice(None), slice(None), *box.slices(origin))


def _conforms(staged: StagedSegmenter, cropped: CroppedSegmenter) -> tuple[Segmenter, Segmenter]:
    return staged, cropped
