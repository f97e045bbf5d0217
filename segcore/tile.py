"""The only per-tile function: read, scale, infer, crop or blend, label."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from segcore.box import Box, strips
from segcore.errors import MemoryShortageError, ModelError
from segcore.grid import mirrored
from segcore.io.source import Floats, Labels, Source
from segcore.model.card import Card
from segcore.model.segmenter import Segmenter
from segcore.plan import Plan, Tile
from segcore.resample import interpolate
from segcore.scaling import Scaling
from segcore.spec import Weights


@dataclass(frozen=True, slots=True)
class TileResult:
    """Labels (*core), scores (K, *core) in float32, and what it took.

    Seconds to read and scale, seconds on the device, and seconds to blend and label.
    """

    labels: Labels
    scores: Floats
    valid: int
    windows: int
    read_seconds: float
    infer_seconds: float
    label_seconds: float


def label_tile(
    tile: Tile, plan: Plan, card: Card, source: Source, scaling: Scaling, segmenter: Segmenter
) -> TileResult:
    """Label one tile. A tile without a valid pixel in its core is not inferred.

    A pixel is valid where every channel is. Where two classes score alike the lower index wins. Raises SceneError,
    ModelError.
    """
    began = time.perf_counter()
    values = source.read(tile.read)
    valid = _valid(values[(slice(None), *tile.core.slices(tile.read.start))])
    count = int(np.count_nonzero(valid))
    if count == 0:
        labels = np.full(tile.core.shape, card.label_nodata, np.uint8)
        scores = np.full((len(card.classes), *tile.core.shape), np.nan, np.float32)
        return TileResult(labels, scores, 0, 0, time.perf_counter() - began, 0.0, 0.0)
    scaling(values)
    image = _network_image(values, tile, plan, card.padding)
    read = time.perf_counter()
    device = _Device(segmenter)
    target = _target_scores(image, tile, plan, card, device)
    gathered = time.perf_counter()
    scores = interpolate(target, tile.target, plan.rescale.inverse(), tile.core)
    labels = _decide(scores)
    labels[~valid] = card.label_nodata
    np.copyto(scores, np.float32(np.nan), where=~valid)
    done = time.perf_counter()
    rest = gathered - read - device.waited - device.busy
    return TileResult(labels, scores, count, len(tile.windows), read - began, device.busy, done - gathered + rest)


@dataclass(frozen=True, slots=True)
class Labeller:
    """All that it takes to label any tile of a scene, but for the tile."""

    plan: Plan
    card: Card
    source: Source
    scaling: Scaling
    segmenter: Segmenter

    def __call__(self, tile: Tile) -> TileResult:
        """Label one tile. Raises SceneError, ModelError."""
        return label_tile(tile, self.plan, self.card, self.source, self.scaling, self.segmenter)


class _Device:
    """A segmenter behind its lock, with a watch: seconds spent waiting for the device, and seconds on it."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter, self.batch = segmenter, segmenter.batch
        self.waited = self.busy = 0.0

    def __call__(self, batch: Floats, wanted: Box | None) -> Floats:
        asked = time.perf_counter()
        with self._segmenter.device:
            began = time.perf_counter()
            out = self._run(batch, wanted)
        self.waited += began - asked
        self.busy += time.perf_counter() - began
        return out

    def _run(self, batch: Floats, wanted: Box | None) -> Floats:
        """Run a batch; where memory is out, one half of it after the other, and so the next ones."""
        try:
            return self._segmenter(batch, wanted)
        except MemoryShortageError:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            self.batch = min(self.batch, len(batch) - half)
            return np.concatenate([self._run(batch[:half], wanted), self._run(batch[half:], wanted)])


def _network_image(scaled: Floats, tile: Tile, plan: Plan, padding: str) -> Floats:
    """The hull of the tile's windows on the network's grid, (C, *hull), padded where it reaches past the end."""
    hull = tile.hull
    seen = mirrored(hull, plan.canvas)
    image = interpolate(scaled, tile.read, plan.rescale, seen)
    # What is mirrored may reach further in than the windows do: pad what was seen, then cut out the hull.
    past = [(0, 0), *((0, max(0, stop - n)) for stop, n in zip(hull.stop, plan.canvas, strict=True))]
    mode = {"symmetric": "symmetric", "edge": "edge", "zero": "constant"}[padding]
    padded = np.pad(image, past, mode=mode) if any(after for _, after in past) else image  # type: ignore[call-overload]
    return padded[(slice(None), *hull.slices(seen.start))]


def _target_scores(image: Floats, tile: Tile, plan: Plan, card: Card, device: _Device) -> Floats:
    """Scores of the tile's target, (K, *target), from one window or gathered from several (blend mode)."""
    target = tile.target
    if plan.mode != "blend":
        return next(_window_scores(image, tile, card, device, target))[1]
    windows = _window_scores(image, tile, card, device)
    total = np.zeros((len(card.classes), *target.shape), np.float32)
    weights = np.zeros(target.shape, np.float32)
    for window, scores in windows:
        seen = window & target
        weight = window_weights(window.shape, plan.sight.weights)[seen.slices(window.start)]
        at = seen.slices(target.start)
        total[(slice(None), *at)] += scores[(slice(None), *seen.slices(window.start))] * weight
        weights[at] += weight
    return total / weights


def _window_scores(
    image: Floats, tile: Tile, card: Card, device: _Device, target: Box | None = None
) -> Iterator[tuple[Box, Floats]]:
    """Every window with its scores after the activation, in order, inferred in batches; only a target's, if given."""
    windows, origin = tile.windows, tile.hull.start
    done = 0
    while group := windows[done : done + device.batch]:
        done += len(group)
        # A device may choose its arithmetic by the size of the batch: of several windows, all batches are full.
        size = 1 if len(windows) == 1 else device.batch
        shown = [image[(slice(None), *window.slices(origin))] for window in (group * size)[:size]]
        batch = np.stack(shown) if size > 1 else shown[0][None]
        wanted = None if target is None else target.shift([-a for a in group[0].start])
        raw = device(np.ascontiguousarray(batch, dtype=np.float32), wanted)
        promised = (size, 1 if card.binary and raw.shape[1] == 1 else len(card.classes), *group[0].shape)
        if raw.shape != promised:
            raise ModelError(
                f"the network of {card.name} turns a batch of shape {batch.shape} into {raw.shape}; its card promises "
                f"{promised} ({len(card.classes)} classes, the size of the window)"
            )
        if wanted is not None:
            raw = raw[(slice(None), slice(None), *wanted.slices())]
        for window, found in zip(group, raw, strict=False):
            scores = np.empty((len(card.classes), *found.shape[1:]), np.float32)
            for rows in strips(found.shape[1:]):
                piece = found[:, rows]
                if not np.isfinite(piece).all():
                    raise ModelError(
                        f"the network of {card.name} returns NaN or infinity in {window}; check its scaling"
                    )
                scores[:, rows] = _activate(piece, card.activation)
                if len(found) < len(scores):  # one score says both
                    scores[0, rows] = 1 - scores[1, rows]
            yield window, scores


@cache
def window_weights(shape: tuple[int, ...], kind: Weights) -> Floats:
    """Weights of a window's pixels, positive everywhere: a product of profiles along the axes, taken at pixel centres.

    `cosine`: sin^2, the Hann window; `gaussian`: a standard deviation of an eighth of the window, and at least 0.001,
    so that corners that no other window shows keep a weight; `constant`: all alike. Divided by their sum over all
    windows of a pixel, the weights form a partition of unity (law 3).
    """
    weights = np.ones(shape)
    for axis, n in enumerate(shape):
        x = (np.arange(n) + 0.5) / n
        profile = {"cosine": np.sin(np.pi * x) ** 2, "gaussian": np.exp(-32 * (x - 0.5) ** 2), "constant": np.ones(n)}
        weights *= profile[kind].reshape([-1 if i == axis else 1 for i in range(len(shape))])
    if kind == "gaussian":
        weights = np.maximum(weights, 1e-3)
    found = weights.astype(np.float32)
    found.setflags(write=False)
    return found


def _valid(values: Floats) -> NDArray[np.bool_]:
    """Where every channel of values (C, *spatial) is valid."""
    valid = np.ones(values.shape[1:], np.bool_)
    for rows in strips(valid.shape):
        for channel in values:
            valid[rows] &= ~np.isnan(channel[rows])
    return valid


def _activate(raw: Floats, activation: str) -> Floats:
    """Scores (K, *spatial) of what a network returns."""
    if activation == "softmax":
        raised = np.exp(raw - raw.max(axis=0))
        return raised / raised.sum(axis=0, dtype=np.float32)
    if activation == "sigmoid":
        return (0.5 * (1 + np.tanh(0.5 * raw))).astype(np.float32)
    return raw


def _decide(scores: Floats) -> Labels:
    """Class of the highest score, the lowest of those that tie."""
    labels = np.zeros(scores.shape[1:], np.uint8)
    for rows in strips(labels.shape):
        highest = scores[0, rows].copy()
        for index, score in enumerate(scores[1:, rows], start=1):  # several times as fast as argmax across an axis
            labels[rows][score > highest] = index
            np.maximum(highest, score, out=highest)
    return labels
