"""Cards: closed vocabulary, checked digests, no way out of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import card, save_local_unet

from segcore.errors import CardError, ModelError
from segcore.model import load_segmenter
from segcore.model.card import built_in_models, check_card, load_card
from segcore.model.pack import MEASURED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_local_unet(tmp_path / "unet", "yx")


def edit(folder: Path, **changes: object) -> Path:
    document = json.loads((folder / "card.json").read_text()) | changes
    (folder / "card.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("name", built_in_models())
def test_built_in_cards_find_their_weights(name: str) -> None:
    model = load_card(name)
    assert model.card.name == name
    _, path = model.weights()
    assert path.is_file()


def test_five_models_are_built_in() -> None:
    assert built_in_models() == ["deepbet", *(f"ukis-csmask-{b}b-{level}" for b in (4, 6) for level in ("l1c", "l2a"))]


@pytest.mark.parametrize("name", [n for n in built_in_models() if n.startswith("ukis")])
def test_cloud_cards_say_what_the_files_beside_the_weights_say(name: str) -> None:
    model = load_card(name)
    _, weights = model.weights()
    theirs = json.loads(weights.with_suffix(".json").read_text())
    mean, deviation = theirs["data"]["dataset_statistics"]["img"]
    assert [c.name for c in model.card.channels] == theirs["data"]["dataset_statistics"]["band_names"]
    assert list(model.card.window or ()) == theirs["data"]["target_size"]
    (affine,) = [step for step in model.card.scaling if step.step == "affine"]
    values = np.linspace(0, 1, len(mean))
    expected = (values - mean) / deviation
    assert np.allclose(values * affine.scale + affine.offset, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": 1}, "colour: Extra inputs are not permitted"),
        ({"stride": [2]}, "stride"),
        ({"local": False}, "`reach` must be given for a local network"),
        ({"reach": None}, "`reach` must be given for a local network"),
        ({"window": [31, 31]}, "multiple of the stride"),
        ({"axes": "xz"}, "axes"),
        ({"scaling": [{"step": "magic"}]}, "magic"),
        ({"scaling": [{"step": "affine", "scale": [1, 2]}]}, "2 numbers for 1 channels"),
        ({"scaling": [{"step": "clip_percentiles", "lower": 9, "upper": 1}]}, "must be less than"),
        ({"classes": [{"index": i, "name": str(i), "color": [0, 0, 0]} for i in (1, 2)]}, "numbered 0, 1, 2"),
        ({"orientation": "RAS"}, "for volumes"),
        ({"artifacts": [{"format": "pickle", "path": "a.pkl", "sha256": "0" * 64}]}, "format"),
    ],
)
def test_broken_cards_are_refused(folder: Path, changes: dict, words: str) -> None:
    with pytest.raises(CardError, match=words):
        load_card(str(edit(folder, **changes)))


@pytest.mark.parametrize("text", ["", "[1, 2", "7", "\x00"])
def test_cards_that_are_no_json_are_refused(folder: Path, text: str) -> None:
    (folder / "card.json").write_text(text)
    with pytest.raises(CardError):
        load_card(str(folder))


def test_unknown_names_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="deepbet"):
        load_card(str(tmp_path / "nothing"))


def test_weights_that_differ_are_refused(folder: Path) -> None:
    weights = folder / "unet.onnx"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(CardError, match="sha256"):
        load_card(str(folder)).weights()


def test_weights_outside_the_folder_are_refused(folder: Path) -> None:
    (folder.parent / "other.onnx").write_bytes(b"")
    edit(folder, artifacts=[{"format": "onnx", "path": "../other.onnx", "sha256": "0" * 64}])
    with pytest.raises(CardError, match="leads out"):
        load_card(str(folder)).weights()


def test_missing_weights_say_what_to_install(folder: Path) -> None:
    edit(folder, artifacts=[{"format": "onnx", "path": "package:no-such-thing/a.onnx", "sha256": "0" * 64}])
    with pytest.raises(ModelError, match="pip install no-such-thing"):
        load_card(str(folder)).weights()


def test_the_digest_follows_card_and_weights(folder: Path) -> None:
    before = load_card(str(folder)).digest
    assert load_card(str(folder)).digest == before
    assert load_card(str(edit(folder, version="2"))).digest != before


def test_engines_refuse_what_is_not_theirs(folder: Path) -> None:
    for kind, words in (("torchscript", "as torchscript"), ("onnx", "ONNX Runtime")):
        bad = folder / "bad.bin"
        bad.write_bytes(b"nonsense")
        import hashlib

        digest = hashlib.sha256(b"nonsense").hexdigest()
        edit(folder, artifacts=[{"format": kind, "path": "bad.bin", "sha256": digest}])
        with pytest.raises(ModelError, match=words):
            load_segmenter(load_card(str(folder)), threads=1)


def test_onnx_results_do_not_depend_on_the_batch_or_the_threads(folder: Path) -> None:
    model = load_card(str(folder))
    batch = np.random.default_rng(0).standard_normal((5, 1, 32, 48)).astype(np.float32)
    one, two = (load_segmenter(model, threads=n) for n in (1, 2))
    together = one(batch)
    assert np.array_equal(together, np.concatenate([one(image[None]) for image in batch]))
    assert np.array_equal(together, two(batch))


def test_torchscript_runs_and_names_the_cause_of_a_failure() -> None:
    segmenter = load_segmenter(load_card("deepbet"), threads=2)
    out = segmenter(np.random.default_rng(0).standard_normal((1, 1, 32, 64, 32)).astype(np.float32))
    assert out.shape == (1, 2, 32, 64, 32)
    assert np.allclose(out.sum(axis=1), 1, atol=1e-5)
    with pytest.raises(ModelError, match="torch failed on a batch of shape"):
        segmenter(np.zeros((1, 3, 32, 32, 32), np.float32))


def test_a_card_round_trips() -> None:
    original = card()
    assert type(original).model_validate_json(original.model_dump_json()) == original


def test_the_example_in_the_readme_is_the_draft_of_a_card() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    draft = json.loads(text.partition("```json\n")[2].partition("```")[0])
    assert not set(draft) & set(MEASURED)
    artifact = {"format": "onnx", "path": "water.onnx", "sha256": "0" * 64}
    measured = {"artifacts": [artifact], "stride": [16, 16], "local": True, "reach": [94, [94, 90]]}
    assert check_card(draft | measured, "README.md").sight().reach == ((94, 94), (94, 90))
