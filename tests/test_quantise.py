"""Networks in int8: made of real pixels, proved on others, kept by digest; and refused where they do not do."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import rasterio
from conftest import save_local_unet

from flows.batch import find_jobs
from segcore import model as engines
from segcore.box import Box
from segcore.calibrate import calibrate
from segcore.errors import MemoryShortageError, ModelError, PlanError
from segcore.execute import Workers
from segcore.io import product_name
from segcore.model import cut_of, load_segmenter
from segcore.model.card import load_card
from segcore.model.cut import Cut
from segcore.model.probe import noise
from segcore.model.quantise import Quantised, find_quantised, keep_quantised, quantise
from segcore.model.segmenter import Segmenter
from segcore.model.staged import CroppedSegmenter, StagedSegmenter
from segcore.precision import Proof, _cells
from segcore.scene import check_seams, segment_scene, survey
from segcore.spec import Job, Precision, Settings
from segcore.staging import ONE_PASS, Staging

needs_openvino = pytest.mark.skipif(not (find_spec("openvino") and find_spec("nncf")), reason="needs the extra `int8`")
needs_bf16 = pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="needs a CPU with bfloat16"
)


@pytest.fixture(scope="module")
def river(tmp_path_factory: pytest.TempPathFactory, sentinel: Path) -> Path:
    """A piece of the real Sentinel-2 chip, 288 x 336 pixels, three bands, with a corner of nodata."""
    document = json.loads(sentinel.read_text())
    bands = [document["assets"][key]["href"] for key in ("B03", "B04", "B08")]
    window = rasterio.windows.Window(900, 700, 336, 288)
    values = []
    for band in bands:
        with rasterio.open(band) as source:
            values.append(source.read(1, window=window))
            profile = source.profile | {"transform": source.window_transform(window)}
    values = np.stack(values)
    values[:, :60, :80] = 0
    path = tmp_path_factory.mktemp("river") / "river.tif"
    profile |= {"driver": "GTiff", "count": 3, "width": 336, "height": 288, "nodata": 0, "dtype": values.dtype.name}
    for key in ("photometric", "interleave", "compress", "tiled", "blockxsize", "blockysize"):
        profile.pop(key, None)
    with rasterio.open(path, "w", **profile) as target:
        target.write(values)
        target.descriptions = ("green", "red", "nir")
    return path


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory, land_unet: Path) -> Path:
    """The packed, local U-Net, with a window for blend mode."""
    folder = tmp_path_factory.mktemp("models") / "windowed"
    shutil.copytree(land_unet, folder)
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"window": [64, 64], "overlap": [32, 32]}))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEGFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def job(scene: Path, model: Path, out: Path, **settings: Any) -> Job:
    wanted = {"precision": "int8", "agreement": 0.8} | settings
    return Job(product_name(str(scene)), str(scene), str(model), str(out), Settings(**wanted))


def mask_of(out: Path, scene: Path) -> bytes:
    with rasterio.open(out / scene.stem / f"{scene.stem}_mask.tif") as mask:
        return mask.read(1).tobytes()


def properties(product: str) -> dict[str, Any]:
    return json.loads(Path(product).read_text())["properties"]


def test_settings_that_cannot_be() -> None:
    with pytest.raises(PlanError, match="--precision 'fp8'"):
        Settings(precision="fp8")  # type: ignore[arg-type]
    for share in (0, 1.01, float("nan")):
        with pytest.raises(PlanError, match="--agreement"):
            Settings(agreement=share)


def test_products_of_fp32_keep_their_fingerprints() -> None:
    assert "precision" not in Settings().pixels()
    assert Settings(precision="int8").pixels()["precision"] == "int8"
    assert Settings(agreement=0.9, precision="int8").pixels() == Settings(precision="int8").pixels()


def test_bf16_is_refused_where_nothing_runs_it(
    river: Path, windowed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match="bf16 is run in OpenVINO; leave --engine onnxruntime or --precision bf16 out"):
        survey(job(river, windowed, tmp_path, precision="bf16", engine="onnxruntime"))

    class Old:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    with monkeypatch.context() as changed:
        changed.setattr(openvino, "Core", Old)
        with pytest.raises(ModelError, match="no arithmetic for bfloat16"):
            load_segmenter(load_card(str(windowed)), 1, precision="bf16")
        with pytest.raises(ModelError, match="no arithmetic for bfloat16"):  # before there is a plan
            find_jobs([str(river)], str(windowed), str(tmp_path), Settings(precision="bf16", memory=2**20))
        find_jobs([str(river)], str(windowed), str(tmp_path), Settings(precision="bf16"), cluster="tcp://elsewhere")
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install openvino"):
        survey(job(river, windowed, tmp_path, precision="bf16"))


@needs_bf16
def test_bf16_end_to_end(river: Path, windowed: Path, tmp_path: Path, workers: Workers) -> None:
    """Proved, and tiled alike; nothing is kept of it."""
    segment_scene(job(river, windowed, tmp_path / "fp32", precision="fp32"), workers)
    whole = segment_scene(job(river, windowed, tmp_path / "whole", precision="bf16"), workers)
    found = properties(whole.product)["segflow:bf16"]
    assert 0.9 < found["agreement"] < 1
    assert found["precision"] == "bf16"
    assert found["sha256"] is None
    assert "bf16" in found["engine"]
    assert "bf16" in whole.engine
    a, b = (np.frombuffer(mask_of(tmp_path / name, river), np.uint8) for name in ("fp32", "whole"))
    assert 0 < np.count_nonzero(a != b) < 0.1 * a.size
    assert ((a == 255) == (b == 255)).all()
    tiled = segment_scene(job(river, windowed, tmp_path / "tiled", precision="bf16", tile=160), workers)
    assert properties(tiled.product)["segflow:plan"]["counts"] == [2, 3]
    assert mask_of(tmp_path / "tiled", river) == mask_of(tmp_path / "whole", river)
    assert check_seams(Path(tiled.product)).clean
    assert segment_scene(job(river, windowed, tmp_path / "whole", precision="bf16"), workers).state == "up to date"
    with pytest.raises(ModelError, match="is wanted"):  # a product that was good enough is not what is asked for now
        segment_scene(job(river, windowed, tmp_path / "whole", precision="bf16", agreement=1.0), workers)
    assert mask_of(tmp_path / "whole", river) == mask_of(tmp_path / "tiled", river), "the older product stays"
    with pytest.raises(ModelError, match=r"in bf16 gives .* 100\.0000% is wanted; leave --precision bf16 out"):
        segment_scene(job(river, windowed, tmp_path / "refused", precision="bf16", agreement=1.0), workers)


def test_engine_that_is_not_installed(
    river: Path, windowed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'segflow\[int8\]'"):
        survey(job(river, windowed, tmp_path))


def test_only_onnx_has_int8(river: Path, windowed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reversed"
    shutil.copytree(windowed, folder)
    card = json.loads((folder / "card.json").read_text())
    card["artifacts"].sort(key=lambda artifact: artifact["format"] == "onnx")
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="only ONNX can be run in int8"):
        survey(job(river, folder, tmp_path))


def test_refusal_says_how_far_it_is(windowed: Path) -> None:
    proof = Proof(0.98765, 1000, 8, (600, 400, 0), (590, 397, 0), "c", "s", "openvino", 4.0)
    proof.check(0.98, "windowed")
    with pytest.raises(
        ModelError, match=r"98\.7650%.*1000 pixels at 8 places.*99\.5000% is wanted.*--agreement 0\.9876"
    ):
        proof.check(0.995, "windowed")


def test_labels_that_are_all_alike_prove_nothing() -> None:
    proof = Proof(1.0, 1000, 8, (0, 0, 1000), (0, 0, 1000), None, None, "openvino", 4.0, "bf16")
    proof.check(0.995, "constant")
    assert not proof.says_much
    assert "says nothing of other labels" in " ".join(proof.warnings)
    assert replace(proof, of_class=(1, 0, 999)).says_much
    with pytest.raises(ModelError, match="is wanted"):
        replace(proof, agreement=0.9).check(0.995, "constant")
    assert Proof.from_json(json.loads(json.dumps(proof.to_json()))) == proof


@needs_openvino
def test_networks_of_another_making_are_others(
    river: Path, windowed: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = survey(job(river, windowed, tmp_path))
    monkeypatch.setattr("segcore.survey.QUANTISE_VERSION", 0)
    once = survey(job(river, windowed, tmp_path))
    assert once.fingerprint != now.fingerprint
    assert once.scratch_root != now.scratch_root


@needs_openvino
def test_end_to_end(river: Path, windowed: Path, tmp_path: Path, cache: Path, workers: Workers) -> None:
    """Proved, whole, tiled alike, kept, found again; and refused where all labels are wanted."""
    plain = segment_scene(job(river, windowed, tmp_path / "fp32", precision="fp32"), workers)
    whole = segment_scene(job(river, windowed, tmp_path / "whole"), workers)
    said = properties(whole.product)
    found = said["segflow:int8"]
    assert 0.8 <= found["agreement"] < 1
    assert found["pixels"] > 10_000
    assert sum(found["of_class"]) == found["pixels"]
    assert sum(found["kept"]) / found["pixels"] == pytest.approx(found["agreement"])
    assert min(found["of_class"]) > 0
    assert found["engine"].startswith("openvino")
    assert whole.engine.startswith("openvino")
    assert "segflow:int8" not in properties(plain.product)
    kept = find_quantised(load_card(str(windowed)))
    assert kept is not None
    assert kept.path.parent == cache
    assert (kept.sha256, kept.calibration) == (found["sha256"], found["calibration"])

    # What was measured at places is true of the scene, and int8 is not fp32 by another name.
    a, b = (np.frombuffer(mask_of(tmp_path / name, river), np.uint8) for name in ("fp32", "whole"))
    assert set(np.unique(a)) == {0, 1, 2, 255}
    assert 0 < np.count_nonzero(a != b) < 0.2 * a.size
    assert ((a == 255) == (b == 255)).all()

    tiled = segment_scene(job(river, windowed, tmp_path / "tiled", tile=160), workers)
    assert properties(tiled.product)["segflow:plan"]["counts"] == [2, 3]
    assert mask_of(tmp_path / "tiled", river) == mask_of(tmp_path / "whole", river)
    assert check_seams(Path(tiled.product)).clean
    assert segment_scene(job(river, windowed, tmp_path / "whole"), workers).state == "up to date"
    blends = [
        segment_scene(job(river, windowed, tmp_path / f"b{n}", mode="blend", tile=n), workers) for n in (150, 340)
    ]
    assert properties(blends[0].product)["segflow:plan"]["mode"] == "blend"
    assert mask_of(tmp_path / "b150", river) == mask_of(tmp_path / "b340", river)

    # Without the cache it is made anew, of the same bytes; with it another scene takes it over, and is proved itself.
    shutil.rmtree(cache)
    again = segment_scene(job(river, windowed, tmp_path / "again"), workers)
    assert properties(again.product)["segflow:int8"]["sha256"] == found["sha256"]
    assert mask_of(tmp_path / "again", river) == mask_of(tmp_path / "whole", river)
    other = tmp_path / "other.tif"
    shutil.copy(river, other)
    second = segment_scene(job(other, windowed, tmp_path / "second"), workers)
    assert properties(second.product)["segflow:int8"]["calibration"] == found["calibration"]

    with pytest.raises(ModelError, match=r"100\.0000% is wanted"):
        segment_scene(job(river, windowed, tmp_path / "refused", agreement=1.0), workers)
    assert not (tmp_path / "refused" / river.stem / f"{river.stem}.json").exists()
    # The same network does for a limit that it meets.
    taken = segment_scene(job(river, windowed, tmp_path / "refused"), workers)
    assert mask_of(tmp_path / "refused", river) == mask_of(tmp_path / "whole", river)
    assert taken.state == "done"


def test_places_lie_as_windows_do_in_blend_mode(river: Path, windowed: Path, tmp_path: Path) -> None:
    """Windows of 64 every 32 pixels: a place of 64 is made of three along an axis, and elsewhere of four."""
    plan = survey(job(river, windowed, tmp_path, mode="blend", precision="fp32")).plan
    tiles = [plan.tile_of(box) for box in _cells(plan)]
    assert len(tiles) == 4 * 5
    assert {tile.core.shape for tile in tiles} == {(64, 64)}
    assert max(len(tile.windows) for tile in tiles) == 3 * 3


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_speed_is_measured_in_the_numbers_that_are_wanted(
    precision: Precision, river: Path, windowed: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = list[str]()

    def load(*arguments: Any) -> Segmenter:
        segmenter = load_segmenter(*arguments)
        engines.append(segmenter.engine)
        return segmenter

    monkeypatch.setattr("segcore.calibrate.load_segmenter", load)
    monkeypatch.setattr("segcore.calibrate._SECONDS", 0.1)
    prospect = survey(job(river, windowed, tmp_path, precision=precision))
    assert prospect.speed is None
    found = calibrate(prospect)
    assert found == prospect.speed
    assert 0 < found.label < 1e-3
    (engine,) = engines
    assert ("bf16" in engine) == (precision == "bf16")


@needs_openvino
def test_speed_of_a_network_that_is_not_made_yet(river: Path, windowed: Path, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match="before a run with --precision int8 has made that of it"):
        calibrate(survey(job(river, windowed, tmp_path)))


@needs_openvino
def test_kept_beside_the_model_and_known_by_its_digest(
    windowed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEGFLOW_CACHE")
    folder = tmp_path / "mine"
    shutil.copytree(windowed, folder)
    model, batch = load_card(str(folder)), np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    path = tmp_path / "made.zip"
    made = Quantised(path, quantise("mine", model.weights()[1].read_bytes(), [[batch]], path), "here")
    assert find_quantised(model) is None
    keep_quantised(model, made)
    kept = find_quantised(model)
    assert kept is not None
    assert kept.path.parent == folder
    keep_quantised(model, Quantised(path, made.sha256, "there"))
    assert find_quantised(model) == kept, "the first one stays"
    kept.path.write_bytes(b"damaged")
    assert find_quantised(model) is None
    keep_quantised(model, Quantised(path, made.sha256, "there"))
    found = find_quantised(model)
    assert found is not None
    assert found.calibration == "there"
    with pytest.raises(ModelError, match="mine cannot be quantised by NNCF"):
        quantise("mine", b"damaged", [[batch]], tmp_path / "never.zip")
    assert "nncf" not in sys.modules, "it stays in its own process"


@needs_bf16
def test_only_what_is_wanted_rises_in_bf16(windowed: Path) -> None:
    model, image, wanted = load_card(str(windowed)), noise((1, 3, 192, 224)), Box((81, 96), (110, 130))
    plain, cropped = (load_segmenter(model, 2, staging, precision="bf16") for staging in (None, ONE_PASS))
    assert isinstance(cropped, CroppedSegmenter)
    at = (slice(None), slice(None), *wanted.slices())
    assert (cropped(image) == plain(image)).all()
    assert (cropped(image, wanted)[at] == plain(image)[at]).all()


@needs_bf16
@pytest.mark.parametrize("axes", ["yx", "zyx"])
def test_stages_in_bf16_say_what_one_pass_says(
    axes: str, tmp_path: Path, unproved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_card(str(save_local_unet(tmp_path / "unet", axes, width=8, poolings=2)))
    image = noise((1, 1, *(96, 112, 64)[: len(axes)]))
    exact, plain = load_segmenter(model, 2)(image), load_segmenter(model, 2, precision="bf16")(image)
    staged = load_segmenter(model, 2, Staging(2, (40,) * len(axes)), precision="bf16")
    assert isinstance(staged, StagedSegmenter)
    assert "bf16" in staged.engine
    # What goes from part to part is float32, in which a number of bfloat16 is what it was.
    assert (staged(image) == plain).all()
    assert 1e-4 < np.abs(plain - exact).max() / np.abs(exact).max() < 0.05
    monkeypatch.setattr(engines, "_SAME_SHORT", -1.0)  # in these numbers, too
    monkeypatch.setenv("SEGFLOW_CACHE", str(tmp_path / "another"))
    with pytest.raises(ModelError, match="other scores in chunks"):
        load_segmenter(model, 2, Staging(2, (40,) * len(axes)), precision="bf16")


@needs_openvino
def test_a_network_that_cannot_be_cropped_is_made_all_the_same(
    windowed: Path, tmp_path: Path, unproved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = load_card(str(windowed)), noise((1, 3, 96, 64))
    with monkeypatch.context() as changed:
        changed.setattr(CroppedSegmenter, "prove", raising(ModelError("other scores")))
        assert cut_of(model, 2) is None
        changed.setattr(CroppedSegmenter, "prove", raising(MemoryShortageError("no memory")))
        with pytest.raises(MemoryShortageError):  # else it would be kept uncropped
            cut_of(model, 2)
    path = tmp_path / "made.zip"
    sha256 = quantise("windowed", model.weights()[1].read_bytes(), [[image]], path)
    made = load_segmenter(model, 2, quantised=Quantised(path, sha256, "here"))
    assert not isinstance(made, CroppedSegmenter)
    assert made(image).shape == (1, 3, 96, 64)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


@needs_openvino
def test_only_what_is_wanted_rises(
    windowed: Path, tmp_path: Path, unproved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a window in int8, too; and what is transposed runs in integers, which OpenVINO only does around zero."""
    model, size, wanted = load_card(str(windowed)), (192, 224), Box((81, 96), (110, 130))
    found, image = cut_of(model, 2), noise((1, 3, *size))
    assert found is not None
    (cut, network), path = found, tmp_path / "made.zip"
    sha256 = quantise("windowed", network, [[image, *cut.cropping(size, Box.of(size))[1]]], path)
    made = load_segmenter(model, 2, quantised=Quantised(path, sha256, "here"))
    assert isinstance(made, CroppedSegmenter)
    at = (slice(None), slice(None), *wanted.slices())
    whole, part = made(image), made(image, wanted)
    assert (part[at] == whole[at]).all()
    assert part.shape == whole.shape
    assert np.abs(whole - load_segmenter(model, 2)(image)).max() < 0.2 * np.abs(whole).max()

    with zipfile.ZipFile(path) as archive:
        core, files = openvino.Core(), [archive.read(f"network.{kind}") for kind in ("xml", "bin")]
    made_of = core.read_model(files[0], openvino.Tensor(np.frombuffer(files[1], np.uint8).copy()))
    risers = [node for node in made_of.get_ops() if node.get_type_name() == "ConvolutionBackpropData"]
    assert len(risers) == 4
    for node in risers:
        rounded = node.input(0).get_source_output().get_node()
        while rounded.get_type_name() == "StridedSlice":
            rounded = rounded.input(0).get_source_output().get_node()
        low, high = (rounded.input(i).get_source_output().get_node().data for i in (1, 2))
        assert (low >= 0).all() or np.allclose(high, -low * 127 / 128)

    with monkeypatch.context() as changed:  # where it cannot be proved all of a window rises
        changed.setattr(engines, "_SAME_SHORT", -1.0)
        changed.setenv("SEGFLOW_CACHE", str(tmp_path / "another"))
        wary = load_segmenter(model, 2, quantised=Quantised(path, sha256, "here"))
        assert (wary(image, wanted) == whole).all()
    with monkeypatch.context() as changed:  # nor where something is cropped that is seen
        changed.setenv("SEGFLOW_CACHE", str(tmp_path / "a third"))
        cropping = Cut.cropping

        def shifted(self: Cut, window: tuple[int, ...], box: Box) -> tuple[Box, list[Any]]:
            risen, ends = cropping(self, window, box)
            return risen, ends if risen == Box.of(window) else [end + 2 * (end > 0) for end in ends]

        changed.setattr(Cut, "cropping", shifted)
        wary = load_segmenter(model, 2, quantised=Quantised(path, sha256, "here"))
        assert isinstance(wary, CroppedSegmenter)
        assert not wary.in_part
    assert made.in_part
    monkeypatch.setattr("segcore.model.stages.find_stages", lambda *_: None)
    with pytest.raises(ModelError, match="made of other parts"):
        load_segmenter(model, 2, quantised=Quantised(path, sha256, "here"))
