"""Laws 2, 3 and 6: what comes out of tiles is what comes out of the whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import card, save_local_unet
from hypothesis import given
from hypothesis import strategies as st

from segcore.box import Box
from segcore.errors import MemoryShortageError, ModelError
from segcore.io.memory import ArrayScene
from segcore.model.card import Card
from segcore.model.segmenter import BoxFilter
from segcore.plan import Plan, make_plan
from segcore.scaling import Scaling
from segcore.spec import Cost, Sight, Weights, symmetric
from segcore.tile import label_tile

COST = Cost(1, 3, 100)
WEIGHTS: tuple[Weights, ...] = ("cosine", "gaussian", "constant")


def label_all(scene: ArrayScene, plan: Plan, described: Card, segmenter: BoxFilter) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of the whole scene, put together from its tiles."""
    labels = np.full(scene.grid.shape, 77, np.uint8)
    scores = np.zeros((3, *scene.grid.shape), np.float32)
    for index in plan.indices():
        tile = plan.tile(index)
        result = label_tile(tile, plan, described, scene, Scaling(()), segmenter)
        labels[tile.core.slices()] = result.labels
        scores[(slice(None), *tile.core.slices())] = result.scores
    return labels, scores


@st.composite
def scenes(draw: st.DrawFn) -> tuple[ArrayScene, tuple[int, ...]]:
    ndim = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(4, [0, 90, 40, 18][ndim])) for _ in range(ndim))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    values = rng.standard_normal((1, *shape)).astype(np.float32)
    if draw(st.booleans()):
        values[rng.random(values.shape) < 0.1] = np.nan
    lattice = shape if draw(st.booleans()) else tuple(draw(st.integers(4, n + 6)) for n in shape)
    return ArrayScene(values, "zyx"[-ndim:]), lattice


def axes_card(scene: ArrayScene, **changes: object) -> Card:
    axes = {1: "yx", 2: "yx", 3: "zyx"}[len(scene.grid.shape)]  # a card has two axes at least; one works as well
    return card(axes=axes, **changes)


@given(scenes(), st.data())
def test_exact_tiles_equal_the_whole(drawn: tuple[ArrayScene, tuple[int, ...]], data: st.DataObject) -> None:
    scene, lattice = drawn
    ndim = len(lattice)
    stride = (data.draw(st.sampled_from([1, 2])),) * ndim
    described = axes_card(scene, padding=data.draw(st.sampled_from(["symmetric", "edge", "zero"])))
    core = tuple(data.draw(st.integers(3, 30)) for _ in range(ndim))
    whole = make_plan(scene.grid, lattice, Sight(stride, symmetric((3,) * ndim)), COST, 2**40, core=scene.grid.shape)
    tiled = make_plan(scene.grid, lattice, Sight(stride, symmetric((3,) * ndim)), COST, 2**40, core=core)
    expected, got = (label_all(scene, plan, described, BoxFilter(3)) for plan in (whole, tiled))
    assert np.array_equal(expected[0], got[0])
    assert np.array_equal(expected[1], got[1], equal_nan=True)
    assert np.array_equal(got[0] == 255, np.isnan(scene.array[0]))


def test_a_halo_that_is_too_small_is_noticed() -> None:
    scene = ArrayScene(np.random.default_rng(0).standard_normal((1, 40, 40)).astype(np.float32), "yx")
    results = []
    for core in ((40, 40), (10, 10)):
        plan = make_plan(scene.grid, (40, 40), Sight((1, 1), symmetric((2, 2))), COST, 2**40, core=core)
        results.append(label_all(scene, plan, card(), BoxFilter(3))[1])
    assert np.abs(results[0] - results[1]).max() > 1e-3


@given(scenes(), st.data())
def test_blended_tiles_do_not_depend_on_the_tiling(
    drawn: tuple[ArrayScene, tuple[int, ...]], data: st.DataObject
) -> None:
    scene, lattice = drawn
    ndim = len(lattice)
    step, overlap = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 5))
    window, weights = 2 * step + 2 * overlap, data.draw(st.sampled_from(WEIGHTS))
    sight = Sight((1,) * ndim, None, (window,) * ndim, (2 * overlap,) * ndim, weights=weights)
    described = axes_card(scene, padding=data.draw(st.sampled_from(["symmetric", "edge", "zero"])))
    results = []
    for core in (scene.grid.shape, tuple(data.draw(st.integers(2, 20)) for _ in range(ndim))):
        plan = make_plan(scene.grid, lattice, sight, COST, 2**40, core=core)
        for batch in (1, 3):
            segmenter = BoxFilter(2)
            segmenter.batch = batch
            results.append(label_all(scene, plan, described, segmenter))
    for labels, scores in results[1:]:
        assert np.array_equal(labels, results[0][0])
        assert np.array_equal(scores, results[0][1], equal_nan=True)


class Ones(BoxFilter):
    """Scores that are one everywhere."""

    def __call__(self, batch: np.ndarray, wanted: Box | None = None) -> np.ndarray:
        return np.ones((len(batch), self.classes, *batch.shape[2:]), np.float32)


@given(st.integers(1, 3), st.integers(1, 50), st.integers(1, 12), st.integers(0, 6), st.sampled_from(WEIGHTS))
def test_weights_are_a_partition_of_unity(ndim: int, n: int, step: int, overlap: int, weights: Weights) -> None:
    shape = (n,) * ndim if ndim < 3 else (min(n, 14),) * 3
    scene = ArrayScene(np.zeros((1, *shape), np.float32), "zyx"[-ndim:])
    sight = Sight((1,) * ndim, None, (step + overlap,) * ndim, (overlap,) * ndim, weights=weights)
    plan = make_plan(scene.grid, shape, sight, COST, 2**40, core=(max(2, n // 2),) * ndim)
    _, scores = label_all(scene, plan, axes_card(scene), Ones(0))
    assert np.all(scores == 1)


def test_windows_are_padded_by_mirroring_the_scene_not_the_tile() -> None:
    """The network must see numpy's symmetric padding of the whole scene, whatever the tile."""
    shape, window = (13, 9), (8, 8)
    scene = ArrayScene(np.arange(117, dtype=np.float32).reshape(1, *shape), "yx")
    sight = Sight((1, 1), None, window, (2, 2))
    plan = make_plan(scene.grid, shape, sight, COST, 2**40, core=(5, 4))
    padded = np.pad(scene.array[0], ((0, 20), (0, 20)), mode="symmetric")
    seen: list[np.ndarray] = []

    class Spy(Ones):
        def __call__(self, batch: np.ndarray, wanted: Box | None = None) -> np.ndarray:
            seen.extend(batch[:, 0])
            return super().__call__(batch, wanted)

    for index in plan.indices():
        tile = plan.tile(index)
        seen.clear()
        label_tile(tile, plan, card(), scene, Scaling(()), Spy(0))
        for box, image in zip(tile.windows, seen, strict=True):
            assert np.array_equal(image, padded[box.slices()])


def test_tiles_without_a_valid_pixel_are_not_inferred() -> None:
    values = np.full((1, 20, 20), np.nan, np.float32)
    values[0, :5, :5] = 1
    scene, called = ArrayScene(values, "yx"), []

    class Counting(BoxFilter):
        def __call__(self, batch: np.ndarray, wanted: Box | None = None) -> np.ndarray:
            called.append(len(batch))
            return super().__call__(batch, wanted)

    plan = make_plan(scene.grid, (20, 20), Sight((1, 1), symmetric((3, 3))), COST, 2**40, core=(10, 10))
    labels, scores = label_all(scene, plan, card(), Counting(3))
    assert called == [1]
    assert np.array_equal(labels != 255, ~np.isnan(values[0]))
    assert np.array_equal(np.isnan(scores[0]), np.isnan(values[0]))


def test_a_network_that_breaks_its_promise_is_named() -> None:
    scene = ArrayScene(np.zeros((1, 8, 8), np.float32), "yx")
    plan = make_plan(scene.grid, (8, 8), Sight((1, 1), symmetric((3, 3))), COST, 2**40)
    with pytest.raises(ModelError, match="3 classes"):
        label_tile(plan.tile((0, 0)), plan, card(), scene, Scaling(()), BoxFilter(3, classes=2))

    class Broken(BoxFilter):
        def __call__(self, batch: np.ndarray, wanted: Box | None = None) -> np.ndarray:
            return super().__call__(batch, wanted) * np.float32(np.nan)

    with pytest.raises(ModelError, match="NaN"):
        label_tile(plan.tile((0, 0)), plan, card(), scene, Scaling(()), Broken(3))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_activations(activation: str) -> None:
    scene = ArrayScene(np.linspace(-3, 3, 64, dtype=np.float32).reshape(1, 8, 8), "yx")
    plan = make_plan(scene.grid, (8, 8), Sight((1, 1), symmetric((0, 0))), COST, 2**40)
    result = label_tile(plan.tile((0, 0)), plan, card(activation=activation), scene, Scaling(()), BoxFilter(0))
    raw = -np.abs(scene.array - np.array([-1, 0, 1], np.float32).reshape(3, 1, 1))
    expected = {
        "none": raw,
        "softmax": np.exp(raw) / np.exp(raw).sum(axis=0),
        "sigmoid": 1 / (1 + np.exp(-raw)),
    }[activation]
    assert np.allclose(result.scores, expected, atol=1e-6)
    assert np.array_equal(result.labels, expected.argmax(axis=0))
    assert result.valid == 64
    assert Box.of((8, 8)).size == 64


class Cramped(BoxFilter):
    """A device that has room for two windows at a time, though it likes to get eight."""

    batch = 8

    def __init__(self) -> None:
        super().__init__(reach=3)
        self.sizes: list[int] = []

    def __call__(self, batch: np.ndarray, wanted: Box | None = None) -> np.ndarray:
        self.sizes.append(len(batch))
        if len(batch) > 2:
            raise MemoryShortageError("out of memory")
        return super().__call__(batch, wanted)


def test_a_batch_that_does_not_fit_in_memory_is_halved() -> None:
    scene = ArrayScene(np.random.default_rng(0).random((1, 60, 60), np.float32), "yx")
    blended = card(local=False, reach=None, window=[16, 16], overlap=[8, 8])
    plan = make_plan(scene.grid, scene.grid.shape, blended.sight(), blended.cost(), 2**40)
    tile = plan.tile((0, 0))
    roomy = label_tile(tile, plan, blended, scene, Scaling(()), BoxFilter(reach=3))
    device = Cramped()
    cramped = label_tile(tile, plan, blended, scene, Scaling(()), device)
    assert np.array_equal(roomy.labels, cramped.labels)
    assert np.array_equal(roomy.scores, cramped.scores)
    assert max(device.sizes[1:]) <= 4, "what did not fit once is not tried again and again"


def test_engines_say_when_memory_is_out(tmp_path: Path) -> None:
    """In a process that may take little more than it has."""
    model = save_local_unet(tmp_path / "unet", "yx", width=32)
    script = f"""
import resource, sys
import numpy as np
from segcore.errors import MemoryShortageError
from segcore.model.onnx import OnnxSegmenter
from pathlib import Path
network = OnnxSegmenter(Path({str(model / "unet.onnx")!r}), 1)
image = np.zeros((1, 1, 2048, 2048), np.float32)
held = int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20,) * 2)
try:
    network(image)
except MemoryShortageError as error:
    sys.exit(0)
sys.exit("it did not say so")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
