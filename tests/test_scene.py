"""One scene from job to product: real engine, small real network."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pystac
import pytest
import rasterio
from conftest import save_local_unet, segflow_command
from rasterio.transform import from_origin

from segcore.errors import LateError, ModelError, PlanError, ProductError, SceneError
from segcore.execute import Workers
from segcore.files import sha256_of
from segcore.io import product_name
from segcore.scene import Deadlines, segment_scene
from segcore.spec import Job, Settings
from segcore.survey import HIDDEN, survey

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_local_unet(tmp_path / "unet", "yx", ("red", "nir")))


@pytest.fixture
def raster(tmp_path: Path) -> Path:
    """A raster with every trouble of a real one: odd size, nodata corner, names in another order."""
    values = np.random.default_rng(4).integers(1, 3000, (3, 611, 497)).astype(np.uint16)
    values[:, :90, :130] = 0
    path = tmp_path / "scene 1.tif"
    with rasterio.open(path, "w", driver="GTiff", count=3, height=611, width=497, dtype="uint16", nodata=0,
                       crs="EPSG:32616", transform=from_origin(452475, 3408645, 30, 30)) as file:  # fmt: skip
        file.write(values)
        for i, name in enumerate(("nir", "blue", "red"), start=1):
            file.set_band_description(i, name)
        file.update_tags(ns="IMAGERY", ACQUISITIONDATETIME="2021-02-03 04:05:06")
    return path


def job(scene: Path, model: str, out: Path, **settings: Any) -> Job:
    return Job(product_name(str(scene)), str(scene), model, str(out), Settings(**settings))


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.suffix != ".json"}


def test_a_product_has_all_its_parts(tmp_path: Path, raster: Path, model: str, workers: Workers) -> None:
    seen: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    outcome = segment_scene(job(raster, model, out, tile=200, scores=True), workers, lambda *args: seen.append(args))
    assert (outcome.state, outcome.name, outcome.tiles) == ("done", "scene_1", 12)
    assert seen[0] == ("scene_1", 0, 12)
    assert seen[-1] == ("scene_1", 12, 12)
    folder = out / "scene_1"
    assert {path.name for path in out.iterdir()} == {"scene_1"}
    assert {path.name for path in folder.iterdir()} == {
        "scene_1.json", "scene_1_mask.tif", "scene_1_mask.tif.aux.xml", "scene_1_quicklook.png", "scene_1_scores.tif"
    }  # fmt: skip
    manifest = json.loads((folder / "scene_1.json").read_text())
    facts = manifest["properties"]
    assert facts["datetime"] == "2021-02-03T04:05:06Z"
    assert facts["proj:code"] == "EPSG:32616"
    assert facts["segflow:plan"]["mode"] == "exact"
    assert facts["segflow:valid_fraction"] == pytest.approx(1 - 90 * 130 / (611 * 497), abs=1e-6)
    assert sum(share["pixels"] for share in facts["segflow:classes"]) == 611 * 497 - 90 * 130
    assert facts["segflow:classes"][0]["area_m2"] == facts["segflow:classes"][0]["pixels"] * 900
    for asset in manifest["assets"].values():
        path = folder / asset["href"]
        assert asset["file:size"] == path.stat().st_size
        assert asset["file:checksum"] == "1220" + sha256_of(path)
    west, south, east, north = manifest["bbox"]
    assert -87.6 < west < east < -87.3
    assert 30.5 < south < north < 30.9
    with rasterio.open(folder / "scene_1_mask.tif") as mask, rasterio.open(folder / "scene_1_scores.tif") as scores:
        labels, values = mask.read(1), scores.read()
    assert (labels[:90, :130] == 255).all()
    assert (labels[90:] < 3).all()
    assert np.isnan(values[:, :90, :130]).all()
    assert np.array_equal(values[:, 90:].argmax(axis=0), labels[90:])


def test_the_manifest_is_a_valid_stac_item(tmp_path: Path, raster: Path, model: str, workers: Workers) -> None:
    segment_scene(job(raster, model, tmp_path / "out"), workers)
    document = json.loads((tmp_path / "out" / "scene_1" / "scene_1.json").read_text())
    document["stac_extensions"] = []  # their schemas are on the network; the core one is in the package
    item = pystac.Item.from_dict(document)
    assert item.validate()
    assert item.assets["mask"].roles == ["data", "labels"]


def test_tiling_never_changes_a_byte(tmp_path: Path, raster: Path, model: str, workers: Workers) -> None:
    products = []
    for tile in (64, 100, 333, 1000, None):
        out = tmp_path / f"out{tile}"
        segment_scene(job(raster, model, out, tile=tile, scores=True), workers)
        products.append(files(out / "scene_1"))
    assert all(product == products[0] for product in products)


def test_a_rerun_is_up_to_date_until_something_changes(
    tmp_path: Path, raster: Path, model: str, workers: Workers
) -> None:
    out = tmp_path / "out"

    def state(**settings: Any) -> tuple[str, int]:
        outcome = segment_scene(job(raster, model, out, **settings), workers)
        return outcome.state, outcome.windows

    assert state() == ("done", 1)
    assert state() == ("up to date", 0)
    assert state(tile=100) == ("up to date", 0), "how it is tiled is no part of a product"
    assert state(scores=True)[0] == "done"
    assert (out / "scene_1" / "scene_1_scores.tif").exists()
    assert state()[0] == "done"
    assert not (out / "scene_1" / "scene_1_scores.tif").exists(), "files of an older product go"
    (out / "scene_1" / "scene_1_mask.tif").unlink()
    assert state()[0] == "done"
    (out / "scene_1" / "scene_1.json").write_text("{")
    assert state()[0] == "done"
    raster.touch()
    assert state()[0] == "done"
    card = json.loads((Path(model) / "card.json").read_text())
    (Path(model) / "card.json").write_text(json.dumps(card | {"version": "2"}))
    assert state()[0] == "done"
    assert state() == ("up to date", 0)


def test_a_failed_rerun_leaves_the_old_product(tmp_path: Path, raster: Path, model: str, workers: Workers) -> None:
    out = tmp_path / "out"
    segment_scene(job(raster, model, out), workers)
    before = files(out / "scene_1")
    with pytest.raises(PlanError):
        segment_scene(job(raster, model, out, scores=True, memory=1000), workers)
    raster.write_bytes(raster.read_bytes()[:400_000])
    with pytest.raises(SceneError):
        segment_scene(job(raster, model, out), workers)
    assert files(out / "scene_1") == before
    assert not (out / HIDDEN).exists()


def test_a_scene_in_work_is_left_alone(
    tmp_path: Path, raster: Path, model: str, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segcore.scene.LOCK_SECONDS", 0.5)
    out = tmp_path / "out"
    hidden = out / HIDDEN / "scene_1"
    hidden.mkdir(parents=True)
    descriptor = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ProductError, match="in use by another run"):
            segment_scene(job(raster, model, out), workers)
    finally:
        os.close(descriptor)
    assert segment_scene(job(raster, model, out), workers).state == "done"


def test_volumes_of_every_spacing_keep_their_grid(tmp_path: Path, workers: Workers) -> None:
    folder = save_local_unet(tmp_path / "unet", "zyx", ("T1w",))
    document = json.loads((folder / "card.json").read_text()) | {"spacing": [1.5, 1.5, 1.5], "orientation": "RAS"}
    (folder / "card.json").write_text(json.dumps(document))
    affine = np.array([[0, -0.9, 0, 10], [0, 0, 2.1, -5], [1.2, 0, 0, 3], [0, 0, 0, 1.0]])
    values = np.random.default_rng(1).random((31, 42, 17)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "scene.nii.gz")
    masks = []
    for tile in (8, 19, None):
        outcome = segment_scene(
            job(tmp_path / "scene.nii.gz", str(folder), tmp_path / f"out{tile}", tile=tile), workers
        )
        masks.append(Path(outcome.product).with_name("scene_mask.nii.gz").read_bytes())
    assert masks[0] == masks[1] == masks[2]
    mask = nib.load(Path(outcome.product).with_name("scene_mask.nii.gz"))
    assert mask.shape == values.shape
    assert np.array_equal(mask.affine, nib.load(tmp_path / "scene.nii.gz").affine)
    manifest = json.loads(Path(outcome.product).read_text())
    assert manifest["geometry"] is None
    assert manifest["properties"]["segflow:plan"]["canvas"] == [25, 24, 25]
    total = sum(share["volume_ml"] for share in manifest["properties"]["segflow:classes"])
    assert total == pytest.approx(values.size * 0.9 * 2.1 * 1.2 / 1000, rel=1e-3)


def test_a_survey_needs_no_pixel(tmp_path: Path, raster: Path, model: str) -> None:
    prospect = survey(job(raster, model, tmp_path / "out", tile=100))
    assert len(prospect.plan) == 35
    assert not (tmp_path / "out").exists()


def tiles_in(out: Path) -> int:
    """Tiles that are finished, of whatever scene."""
    return sum(path.suffix != ".partial" for path in out.glob(f"{HIDDEN}/*/*/labels/c/*/*"))


@pytest.mark.slow
def test_kill_9_loses_only_the_tiles_in_flight(tmp_path: Path, raster: Path, model: str, run_segflow: Run) -> None:
    calm = run_segflow("run", raster, "-m", model, "-o", tmp_path / "calm", "--tile", 32, "--scores")
    assert calm.returncode == 0, calm.stderr
    out = tmp_path / "out"
    command = [segflow_command(), "run", str(raster), "-m", model, "-o", str(out), "--tile", "32", "--scores"]
    kept = 0
    for least in (30, 60):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and tiles_in(out) < least:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = tiles_in(out)
        assert kept >= least
        assert not (out / "scene_1").exists()
    again = run_segflow("run", raster, "-m", model, "-o", out, "--tile", 32, "--scores", "--json")
    assert again.returncode == 0, again.stderr
    details = json.loads(again.stdout)["scenes"][0]["details"]
    assert details["tiles"] == 20 * 16
    assert kept - 8 <= details["tiles_kept"] <= kept
    assert files(out / "scene_1") == files(tmp_path / "calm" / "scene_1")
    assert {path.name for path in (out / HIDDEN).iterdir()} <= {".thumbs"}


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_tiles_whatever_memory_is_free(
    tmp_path: Path, raster: Path, model: str, workers: Workers
) -> None:
    asked = job(raster, model, tmp_path / "out")
    first = survey(job(raster, model, tmp_path / "out", tile=128))
    first.scratch_root.mkdir(parents=True)
    assert survey(asked).plan.core == (128, 128)
    shutil.rmtree(tmp_path / "out")
    assert survey(asked).plan.core == (611, 497)


@pytest.mark.slow
def test_sigterm_drains_and_can_be_resumed(tmp_path: Path, raster: Path, model: str, run_segflow: Run) -> None:
    out = tmp_path / "out"
    command = [segflow_command(), "run", str(raster), "-m", model, "-o", str(out), "--tile", "16"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while sum(1 for _ in out.glob(f"{HIDDEN}/*/*/labels/c/*/*")) < 30:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "Traceback" not in errors
    again = run_segflow("run", raster, "-m", model, "-o", out, "--tile", 16)
    assert again.returncode == 0
    assert "kept of an interrupted run" in again.stderr


def test_a_product_that_is_not_whole_is_made_again(tmp_path: Path, raster: Path, model: str, workers: Workers) -> None:
    out = tmp_path / "out"
    segment_scene(job(raster, model, out), workers)
    folder, good = out / "scene_1", files(out / "scene_1")
    manifest = json.loads((folder / "scene_1.json").read_text())
    mask = bytearray((folder / "scene_1_mask.tif").read_bytes())
    mask[-5] ^= 1
    (folder / "scene_1_mask.tif").write_bytes(mask)
    assert segment_scene(job(raster, model, out), workers).state == "done"
    for odd in ({"properties": []}, {"assets": {}}, {"assets": {"mask": None}}, {"assets": {"mask": {"href": 5}}}):
        (folder / "scene_1.json").write_text(json.dumps(manifest | odd))
        assert segment_scene(job(raster, model, out), workers).state == "done", odd
        assert files(folder) == good


def test_a_manifest_that_cannot_be_written_costs_no_product(
    tmp_path: Path, raster: Path, model: str, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    segment_scene(job(raster, model, out), workers)
    before = files(out / "scene_1")
    monkeypatch.setattr("segcore.survey.PIXEL_VERSION", float("nan"))
    monkeypatch.setattr("segcore.survey.versions", lambda *_: {"odd": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        segment_scene(job(raster, model, out), workers)
    assert files(out / "scene_1") == before
    assert (out / "scene_1" / "scene_1.json").exists()


def test_two_runs_at_once_label_a_scene_once(tmp_path: Path, raster: Path, model: str) -> None:
    out = tmp_path / "out"
    command = [
        segflow_command(),
        "run",
        str(raster),
        "-m",
        model,
        "-o",
        str(out),
        "--tile",
        "40",
        "--json",
        "--no-prefect",
    ]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [json.loads(run.communicate(timeout=120)[0]) for run in runs]
    assert [document["exit_code"] for document in ended] == [0, 0]
    assert sorted(document["scenes"][0]["state"] for document in ended) == ["done", "up to date"]


def test_what_a_run_left_that_was_killed_after_its_commit_goes(
    tmp_path: Path, raster: Path, model: str, workers: Workers
) -> None:
    wanted, left = job(raster, model, tmp_path / "out", tile=200), tmp_path / "out" / HIDDEN / "scene_1"
    segment_scene(wanted, workers)
    (left / "0123-200x200" / "labels").mkdir(parents=True)
    descriptor = os.open(left, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert segment_scene(wanted, workers).state == "up to date"
    assert (left / "0123-200x200").exists(), "another run was at work there"
    os.close(descriptor)
    assert segment_scene(wanted, workers).state == "up to date"
    assert not left.exists()


def test_a_scene_that_changes_while_it_is_labelled_is_no_product(
    tmp_path: Path, raster: Path, model: str, workers: Workers
) -> None:
    wanted = job(raster, model, tmp_path / "out", tile=200)
    with pytest.raises(SceneError, match="has changed while it was labelled") as refused:
        segment_scene(wanted, workers, lambda _, done, __: os.utime(raster, ns=(done, done)))
    assert refused.value.retryable
    assert not (tmp_path / "out" / "scene_1").exists()
    assert segment_scene(wanted, workers).tiles_kept == 0


def test_a_scene_that_is_replaced_by_less_while_it_is_labelled_is_named_as_that(
    tmp_path: Path, raster: Path, model: str, workers: Workers
) -> None:
    wanted = job(raster, model, tmp_path / "out", tile=32)
    with pytest.raises(SceneError, match="has changed while it was labelled") as refused:
        segment_scene(wanted, workers, lambda _, done, __: os.truncate(raster, 2000) if done else None)
    assert refused.value.retryable


def test_a_scene_that_is_out_of_time_keeps_its_tiles(
    tmp_path: Path, raster: Path, model: str, workers: Workers
) -> None:
    wanted = job(raster, model, tmp_path / "out", tile=32)
    with pytest.raises(LateError, match="finished tiles are kept"):
        segment_scene(wanted, workers, lambda *_: time.sleep(0.1), Deadlines(scene_seconds=3))
    assert segment_scene(wanted, workers).tiles_kept > 0


def test_a_scene_whose_storage_goes_away_keeps_its_tiles(
    tmp_path: Path, raster: Path, model: str, workers: Workers
) -> None:
    wanted, away = job(raster, model, tmp_path / "out", tile=200), tmp_path / "away"

    def unmount(_: str, done: int, total: int) -> None:
        if done == total:
            os.replace(raster, away)

    with pytest.raises(SceneError, match=r"No such file or directory.* tiles are kept") as refused:
        segment_scene(wanted, workers, unmount)
    assert refused.value.retryable
    os.replace(away, raster)
    assert segment_scene(wanted, workers).tiles_kept == 12


def test_damaged_scratch_is_begun_anew(tmp_path: Path, raster: Path, model: str, workers: Workers) -> None:
    out = tmp_path / "out"
    asked = job(raster, model, out, tile=300)
    root = survey(asked).scratch_root
    (root / "labels").mkdir(parents=True)
    (root / "labels" / "zarr.json").write_text("")
    (root / "scaling.json").write_text("null")
    assert segment_scene(asked, workers).state == "done"


@pytest.mark.parametrize(("poolings", "convolutions"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)])
def test_deeper_networks_leave_no_seam(
    tmp_path: Path, raster: Path, workers: Workers, poolings: int, convolutions: int
) -> None:
    """Scores of small tiles equal those of the whole; a card with a shorter reach is refused."""
    shape = {"poolings": poolings, "convolutions": convolutions}
    stride = 2**poolings
    bare = convolutions * (2 * (stride - 1) + stride)
    scores = {}
    folder = save_local_unet(tmp_path / "unet", "yx", ("red", "nir"), **shape)
    for name, tile in (("whole", None), ("tiled", 48)):
        out = tmp_path / name
        segment_scene(job(raster, str(folder), out, tile=tile, scores=True), workers)
        with rasterio.open(out / "scene_1" / "scene_1_scores.tif") as file:
            scores[name] = np.nan_to_num(file.read())
    assert np.array_equal(scores["whole"], scores["tiled"])
    short = save_local_unet(tmp_path / "short", "yx", ("red", "nir"), reach=bare - stride, **shape)
    with pytest.raises(ModelError, match="sees further than its card says"):
        segment_scene(job(raster, str(short), tmp_path / "short-out", tile=48), workers)


def test_files_of_an_older_product_go_even_after_a_kill_in_the_commit(
    tmp_path: Path, raster: Path, model: str, workers: Workers
) -> None:
    out = tmp_path / "out"
    segment_scene(job(raster, model, out, scores=True), workers)
    (out / "scene_1" / "scene_1.json").unlink()  # as a kill leaves it, just after the commit has begun
    segment_scene(job(raster, model, out), workers)
    assert not (out / "scene_1" / "scene_1_scores.tif").exists()
