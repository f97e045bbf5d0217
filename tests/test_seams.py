"""Tiles of real networks on real scenes: they say what the whole says; and what to do where that costs too much."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio
import torch
from conftest import as_if_trained, draft
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.box import Box
from segcore.errors import PlanError, ProductError
from segcore.execute import Workers
from segcore.io import product_name
from segcore.io.memory import ArrayScene
from segcore.model import load_segmenter
from segcore.model.card import Card, check_card, load_card
from segcore.model.pack import pack
from segcore.model.segmenter import BoxFilter, Segmenter
from segcore.model.torch import TorchSegmenter
from segcore.model.unet import UNet
from segcore.plan import Plan, make_plan
from segcore.scaling import Scaling
from segcore.scene import Outcome, check_seams, segment_scene
from segcore.seams import _pieces, _places, measure_halo, report_seams
from segcore.spec import Cost, Job, Settings, Sight, symmetric
from segcore.survey import survey
from segcore.tile import Labeller

COST = Cost(1, 3, 100)


def label(scene: Path, model: Path | str, out: Path, workers: Workers, **settings: object) -> tuple[Outcome, Path]:
    job = Job(product_name(str(scene)), str(scene), str(model), str(out), Settings(**settings))
    outcome = segment_scene(job, workers)
    return outcome, Path(outcome.product)


def arrays(manifest: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (*spatial) and scores (K, *spatial) of a product."""
    stem = str(manifest.with_suffix(""))
    if Path(f"{stem}_mask.tif").exists():
        with rasterio.open(f"{stem}_mask.tif") as mask, rasterio.open(f"{stem}_scores.tif") as scores:
            return mask.read(1), scores.read()
    scores = np.asarray(nib.load(f"{stem}_scores.nii.gz").dataobj)
    return np.asarray(nib.load(f"{stem}_mask.nii.gz").dataobj), np.moveaxis(scores, -1, 0)


def assert_same(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> None:
    """Law 2: scores within 1e-4, and the same labels wherever the two best scores are further apart than that."""
    assert np.nanmax(np.abs(one[1] - other[1])) <= 1e-4
    second, best = np.sort(one[1], axis=0)[-2:]
    assert not ((one[0] != other[0]) & (best - second > 1e-4)).any()
    assert len(np.unique(one[0])) > 1


def with_first(folder: Path, kind: str, target: Path) -> Path:
    """A copy of a model whose first artifact is of this format."""
    shutil.copytree(folder, target)
    document = json.loads((target / "card.json").read_text())
    document["artifacts"].sort(key=lambda artifact: artifact["format"] != kind)
    (target / "card.json").write_text(json.dumps(document))
    return target


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_tiles_of_a_real_raster_equal_the_whole(
    kind: str, sentinel: Path, land_unet: Path, workers: Workers, tmp_path: Path
) -> None:
    model = with_first(land_unet, kind, tmp_path / "model")
    whole, tiled = (
        label(sentinel, model, tmp_path / str(tile), workers, scores=True, tile=tile, mode="exact")
        for tile in (4000, 600)
    )
    assert (whole[0].tiles, tiled[0].tiles) == (1, 16)
    assert_same(arrays(whole[1]), arrays(tiled[1]))
    if kind == "onnx":
        assert np.array_equal(arrays(whole[1])[1], arrays(tiled[1])[1], equal_nan=True)


def test_tiles_of_a_real_volume_equal_the_whole(mni: Path, tissue_unet: Path, workers: Workers, tmp_path: Path) -> None:
    whole, tiled = (
        label(mni, tissue_unet, tmp_path / str(tile), workers, scores=True, tile=tile) for tile in (400, 100)
    )
    assert (whole[0].tiles, tiled[0].tiles) == (1, 12)
    assert_same(arrays(whole[1]), arrays(tiled[1]))


def label_array(scene: ArrayScene, plan: Plan, described: Card, segmenter: Segmenter) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of a scene in memory, put together from its tiles."""
    labeller = Labeller(plan, described, scene, Scaling(()), segmenter)
    labels, scores = np.zeros(scene.grid.shape, np.uint8), np.zeros((3, *scene.grid.shape), np.float32)
    for index in plan.indices():
        core = plan.core_box(index)
        result = labeller(plan.tile(index))
        labels[core.slices()], scores[(slice(None), *core.slices())] = result.labels, result.scores
    return labels, scores


@st.composite
def networks(draw: st.DrawFn) -> UNet:
    dims = draw(st.sampled_from([2, 2, 3]))
    poolings = draw(st.integers(0, 3 if dims == 2 else 2))
    module = UNet(
        dims=dims,
        in_channels=1,
        classes=3,
        widths=[draw(st.integers(1, 4)) for _ in range(poolings + 1)],
        convolutions=draw(st.integers(1, 2)),
        kernel=draw(st.sampled_from([3, 5] if dims == 2 else [3])),
        norm=draw(st.sampled_from(["batch", None])),
        decoder=draw(st.sampled_from(["transposed", "upsample"])),
    )
    return as_if_trained(module, draw(st.integers(0, 99)))


def card_of(module: UNet) -> Card:
    artifact = {"format": "onnx", "path": "none.onnx", "sha256": "0" * 64}
    fields = {"artifacts": [artifact], "stride": module.stride, "local": True, "reach": module.reach}
    return check_card(draft("zyx"[-module.dims :], ("c",)) | fields, "the test")


@settings(max_examples=40)
@given(networks(), st.data())
def test_tiles_of_random_networks_equal_the_whole(module: UNet, data: st.DataObject) -> None:
    low, high = (20, 150) if module.dims == 2 else (12, 50)
    shape = tuple(data.draw(st.integers(low, high)) for _ in range(module.dims))
    core = tuple(data.draw(st.integers(low // 2, high // 2)) for _ in range(module.dims))
    values = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((1, *shape)).astype(np.float32)
    scene, described, segmenter = ArrayScene(values, "zyx"[-module.dims :]), card_of(module), TorchSegmenter(module, 2)
    plans = [make_plan(scene.grid, shape, described.sight(), COST, 2**40, core=side) for side in (shape, core)]
    whole, tiled = (label_array(scene, plan, described, segmenter) for plan in plans)
    assert np.abs(whole[1] - tiled[1]).max() <= 1e-4
    second, best = np.sort(whole[1], axis=0)[-2:]
    assert not ((whole[0] != tiled[0]) & (best - second > 1e-4)).any()


@pytest.mark.parametrize(("dims", "poolings"), [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("decoder", ["transposed", "upsample"])
def test_a_halo_one_stride_too_small_is_noticed(dims: int, poolings: int, decoder: str) -> None:
    """So the tests above can fail: what lies in the last stride of the halo does change scores."""
    module = UNet(dims=dims, in_channels=1, classes=3, widths=[3] * (poolings + 1), norm=None, decoder=decoder)
    for parameter in as_if_trained(module).parameters():
        parameter.data.abs_()  # nothing cancels, nothing is cut off: whatever is seen is passed on
    described, segmenter = card_of(module), TorchSegmenter(module, 2)
    described = described.model_copy(update={"activation": "none"})
    sight = described.sight()
    (before, _), stride = sight.halo[0], sight.stride[0]
    # Two tiles along the first axis, and a bright cell at the far end of the second one's halo.
    core = before + stride
    shape = (2 * core, *(2 * stride,) * (dims - 1))
    values = np.zeros((1, *shape), np.float32)
    values[0, core - before : core - before + stride] = 1000
    scene = ArrayScene(values, "zyx"[-dims:])
    plan = make_plan(scene.grid, shape, sight, COST, 2**40, core=(core, *shape[1:]))
    whole = make_plan(scene.grid, shape, sight, COST, 2**40, core=shape)
    short = plan.with_halo(symmetric(before - stride for _ in range(dims)))
    expected, good, bad = (label_array(scene, p, described, segmenter)[1] for p in (whole, plan, short))
    scale = np.abs(expected).max()
    assert np.abs(good - expected).max() <= 1e-4 * scale
    assert np.abs(bad - expected).max() > np.abs(good - expected).max()
    assert (bad != expected)[:, core : core + stride].any()
    assert (good == expected)[:, core : core + stride].mean() > 0.99


def boxed(values: np.ndarray, core: tuple[int, ...], reach: int, said: int) -> Labeller:
    """A scene under a filter of some reach, and a plan that was told another."""
    axes = "zyx"[-(values.ndim - 1) :]
    scene = ArrayScene(values, axes)
    described = check_card(
        draft("yx", ("c",)) | {"artifacts": [{"format": "onnx", "path": "a.onnx", "sha256": "0" * 64}],
                               "stride": [1, 1], "local": True, "reach": [said, said], "activation": "none"}, "the test"
    )  # fmt: skip
    plan = make_plan(scene.grid, scene.grid.shape, described.sight(), COST, 2**40, core=core)
    return Labeller(plan, described, scene, Scaling(()), BoxFilter(reach))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_the_seam_report_counts_what_borders_change() -> None:
    good = boxed(20 * noise(1, 300, 300), (100, 100), reach=5, said=5)
    mask, _ = label_array(good.source, good.plan, good.card, good.segmenter)
    report = report_seams(good, lambda box: mask[box.slices()])
    assert (report.labels, report.decided, report.change) == (0, 0, 0)
    assert report.clean
    assert report.places == 8
    bad = boxed(20 * noise(1, 300, 300), (100, 100), reach=5, said=2)
    mask, _ = label_array(bad.source, bad.plan, bad.card, bad.segmenter)
    report = report_seams(bad, lambda box: mask[box.slices()])
    assert report.change > 1e-3
    assert report.labels > 0
    assert not report.clean
    empty = boxed(np.full((1, 300, 300), np.nan, np.float32), (100, 100), 5, 5)
    assert report_seams(empty, lambda box: np.full(box.shape, 255, np.uint8)).places == 0


def test_a_border_on_a_small_island_is_found() -> None:
    values = np.full((1, 3000, 3000), np.nan, np.float32)
    values[0, 1230:1330, 1400:1500] = 20 * noise(100, 100)
    labeller = boxed(values, (256, 256), reach=5, said=2)
    mask, _ = label_array(labeller.source, labeller.plan, labeller.card, labeller.segmenter)
    report = report_seams(labeller, lambda box: mask[box.slices()])
    assert report.places > 0
    assert report.labels > 0


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 120))
def test_places_lie_in_the_scene_and_pieces_fill_them(height: int, width: int, core: int) -> None:
    plan = boxed(np.zeros((1, height, width), np.float32), (core, core), 3, 3).plan
    for box in list(_places(plan))[:20]:
        assert box in plan.grid.box
        hits = np.zeros(box.shape, int)
        for piece in _pieces(box, plan):
            hits[piece.slices(box.start)] += 1
            for index_start, index_stop, side in zip(piece.start, piece.stop, plan.core, strict=True):
                assert index_start // side == (index_stop - 1) // side
        assert (hits == 1).all()


@pytest.mark.parametrize(("tolerance", "least", "most"), [(1e-9, 30, 30), (1e-2, 1, 29), (0.9, 0, 3)])
def test_the_shortest_halo_that_will_do(tolerance: float, least: int, most: int) -> None:
    """A filter of 61 pixels, whose ends weigh as much as its middle: what is cut off shows."""
    labeller = boxed(noise(1, 400, 400), (200, 200), reach=30, said=30)
    found = measure_halo(labeller, tolerance)
    ((before, after), _) = found.halo
    assert before == after
    assert least <= before <= most
    assert found.change <= tolerance
    assert found.reach == symmetric((30, 30))
    assert before == 0 or (found.shorter is not None and found.shorter > tolerance)
    shorter = replace(labeller, plan=labeller.plan.with_halo(found.halo))
    (whole, tiled) = (label_array(one.source, one.plan, one.card, one.segmenter)[1] for one in (labeller, shorter))
    assert np.abs(whole - tiled).max() <= 3 * tolerance


class OneSided(BoxFilter):
    """Sees 7 pixels before and none after, along every axis."""

    def __call__(self, batch: np.ndarray, wanted: Box | None = None) -> np.ndarray:
        for axis in (2, 3):
            padding = [(7, 0) if i == axis else (0, 0) for i in range(4)]
            padded, n = np.pad(batch, padding), batch.shape[axis]
            batch = sum(np.take(padded, range(k, k + n), axis=axis) for k in range(8)).astype(np.float32)
        return np.concatenate([batch, -batch, 0 * batch], axis=1)


@pytest.mark.parametrize(("reach", "same"), [(((7, 0), (7, 0)), True), (((0, 7), (0, 7)), False)])
def test_sides_are_not_mixed_up(reach: tuple, same: bool) -> None:
    scene = ArrayScene(noise(1, 90, 80), "yx")
    described = boxed(scene.array, (90, 80), 0, 0).card
    sight = Sight((1, 1), reach)
    plans = [make_plan(scene.grid, scene.grid.shape, sight, COST, 2**40, core=core) for core in ((90, 80), (20, 30))]
    whole, tiled = (label_array(scene, plan, described, OneSided(0))[1] for plan in plans)
    assert np.array_equal(whole, tiled) == same


def test_a_scene_without_valid_pixels_keeps_the_whole_reach() -> None:
    labeller = boxed(np.full((1, 100, 100), np.nan, np.float32), (50, 50), 5, 5)
    assert measure_halo(labeller, 0.1).halo == symmetric((5, 5))


def test_a_measured_halo_is_shorter_stated_and_kept(
    sentinel: Path, land_unet: Path, workers: Workers, tmp_path: Path
) -> None:
    whole = label(sentinel, land_unet, tmp_path / "whole", workers, scores=True)
    outcome, manifest = label(sentinel, land_unet, tmp_path / "out", workers, scores=True, tile=500, tolerance=1e-3)
    made = json.loads(manifest.read_text())["properties"]
    measured = made["segflow:measured_halo"]
    assert made["segflow:plan"]["mode"] == "measured"
    assert made["segflow:plan"]["halo"] == measured["halo"]
    assert measured["halo"][0][0] < 96
    assert measured["reach"] == [[94, 94], [94, 94]]
    assert measured["change"] <= measured["tolerance"] == 1e-3
    assert measured["places"] > 3
    one, other = arrays(whole[1]), arrays(manifest)
    assert np.nanmax(np.abs(one[1] - other[1])) <= 5e-3
    assert (one[0] != other[0]).mean() < 1e-3
    assert check_seams(manifest).clean
    again = label(sentinel, land_unet, tmp_path / "out", workers, scores=True, tile=500, tolerance=1e-3)
    assert again[0].state == "up to date"
    assert outcome.state == "done"


def test_a_measured_run_that_was_killed_ends_with_the_same_bytes(
    sentinel: Path, land_unet: Path, workers: Workers, tmp_path: Path
) -> None:
    settings = {"tile": 500, "tolerance": 1e-3}
    _, manifest = label(sentinel, land_unet, tmp_path / "whole", workers, **settings)
    job = Job(
        product_name(str(sentinel)), str(sentinel), str(land_unet), str(tmp_path / "killed"), Settings(**settings)
    )
    done: list[int] = []

    class KilledError(Exception):
        pass

    def kill(name: str, tiles: int, total: int) -> None:
        done.append(tiles)
        if tiles >= 5:
            raise KilledError

    with pytest.raises(KilledError):
        segment_scene(job, workers, kill)
    (kept,) = (tmp_path / "killed").glob(".segflow/*/*/halo.json")
    halo = json.loads(kept.read_text())
    outcome = segment_scene(job, workers)
    assert outcome.tiles_kept >= 5
    again = Path(outcome.product)
    assert json.loads(again.read_text())["properties"]["segflow:measured_halo"] == halo
    masks = [path.with_name(f"{path.stem}_mask.tif").read_bytes() for path in (manifest, again)]
    assert masks[0] == masks[1]


def test_the_check_finds_labels_that_are_not_the_networks(
    landsat: Path, land_unet: Path, workers: Workers, tmp_path: Path
) -> None:
    _, manifest = label(landsat, land_unet, tmp_path, workers, tile=200)
    mask = manifest.with_name(f"{manifest.stem}_mask.tif")
    with rasterio.open(mask, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
        file.write(np.where(file.read(1) == 255, 255, 1).astype(np.uint8), 1)
    report = check_seams(manifest)
    assert report.decided > 0
    assert report.change == 0
    assert not report.clean


def test_a_network_that_saw_the_whole_scene_has_no_borders_to_check(
    head: Path, workers: Workers, tmp_path: Path
) -> None:
    _, manifest = label(head, "deepbet", tmp_path, workers)
    report = check_seams(manifest)
    assert report.places == 0
    assert report.clean


def test_a_tolerance_needs_a_local_network(landsat: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--tolerance needs a local network"):
        survey(Job("a", str(landsat), "ukis-csmask-6b-l1c", str(tmp_path), Settings(tolerance=1e-3)))


def test_products_pass_the_seam_check(
    landsat: Path, mni: Path, land_unet: Path, tissue_unet: Path, workers: Workers, tmp_path: Path
) -> None:
    for scene, model, tile in (
        (landsat, land_unet, 200),
        (landsat, "ukis-csmask-6b-l1c", 200),
        (landsat, land_unet, 5000),
        (mni, tissue_unet, 100),
    ):
        _, manifest = label(scene, model, tmp_path / f"{Path(model).name}-{tile}", workers, tile=tile)
        report = check_seams(manifest)
        assert (report.labels, report.change) == (0, 0)
        assert report.pixels > 5000


def test_the_command_checks_products(
    landsat: Path, land_unet: Path, workers: Workers, tmp_path: Path,
    run_segflow: Callable[..., subprocess.CompletedProcess[str]],
) -> None:  # fmt: skip
    _, manifest = label(landsat, land_unet, tmp_path / "out", workers, tile=200)
    done = run_segflow("check", manifest.parent, "--seams", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seams"]["labels"] == 0
    mask = manifest.with_name(f"{manifest.stem}_mask.tif")
    content = bytearray(mask.read_bytes())
    content[-1] ^= 255
    mask.write_bytes(content)
    done = run_segflow("check", manifest.parent)
    assert done.returncode == 1
    assert "differs from its checksum" in done.stdout
    mask.unlink()
    assert "No such file" in run_segflow("check", manifest).stdout
    assert run_segflow("check", tmp_path).returncode == 2


def test_a_model_that_changed_is_named_by_the_check(
    landsat: Path, land_unet: Path, workers: Workers, tmp_path: Path
) -> None:
    model = with_first(land_unet, "onnx", tmp_path / "model")
    _, manifest = label(landsat, model, tmp_path / "out", workers)
    document = json.loads((model / "card.json").read_text()) | {"version": "2"}
    (model / "card.json").write_text(json.dumps(document))
    with pytest.raises(ProductError, match="has changed since"):
        check_seams(manifest)


def test_blending_agrees_with_monais_sliding_window(tmp_path: Path) -> None:
    """The same windows, weights and overlap, but where MONAI shifts its last windows back to the border."""
    inferers = pytest.importorskip("monai.inferers")
    module = as_if_trained(UNet(dims=2, in_channels=1, classes=3, widths=[4, 4, 4], norm="instance"))
    pack(module, draft(channels=("c",), window=[64, 64], overlap=[16, 16], activation="none"), tmp_path / "model")
    model = load_card(str(tmp_path / "model"))
    assert not model.card.local
    shape = (300, 260)
    scene = ArrayScene(noise(1, *shape), "yx")
    segmenter = load_segmenter(model, 2)
    plan = make_plan(scene.grid, shape, model.card.sight(weights="gaussian"), COST, 2**40, core=(90, 70))
    _, scores = label_array(scene, plan, model.card, segmenter)
    with torch.inference_mode():
        image = torch.from_numpy(scene.array[None])
        theirs = inferers.sliding_window_inference(image, (64, 64), 4, module, overlap=0.25, mode="gaussian")[0].numpy()
    # Both lattices are the same up to where the last window begins: at 240 and at 192 they are not.
    same = (slice(None), slice(0, 236), slice(0, 192))
    assert np.abs(scores[same] - theirs[same]).max() <= 1e-4 * np.abs(theirs).max()
    assert np.abs(scores - theirs).max() > 1e-3 * np.abs(theirs).max()


def test_a_network_that_is_not_local_may_see_the_whole_scene(tmp_path: Path) -> None:
    sight = Sight((4, 4), None, (64, 64), (16, 16))
    grid = ArrayScene(np.zeros((1, 300, 260), np.float32), "yx").grid
    assert make_plan(grid, grid.shape, sight, COST, 2**40).mode == "blend"
    assert len(make_plan(grid, grid.shape, sight, COST, 2**40, mode="exact")) == 1
