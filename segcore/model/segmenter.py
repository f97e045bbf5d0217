"""What the engine sees of a network, and a fake one."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from segcore.box import Box
from segcore.errors import MemoryShortageError, ModelError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


#: What engines say when memory is out; they have no type of error for it.
_OUT_OF_MEMORY = re.compile(
    r"bad.?alloc|out of memory|(failed to|can't|cannot) allocate|allocation failed", re.IGNORECASE
)


def failure(engine: str, what: str, reason: str) -> ModelError:
    """The error of an engine that failed; MemoryShortageError where memory was out."""
    kind = MemoryShortageError if _OUT_OF_MEMORY.search(reason) else ModelError
    return kind(f"{engine} failed on {what}: {reason}")


class Segmenter(Protocol):
    """A loaded network: arrays in, arrays out. What it is given it leaves as it is.

    Loaded once per process and shared by its threads: whoever calls it holds `device`, so that one inference at a time
    is on the device. The result for a window depends on that window alone, not on the others of the batch.
    """

    device: threading.Lock

    engine: str
    """What runs it, for log and manifest."""
    batch: int
    """How many windows it likes to get at once."""

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        """Raw outputs (N, K, *window) for scaled windows (N, C, *window), both contiguous. Raises ModelError.

        `wanted`: the box that is needed of each window, counted from its corner; None for all of it. Scores outside may
        be anything.
        """
        ...

    def release(self) -> None:
        """Give back the memory that it keeps from window to window."""
        ...


class Part(Protocol):
    """A part of a network with one output, run again and again."""

    engine: str
    """What runs it, for log and manifest."""

    def __call__(self, given: Sequence[Floats | Integers], last: bool = False) -> Floats:
        """What it makes of its inputs, images of (1, C, *spatial) and numbers. Raises ModelError.

        After the `last` of a pass it holds no more memory than before the first.
        """
        ...

    def release(self) -> None:
        """Give back the memory that it keeps from call to call."""
        ...


class BoxFilter:
    """The fake beside the protocol: a local network whose K outputs are shifted means over (2 r + 1)^d pixels.

    It pads with zeros at the border of what it sees, as convolutions do, reaches exactly `reach` pixels and has
    stride 1, so the laws of tiling can be told by it from their violations. What is not wanted is NaN.
    """

    engine = "fake"
    batch = 2

    def __init__(self, reach: int, classes: int = 3) -> None:
        self.device = threading.Lock()
        self.reach, self.classes = reach, classes

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        out = batch.mean(axis=1, keepdims=True, dtype=np.float32)
        for axis in range(2, out.ndim):
            padding = [(0, 0)] * out.ndim
            padding[axis] = (self.reach, self.reach)
            padded, n = np.pad(out, padding), out.shape[axis]
            # Added in the same order for every pixel, so that equal neighbourhoods give equal bits.
            total = np.zeros_like(out)
            for shift in range(2 * self.reach + 1):
                total = total + np.take(padded, range(shift, shift + n), axis=axis)
            out = (total / np.float32(2 * self.reach + 1)).astype(np.float32)
        levels = np.linspace(-1, 1, self.classes, dtype=np.float32).reshape(1, -1, *(1,) * (out.ndim - 2))
        scores = -np.abs(out - levels)
        if wanted is None:
            return scores
        at = (slice(None), slice(None), *wanted.slices())
        hidden = np.full_like(scores, np.nan)
        hidden[at] = scores[at]
        return hidden

    def release(self) -> None:
        """It keeps nothing."""


def _conforms(fake: BoxFilter) -> Segmenter:
    return fake
