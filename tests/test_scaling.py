"""Law 4: statistics come from the whole scene, once."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import card
from hypothesis import given
from hypothesis import strategies as st

from segcore.errors import SceneError
from segcore.io.memory import ArrayScene
from segcore.model.card import Affine, ClipPercentiles, Fill, Standardise
from segcore.scaling import Scaling, fit_scaling


def test_steps_agree_with_numpy() -> None:
    rng = np.random.default_rng(1)
    values = (rng.gamma(2, 300, (2, 30, 40, 20)) - 50).astype(np.float32)
    values[:, rng.random((30, 40, 20)) < 0.2] = np.nan
    scene = ArrayScene(values, "zyx")
    steps = (
        Fill(value=0.0),
        ClipPercentiles(lower=0.5, upper=99.5),
        Standardise(),
        Affine(scale=0.226, offset=(0.449, 0.5)),
    )
    scaling = fit_scaling(steps, scene)
    low, high = (np.nanpercentile(values, q, axis=(1, 2, 3), keepdims=True) for q in (0.5, 99.5))
    clipped = np.clip(values, low, high).astype(np.float64)
    mean, deviation = (f(clipped, axis=(1, 2, 3), keepdims=True) for f in (np.nanmean, np.nanstd))
    offset = np.array([0.449, 0.5]).reshape(2, 1, 1, 1)
    expected = (np.clip(np.nan_to_num(values), low, high) - mean) / deviation * 0.226 + offset
    scaling(values)
    assert np.abs(values - expected).max() < 1e-5
    assert Scaling.from_json(scaling.to_json()) == scaling


KINDS = ["normal", "integers", "outlier", "huge", "narrow", "two"]


@given(st.integers(1, 400), st.integers(0, 2**20), st.sampled_from(KINDS), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(n: int, seed: int, kind: str, rank: float) -> None:
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.standard_normal(n),
        "integers": rng.integers(0, 20, n).astype(float),
        "outlier": np.append(rng.standard_normal(n), 1e6),
        "huge": np.append(rng.standard_normal(n), (3e38, -3e38, 0.0, -0.0)),
        "narrow": 1e6 + rng.integers(0, 3, n),
        "two": np.array([3.0, 7.0] * n),
    }[kind].astype(np.float32)
    scene = ArrayScene(values.reshape(1, -1, 1), "yx")
    upper = max(rank, 0.01)
    (operation,) = fit_scaling((ClipPercentiles(lower=0, upper=upper),), scene).operations
    assert operation.a[0] == values.min()
    assert operation.b[0] == pytest.approx(np.percentile(values.astype(np.float64), upper), rel=1e-12, abs=1e-12)


def test_invalid_pixels_become_zero_unless_filled() -> None:
    values = np.array([[[1, np.nan]]], np.float32)
    scene, filled = ArrayScene(values, "yx"), values.copy()
    fit_scaling((Fill(value=2.0), Affine(offset=5.0)), scene)(filled)
    assert filled.tolist() == [[[6, 7]]]
    fit_scaling((Affine(offset=5.0),), scene)(values)
    assert values.tolist() == [[[6, 0]]]


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "no valid pixel in channel 1 of 1"), (4.0, "deviation, which is zero")]
)
def test_scenes_without_statistics_are_refused(value: float, words: str) -> None:
    scene = ArrayScene(np.full((1, 5, 5), value, np.float32), "yx")
    with pytest.raises(SceneError, match=words):
        fit_scaling((Standardise(),), scene)


def test_steps_that_need_no_statistics_read_nothing() -> None:
    class Unread(ArrayScene):
        def read(self, box: object) -> np.ndarray:
            raise AssertionError("read")

    scene = Unread(np.zeros((1, 4, 4), np.float32), "yx")
    fit_scaling((Fill(value=0.0), Affine(scale=2.0)), scene)
    assert card().scaling == ()
