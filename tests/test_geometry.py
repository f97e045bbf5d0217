"""Laws of boxes and lattices, in one to three dimensions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from segcore.box import Box
from segcore.grid import Grid, Rescale, mirrored
from segcore.resample import interpolate


@st.composite
def boxes(draw: st.DrawFn, ndim: int | None = None, low: int = -40, high: int = 60) -> Box:
    ndim = ndim or draw(st.integers(1, 3))
    pairs = [sorted(draw(st.tuples(st.integers(low, high), st.integers(low, high)))) for _ in range(ndim)]
    return Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


@given(st.data())
def test_intersection_and_hull(data: st.DataObject) -> None:
    ndim = data.draw(st.integers(1, 3))
    a, b = data.draw(boxes(ndim)), data.draw(boxes(ndim))
    assert (a & b) in a
    assert (a & b) in b
    assert a in (a | b)
    assert (a & b) == (b & a) or (a & b).size == 0
    points = lambda box: set(np.ndindex(*box.shape)) if box.size < 500 else None  # noqa: E731
    if points(a) is not None:
        shared = {p for p in points(a) if all(0 <= a.start[i] + p[i] - b.start[i] < b.shape[i] for i in range(ndim))}
        assert len(shared) == (a & b).size


@given(boxes(), st.integers(1, 9))
def test_snap_is_the_smallest_aligned_hull(box: Box, stride: int) -> None:
    snapped = box.snap((stride,) * box.ndim)
    assert box in snapped
    assert all(n % stride == 0 for n in (*snapped.start, *snapped.stop))
    assert all(a - s < stride and e - b < stride for a, s, b, e in
               zip(box.start, snapped.start, box.stop, snapped.stop, strict=True))  # fmt: skip


def test_broken_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match="stop before"):
        Box((3,), (2,))
    with pytest.raises(ValueError, match="as many"):
        Box((1, 2), (3,))
    with pytest.raises(ValueError, match="a pixel on every axis"):
        Grid("yx", (0, 4))


@given(st.integers(1, 30), st.integers(0, 29), st.integers(1, 90))
def test_mirrored_holds_every_pixel_that_padding_shows(n: int, start: int, length: int) -> None:
    assume(start < n)
    window = Box((start,), (start + length,))
    shown = {min(i % (2 * n), 2 * n - 1 - i % (2 * n)) for i in range(start, start + length)}
    seen = mirrored(window, (n,))
    assert seen in Box.of((n,))
    assert shown <= set(range(seen.start[0], seen.stop[0]))


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_support_is_what_interpolation_touches(source: int, target: int, data: st.DataObject) -> None:
    rescale = Rescale((source,), (target,))
    a = data.draw(st.integers(0, target - 1))
    b = data.draw(st.integers(a + 1, target))
    box = Box((a,), (b,))
    support = rescale.support(box)
    assert support in Box.of((source,))
    values = np.random.default_rng(source * 41 + target).standard_normal((1, source)).astype(np.float32)
    whole = interpolate(values, Box.of((source,)), rescale, Box.of((target,)))
    part = interpolate(values[:, support.slices()[0]], support, rescale, box)
    assert np.array_equal(part, whole[:, a:b])
    # Pixels outside the support have no say.
    other = np.where((np.arange(source) >= support.start[0]) & (np.arange(source) < support.stop[0]), values, 1e9)
    assert np.array_equal(interpolate(other.astype(np.float32), Box.of((source,)), rescale, box), part)


@given(st.integers(1, 30), st.integers(1, 30), st.floats(-5, 5, width=32))
def test_interpolation_keeps_constants_and_ramps(source: int, target: int, value: float) -> None:
    rescale = Rescale((source,), (target,))
    constant = np.full((1, source), value, np.float32)
    out = interpolate(constant, Box.of((source,)), rescale, Box.of((target,)))
    assert np.allclose(out, value, rtol=1e-6, atol=1e-6)
    if target >= source > 2:
        ramp = np.arange(source, dtype=np.float32)[None]
        centres = (np.arange(target) + 0.5) * source / target - 0.5
        inner = (centres >= 0) & (centres <= source - 1)
        out = interpolate(ramp, Box.of((source,)), rescale, Box.of((target,)))
        assert np.allclose(out[0, inner], centres[inner], atol=1e-4)


def test_invalid_pixels_do_not_bleed() -> None:
    values = np.array([[1, 1, np.nan, np.nan, 1, 1, 1, 1]], np.float32)
    out = interpolate(values, Box.of((8,)), Rescale((8,), (16,)), Box.of((16,)))
    assert np.array_equal(np.isnan(out[0]), [i in (4, 5, 6, 7) for i in range(16)])
    assert np.all(out[~np.isnan(out)] == 1)


@given(boxes(), st.integers(-9, 9))
def test_shifting_keeps_the_shape_and_goes_back(box: Box, offset: int) -> None:
    by = (offset,) * box.ndim
    assert box.shift(by).shape == box.shape
    assert box.shift(by).shift([-o for o in by]) == box
