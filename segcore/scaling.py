"""Scaling: from physical values to what a network was trained on.

Steps that need statistics of the image (percentiles, mean, deviation) take them from the whole scene, once, before the
first tile (law 4); what comes out is a short list of fixed numbers, the same for every tile and every restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segcore.box import strips
from segcore.errors import SceneError
from segcore.io.source import Floats, Source, slabs
from segcore.model.card import Affine, ClipPercentiles, Fill, Standardise, Step


@dataclass(frozen=True, slots=True)
class Operation:
    """One fixed step: clip to [a, b], multiply by a and add b, or fill invalid pixels with a; per channel."""

    kind: Literal["clip", "affine", "fill"]
    a: tuple[float, ...]
    b: tuple[float, ...]

    def __call__(self, values: Floats) -> None:
        """The step on values (C, *spatial), in place."""
        shape = (-1, *(1,) * (values.ndim - 1))
        a = np.array(self.a, np.float32).reshape(shape)
        b = np.array(self.b, np.float32).reshape(shape)
        if self.kind == "clip":
            np.clip(values, a, b, out=values)
        elif self.kind == "affine":
            with np.errstate(over="ignore"):  # of a stray value that is no number of any sensor
                np.multiply(values, a, out=values)
                np.add(values, b, out=values)
        else:
            np.copyto(values, a, where=np.isnan(values))


@dataclass(frozen=True, slots=True)
class Scaling:
    """A card's steps with all their numbers known. Invalid pixels that no step filled become zero at the end."""

    operations: tuple[Operation, ...]

    def __call__(self, values: Floats) -> None:
        """Scale physical values (C, *spatial) in place; NaN, which marks invalid pixels, becomes zero."""
        for rows in strips(values.shape[1:]):
            piece = values[:, rows]
            for operation in self.operations:
                operation(piece)
            piece[np.isnan(piece)] = 0

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
    """For each rank (0 to 100) the percentile of each channel over all blocks, NaN left out; exactly numpy's.

    Two passes of counting: float32 values, read as integers that keep their order, are counted by their upper 16 bits,
    and then by their lower 16 bits in the few bins where a wanted value lies. So a scene of any size takes the memory
    of one block. Raises SceneError for a channel without a valid pixel.
    """
    upper = np.zeros((channels, 2**16), np.int64)
    for block in blocks():
        for c in range(channels):
            upper[c] += np.bincount(_ordered(block[c]) >> 16, minlength=2**16)
    ends = upper.cumsum(axis=1)
    count = ends[:, -1]
    _refuse_empty(count, uri)
    # Between which two pixels, in ascending order, each percentile lies.
    places = np.array(ranks)[:, None] / 100 * (count - 1)
    below, above = np.floor(places).astype(np.int64), np.ceil(places).astype(np.int64)
    wanted = [{int(k) for k in (*below[:, c], *above[:, c])} for c in range(channels)]
    bin_of = [{k: int(np.searchsorted(ends[c], k, side="right")) for k in wanted[c]} for c in range(channels)]
    lower = {(c, b): np.zeros(2**16, np.int64) for c in range(channels) for b in bin_of[c].values()}
    for block in blocks():
        for c in range(channels):
            keys = _ordered(block[c])
            for b in set(bin_of[c].values()):
                lower[c, b] += np.bincount(keys[keys >> 16 == b] & 0xFFFF, minlength=2**16)

    def value(c: int, k: int) -> float:
        b = bin_of[c][k]
        rest = k - (int(ends[c, b - 1]) if b else 0)
        return _from_ordered(b << 16 | int(np.searchsorted(lower[c, b].cumsum(), rest, side="right")))

    found = []
    for r in range(len(ranks)):
        pairs = [(value(c, int(below[r, c])), value(c, int(above[r, c]))) for c in range(channels)]
        found.append(tuple(a + (b - a) * float(places[r, c] - below[r, c]) for c, (a, b) in enumerate(pairs)))
    return found


def moments(
    blocks: Callable[[], Iterable[Floats]], channels: int, uri: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all blocks, NaN left out, in two passes of float64.

    Raises SceneError for a channel without a valid pixel, or whose pixels are all the same.
    """
    count = np.zeros(channels, np.int64)
    total, squares = np.zeros(channels), np.zeros(channels)
    for block in blocks():
        for c in range(channels):
            valid = block[c][~np.isnan(block[c])]
            count[c] += valid.size
            total[c] += valid.sum(dtype=np.float64)
    _refuse_empty(count, uri)
    mean = total / count
    for block in blocks():
        for c in range(channels):
            valid = block[c][~np.isnan(block[c])]
            squares[c] += np.square(valid - mean[c], dtype=np.float64).sum()
    deviation = np.sqrt(squares / count)
    if not (deviation > 0).all():
        flat = int(np.argmin(deviation))
        raise SceneError(
            f"{uri}: every valid pixel of channel {flat + 1} of {channels} is {mean[flat]:g}; the model standardises "
            f"by the deviation, which is zero: is this the right file?"
        )
    return tuple(map(float, mean)), tuple(map(float, deviation))


def _ordered(values: Floats) -> NDArray[np.uint32]:
    """Valid values as integers in the same order: a float's bits with the sign bit set, or all of them turned round."""
    bits = np.ascontiguousarray(values[~np.isnan(values)], np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31))


def _from_ordered(key: int) -> float:
    bits = key ^ 2**31 if key >> 31 else key ^ 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def _refuse_empty(count: NDArray[np.int64], uri: str) -> None:
    if not count.all():
        raise SceneError(
            f"{uri} has no valid pixel in channel {int(np.argmin(count)) + 1} of {len(count)}: all are nodata; check "
            f"its nodata value"
        )


def _scene_after(operations: tuple[Operation, ...], source: Source) -> Callable[[], Iterable[Floats]]:
    """The scene, block by block, as often as wanted; statistics are of valid pixels, so nothing is filled yet."""

    def blocks() -> Iterable[Floats]:
        for box in slabs(source.grid, 2**23 // len(source.channels)):
            values = source.read(box)
            for operation in operations:
                if operation.kind != "fill":
                    operation(values)
            yield values

    return blocks


def _each(value: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (float(value),) * channels
