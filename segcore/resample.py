"""Linear interpolation between two grids, the arithmetic behind `segcore.grid.Rescale`.

One implementation for rasters and volumes, for bands of another resolution, for the spacing that a model wants and for
scores on their way back. Every output pixel is summed over the same inputs in the same order whatever box is asked
for, so tiles fit together bit for bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from segcore.box import Box
from segcore.grid import Rescale

Floats = NDArray[np.float32]


def interpolate(array: Floats, at: Box, rescale: Rescale, box: Box) -> Floats:
    """The pixels of `box` on the target grid, from `array` (C, *at.shape) that shows `at` of the source grid.

    `at` holds `rescale.support(box)`. NaN marks invalid pixels: they take no part, and an output is NaN where they
    hold more than half of its weight. Returns (C, *box.shape).
    """
    if rescale.support(box) not in at:
        raise ValueError(f"{at} does not hold {rescale.support(box)}, which {box} is made of")
    if rescale.identity:
        return array[(slice(None), *box.slices(at.start))]
    invalid = np.isnan(array)
    if not invalid.any():
        return _along_axes(array, at, rescale, box)
    values = _along_axes(np.where(invalid, np.float32(0), array), at, rescale, box)
    weight = _along_axes((~invalid).astype(np.float32), at, rescale, box)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight < 0.5, np.float32(np.nan), values / weight)


def _along_axes(array: Floats, at: Box, rescale: Rescale, box: Box) -> Floats:
    for axis in range(box.ndim):
        if rescale.source[axis] == rescale.target[axis]:
            array = array[(slice(None),) * (axis + 1) + (box.slices(at.start)[axis],)]
            continue
        index, weight = _taps(rescale, axis, box.start[axis], box.stop[axis])
        shape = [1] * array.ndim
        shape[axis + 1] = -1
        total: Floats | None = None
        for tap in range(index.shape[0]):
            part = np.take(array, index[tap] - at.start[axis], axis=axis + 1) * weight[tap].reshape(shape)
            total = part if total is None else total + part
        assert total is not None
        array = total
    return array


def _taps(rescale: Rescale, axis: int, start: int, stop: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Source index and weight of every tap of target pixels start to stop: two arrays (taps, stop - start)."""
    source, target = rescale.source[axis], rescale.target[axis]
    t = np.arange(start, stop, dtype=np.int64)
    first = np.array([rescale.first_tap(axis, int(i)) for i in t], dtype=np.int64)
    index = first[None, :] + np.arange(rescale.taps(axis))[:, None]
    centre = (t + 0.5) * (source / target) - 0.5
    radius = max(1.0, source / target)
    weight = np.clip(1 - np.abs(index - centre) / radius, 0, None)
    weight[(index < 0) | (index >= source)] = 0
    weight /= weight.sum(axis=0)
    # A tap outside has no weight; it may point anywhere inside what is at hand.
    low = np.clip(first, 0, source - 1).min(initial=source - 1)
    high = np.clip(first + rescale.taps(axis) - 1, 0, source - 1).max(initial=0)
    return np.clip(index, low, high).astype(np.intp), weight.astype(np.float32)
