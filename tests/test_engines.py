"""What runs a network: OpenVINO where it is quicker and says the same, ONNX Runtime otherwise."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from conftest import save_local_unet
from rasterio.transform import from_origin

import segcore.model
from segcore.errors import ModelError, PlanError
from segcore.model import load_segmenter, runner_of
from segcore.model.card import Model, load_card
from segcore.model.onnx import OnnxSegmenter
from segcore.model.openvino import OpenVinoSegmenter
from segcore.model.probe import noise
from segcore.model.torch import TorchSegmenter
from segcore.spec import Job, Settings
from segcore.survey import Prospect, survey


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_card(str(save_local_unet(tmp_path_factory.mktemp("engines") / "unet", "yx", width=8, poolings=2)))


def test_local_networks_run_in_openvino_and_the_others_in_onnx_runtime(local: Model) -> None:
    assert load_segmenter(local, 2).engine.startswith("openvino")
    assert load_segmenter(local, 2, engine="onnxruntime").engine.startswith("onnxruntime")
    assert runner_of(load_card("ukis-csmask-4b-l1c"), "auto") == "onnxruntime"
    assert runner_of(load_card("ukis-csmask-4b-l1c"), "openvino") == "openvino"
    assert runner_of(load_card("deepbet"), "auto") == "torch"


def test_without_openvino_onnx_runtime_runs(local: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        return None if name == "openvino" else find_spec(name)

    monkeypatch.setattr(segcore.model, "find_spec", find)
    assert load_segmenter(local, 2).engine.startswith("onnxruntime")
    with pytest.raises(ModelError, match="pip install openvino"):
        load_segmenter(local, 2, engine="openvino")


def test_what_torch_runs_is_run_in_nothing_else() -> None:
    with pytest.raises(ModelError, match="torch runs that; leave --engine out"):
        runner_of(load_card("deepbet"), "openvino")


@pytest.mark.parametrize(
    "spoil",
    [lambda out: out * np.float32(1.01), lambda out: np.zeros_like(out), lambda out: out * np.float32(np.nan)],
    ids=["a hundredth", "nothing", "NaN"],
)
def test_an_engine_that_says_otherwise_is_not_taken(
    local: Model,
    spoil: Callable[[np.ndarray], np.ndarray],
    unproved: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    true = OpenVinoSegmenter.__call__
    monkeypatch.setattr(OpenVinoSegmenter, "__call__", lambda self, batch, wanted=None: spoil(true(self, batch)))
    with caplog.at_level(logging.INFO, "segcore"):
        assert load_segmenter(local, 2).engine.startswith("onnxruntime")
    assert "does not run in OpenVINO: its scores are" in caplog.text
    with pytest.raises(ModelError, match="from those of ONNX Runtime; leave --engine out"):
        load_segmenter(local, 2, engine="openvino")


@pytest.mark.parametrize("shape", [(64, 96), (256, 256)])
@pytest.mark.parametrize("engine", [OpenVinoSegmenter, OnnxSegmenter])
@pytest.mark.parametrize("threads", [2, 5])
def test_windows_side_by_side_are_those_one_by_one(
    local: Model, engine: type[OpenVinoSegmenter | OnnxSegmenter], threads: int, shape: tuple[int, int]
) -> None:
    path = local.weights()[1]
    windows = noise((3, 1, *shape))
    one, several = engine(path, threads), engine(path, threads, 2)
    assert (one.batch, several.batch) == (1, 2)
    expected = np.concatenate([one(window[None]) for window in windows])
    assert np.array_equal(several(windows), expected)
    assert np.array_equal(several(windows[:1]), expected[:1])
    (other,) = {OpenVinoSegmenter, OnnxSegmenter} - {engine}
    assert np.allclose(expected, other(path, 2, 2)(windows), atol=1e-5 * np.abs(expected).max())


def test_what_goes_wrong_side_by_side_is_said(local: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is under way any more when it is: whoever is told may try again with less."""
    several = OnnxSegmenter(local.weights()[1], 2, 2)
    run, ended = several._run, list[str]()

    def slow(window: np.ndarray) -> np.ndarray:
        if window.any():
            raise ModelError("no")
        time.sleep(0.3)
        ended.append("slow")
        return run(window)

    with monkeypatch.context() as changed:
        changed.setattr(several, "_run", slow)
        with pytest.raises(ModelError, match="no"):
            several(np.concatenate([noise((1, 1, 64, 64)), np.zeros((1, 1, 64, 64), np.float32)]))
        assert ended == ["slow"]
    with pytest.raises(ModelError, match="ONNX Runtime failed on a batch of shape"):
        several(noise((2, 3, 64, 64)))
    assert several(noise((2, 1, 64, 64))).shape[0] == 2


def test_pieces_say_what_the_whole_says_bit_for_bit(local: Model) -> None:
    """However large the window: sizes that share no kernel would show here."""
    segmenter, sight = load_segmenter(local, 2, engine="openvino"), local.card.sight()
    ((before, after), _) = sight.halo
    image = noise((1, 1, 320, 416))
    whole = segmenter(image)
    for top, left, side in ((0, 0, 64), (64, 128, 96), (40, 200, 160), (128, 32, 192)):
        low, high = max(0, top - before), top + side + after
        first, last = max(0, left - before), left + side + after
        piece = segmenter(np.ascontiguousarray(image[:, :, low:high, first:last]))
        inside = piece[:, :, top - low : top - low + side, left - first : left - first + side]
        assert np.array_equal(inside, whole[:, :, top : top + side, left : left + side])


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    for name in ("broken.onnx", "broken.zip"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ModelError, match=name):
            OpenVinoSegmenter(tmp_path / name, 1)


def test_the_engine_is_no_part_of_what_a_product_is_known_by() -> None:
    assert Settings(engine="openvino").pixels() == Settings().pixels()
    with pytest.raises(PlanError, match="must be auto, onnxruntime or openvino"):
        Settings(engine="tensorrt")  # type: ignore[arg-type]


def test_what_openvino_has_no_room_for_is_run_in_onnx_runtime(local: Model, tmp_path: Path) -> None:
    scene = tmp_path / "scene.tif"
    with rasterio.open(scene, "w", driver="GTiff", count=1, height=300, width=300, dtype="float32", crs="EPSG:32616",
                       transform=from_origin(452475, 3408645, 30, 30)) as file:  # fmt: skip
        file.write(np.random.default_rng(0).random((1, 300, 300)).astype(np.float32))

    def surveyed(**settings: object) -> Prospect:
        return survey(Job("scene", str(scene), str(local.folder), str(tmp_path / "out"), Settings(**settings)))  # type: ignore[arg-type]

    roomy, tight = surveyed(memory=2**30), surveyed(memory=340 * 2**20)
    assert (roomy.runner, roomy.engine) == ("openvino", "auto")
    assert (tight.runner, tight.engine) == ("onnxruntime", "onnxruntime")
    assert roomy.fingerprint == tight.fingerprint
    assert roomy.scratch_root.name[:16] != tight.scratch_root.name[:16], "tiles of two engines lie side by side"
    # What was begun in one engine is gone on with in it.
    tight.scratch_root.mkdir(parents=True)
    assert surveyed(memory=2**30).runner == "onnxruntime"
    with pytest.raises(PlanError, match="budget; use --memory"):
        surveyed(memory=340 * 2**20, engine="openvino")
    with pytest.raises(PlanError, match="int8 is run in OpenVINO"):
        surveyed(precision="int8", engine="onnxruntime")


def test_what_an_engine_is_given_stays_as_it_is(local: Model) -> None:
    class Greedy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sub_(x.mean())

    image = noise((1, 1, 64, 64))
    before = image.copy()
    for segmenter in (TorchSegmenter(Greedy(), 1), load_segmenter(local, 1)):
        segmenter(image)
        assert np.array_equal(image, before), segmenter.engine


def test_an_engine_that_gave_back_its_memory_goes_on(local: Model) -> None:
    for engine in ("openvino", "onnxruntime"):
        segmenter, image = load_segmenter(local, 1, engine=engine), noise((1, 1, 256, 256))  # type: ignore[arg-type]
        before = segmenter(image)
        segmenter.release()
        assert np.array_equal(segmenter(image), before)


def test_tiles_that_are_too_small_in_one_engine_are_those_of_the_other(tmp_path: Path) -> None:
    wide = save_local_unet(tmp_path / "wide", "yx", width=32, poolings=3)
    scene = tmp_path / "scene.tif"
    with rasterio.open(scene, "w", driver="GTiff", count=1, height=3000, width=3000, dtype="uint8", sparse_ok=True,
                       crs="EPSG:32616", transform=from_origin(452475, 3408645, 30, 30)):  # fmt: skip
        pass
    found = {}
    for memory in range(360, 2000, 20):
        try:
            job = Job("scene", str(scene), str(wide), str(tmp_path / "out"), Settings(memory=memory * 2**20))
            found[memory] = survey(job)
        except PlanError:
            continue
    runners = [prospect.runner for prospect in found.values()]
    assert runners == sorted(runners), "the more memory, the rather OpenVINO"
    assert set(runners) == {"onnxruntime", "openvino"}
    assert all(prospect.plan.work < 3 for prospect in found.values() if prospect.runner == "openvino")


def test_a_batch_that_fails_leaves_the_engine_usable(local: Model) -> None:
    segmenter = OpenVinoSegmenter(local.weights()[1], 2, 2)
    good = noise((1, 1, 256, 256))
    with pytest.raises(ModelError, match="OpenVINO failed on a batch"):
        segmenter.network.run_all([[good], [noise((1, 3, 64, 64))]])
    assert segmenter(good).shape == (1, 3, 256, 256)


def test_nobody_is_told(local: Model, tmp_path: Path) -> None:
    """Engines would report their use to their makers, and note in the user's home as whom."""
    script = f"""
import os, sys
from importlib.util import find_spec
from segcore.model import load_segmenter
from segcore.model.card import load_card
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
assert sys.modules["openvino_telemetry"] is None
for engine in ("onnxruntime", "openvino"):
    print(load_segmenter(load_card({str(local.folder)!r}), 1, engine=engine).engine)
if find_spec("nncf"):
    import nncf
"""
    # Not as in CI, where they are silent by themselves.
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [line.split()[0] for line in ended.stdout.splitlines()] == ["onnxruntime", "openvino"]
    assert {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()} == {
        (".cache", "segflow")
    }
