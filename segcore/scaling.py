"""Scaling: from physical values to what a network was trained on.

Steps that need statistics of the image (percentiles, mean, deviation) take them from the whole scene, once, before the
first tile (law 4); what comes out is a short list of fixed numbers, the same for every tile and every restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from segcore.errors import SceneError
from segcore.io.source import Floats, Source, slabs
from segcore.model.card import Affine, ClipPercentiles, Fill, Standardise, Step

#: Bins of one pass over the scene for its percentiles; three passes find a value to 2^-36 of the scene's range.
_BINS = 4096
_PASSES = 3


@dataclass(frozen=True, slots=True)
class Operation:
    """One fixed step: clip to [a, b], multiply by a and add b, or fill invalid pixels with a; per channel."""

    kind: Literal["clip", "affine", "fill"]
    a: tuple[float, ...]
    b: tuple[float, ...]

    def __call__(self, values: Floats) -> Floats:
        shape = (-1, *(1,) * (values.ndim - 1))
        a = np.array(self.a, np.float32).reshape(shape)
        b = np.array(self.b, np.float32).reshape(shape)
        if self.kind == "clip":
            return np.clip(values, a, b)
        if self.kind == "affine":
            return values * a + b
        return np.where(np.isnan(values), a, values)


@dataclass(frozen=True, slots=True)
class Scaling:
    """A card's steps with all their numbers known. Invalid pixels that no step filled become zero at the end."""

    operations: tuple[Operation, ...]

    def __call__(self, values: Floats) -> Floats:
        """Scaled values (C, *spatial), free of NaN, from physical ones in which NaN marks invalid pixels."""
        for operation in self.operations:
            values = operation(values)
        return np.where(np.isnan(values), np.float32(0), values)

    def to_json(self) -> list[dict[str, Any]]:
        return [{"kind": op.kind, "a": list(op.a), "b": list(op.b)} for op in self.operations]

    @classmethod
    def from_json(cls, steps: Sequence[dict[str, Any]]) -> Scaling:
        return cls(tuple(Operation(step["kind"], tuple(step["a"]), tuple(step["b"])) for step in steps))


def fit_scaling(steps: Sequence[Step], source: Source) -> Scaling:
    """The steps with the statistics of this scene. Reads the scene only where a step asks for it. Raises SceneError."""
    channels = len(source.channels)
    done: list[Operation] = []
    for step in steps:
        blocks = _scene_after(tuple(done), source)
        if isinstance(step, Affine):
            done.append(Operation("affine", _each(step.scale, channels), _each(step.offset, channels)))
        elif isinstance(step, Fill):
            done.append(Operation("fill", _each(step.value, channels), _each(0.0, channels)))
        elif isinstance(step, ClipPercentiles):
            low, high = percentiles(blocks, channels, (step.lower, step.upper), source.uri)
            done.append(Operation("clip", low, high))
        elif isinstance(step, Standardise):
            mean, deviation = moments(blocks, channels, source.uri)
            scale = tuple(1 / d for d in deviation)
            done.append(Operation("affine", scale, tuple(-m * s for m, s in zip(mean, scale, strict=True))))
    return Scaling(tuple(done))


def percentiles(
    blocks: Callable[[], Iterable[Floats]], channels: int, ranks: tuple[float, ...], uri: str
) -> list[tuple[float, ...]]:
    """For each rank (0 to 100) the percentile of each channel over all blocks, NaN left out.

    The value below which that share of the pixels lies, found by histograms that are refined around it, so that a
    scene of any size takes no more memory than one block. Raises SceneError for a channel without a valid pixel.
    """
    low = np.full(channels, np.inf)
    high = np.full(channels, -np.inf)
    count = np.zeros(channels, np.int64)
    for block in blocks():
        for c in range(channels):
            valid = block[c][~np.isnan(block[c])]
            if valid.size:
                low[c], high[c] = min(low[c], valid.min()), max(high[c], valid.max())
                count[c] += valid.size
    if not count.all():
        raise SceneError(
            f"{uri} has no valid pixel in channel {int(np.argmin(count)) + 1} of {channels}: all are nodata"
        )
    edges = np.stack([np.stack([low, high])] * len(ranks))  # (ranks, 2, channels): brackets of the values sought
    for _ in range(_PASSES):
        counts = np.zeros((len(ranks), channels, _BINS), np.int64)
        below = np.zeros((len(ranks), channels), np.int64)
        for block in blocks():
            for c in range(channels):
                valid = block[c][~np.isnan(block[c])]
                for r in range(len(ranks)):
                    a, b = edges[r, :, c]
                    below[r, c] += np.count_nonzero(valid < a)
                    counts[r, c] += np.histogram(valid, bins=_BINS, range=(a, b))[0] if b > a else 0
        for r, rank in enumerate(ranks):
            for c in range(channels):
                a, b = edges[r, :, c]
                if b > a:
                    wanted = rank / 100 * (count[c] - 1) - below[r, c]
                    bin_ = min(int(np.searchsorted(np.cumsum(counts[r, c]), wanted, side="right")), _BINS - 1)
                    width = (b - a) / _BINS
                    edges[r, :, c] = a + bin_ * width, a + (bin_ + 1) * width
    return [tuple(float(v) for v in edges[r].mean(axis=0)) for r in range(len(ranks))]


def moments(
    blocks: Callable[[], Iterable[Floats]], channels: int, uri: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all blocks, NaN left out, in two passes of float64.

    Raises SceneError for a channel without a valid pixel, or whose pixels are all the same.
    """
    count = np.zeros(channels)
    total = np.zeros(channels)
    for block in blocks():
        axes = tuple(range(1, block.ndim))
        count += np.count_nonzero(~np.isnan(block), axis=axes)
        total += np.nansum(block, axis=axes, dtype=np.float64)
    if not count.all():
        raise SceneError(
            f"{uri} has no valid pixel in channel {int(np.argmin(count)) + 1} of {channels}: all are nodata"
        )
    mean = total / count
    squares = np.zeros(channels)
    for block in blocks():
        axes = tuple(range(1, block.ndim))
        squares += np.nansum((block - mean.reshape(-1, *(1,) * len(axes))) ** 2, axis=axes, dtype=np.float64)
    deviation = np.sqrt(squares / count)
    if not (deviation > 0).all():
        flat = int(np.argmin(deviation))
        raise SceneError(
            f"{uri}: every valid pixel of channel {flat + 1} of {channels} is {mean[flat]:g}; the model standardises "
            f"by the deviation, which is zero: is this the right file?"
        )
    return tuple(map(float, mean)), tuple(map(float, deviation))


def _scene_after(operations: tuple[Operation, ...], source: Source) -> Callable[[], Iterable[Floats]]:
    """The scene, block by block, as often as wanted; statistics are of valid pixels, so nothing is filled yet."""

    def blocks() -> Iterable[Floats]:
        for box in slabs(source.grid):
            values = source.read(box)
            for operation in operations:
                if operation.kind != "fill":
                    values = operation(values)
            yield values

    return blocks


def _each(value: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (float(value),) * channels
