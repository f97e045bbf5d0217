"""What was proved of a network is proved once on a machine, and what failed is tried again."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import save_local_unet

import segcore.model
from segcore.errors import ModelError
from segcore.model import load_segmenter
from segcore.model.card import load_card
from segcore.model.proved import prove_once
from segcore.staging import Staging


class Proof:
    """One that holds unless it is told not to, and counts."""

    holds, tried = True, 0

    def __call__(self) -> None:
        self.tried += 1
        if not self.holds:
            raise ModelError("it does not hold")


def test_what_held_is_not_proved_again(unproved: Path) -> None:
    proof = Proof()
    for _ in range(3):
        prove_once(proof, "reach", "digest", Staging(1, (64, 64)))
    assert proof.tried == 1
    prove_once(proof, "reach", "digest", Staging(1, (64, 32)))
    prove_once(proof, "reach", "another digest", Staging(1, (64, 64)))
    assert proof.tried == 3


def test_what_failed_is_tried_again(unproved: Path) -> None:
    proof = Proof()
    proof.holds = False
    for _ in range(2):
        with pytest.raises(ModelError, match="does not hold"):
            prove_once(proof, "reach", "digest")
    proof.holds = True
    prove_once(proof, "reach", "digest")
    assert proof.tried == 3


@pytest.mark.parametrize("content", [None, b"", b"[]", b"null", b'{"digest": tr', b"\xff"])
def test_notes_that_cannot_be_used_are_done_without(unproved: Path, content: bytes | None) -> None:
    if content is None:
        unproved.write_bytes(b"a file where the folder should be")
    else:
        unproved.mkdir()
        (unproved / "proved.json").write_bytes(content)
    proof = Proof()
    for _ in range(2):
        prove_once(proof, "reach", "digest")
    assert proof.tried == (2 if content is None else 1)


def test_without_a_home_everything_is_proved(unproved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SEGFLOW_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    proof = Proof()
    for _ in range(2):
        prove_once(proof, "reach", "digest")
    assert proof.tried == 2


def test_a_model_is_tried_when_it_is_first_loaded_in_some_way(
    unproved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[str]()
    measure = segcore.model.largest_error

    def largest_error(segmenter, *others):  # type: ignore[no-untyped-def]
        tried.append(segmenter.engine)
        return measure(segmenter, *others)

    monkeypatch.setattr(segcore.model, "largest_error", largest_error)
    model = load_card(str(save_local_unet(tmp_path / "unet", "yx", width=8, poolings=2)))
    for _ in range(2):
        load_segmenter(model, 2)
    assert len(tried) == 1
    load_segmenter(model, 2, Staging(1, (40, 40)))
    load_segmenter(model, 2, engine="onnxruntime")
    load_segmenter(model, 1)
    assert len(tried) == 4
    lying = load_card(str(save_local_unet(tmp_path / "lying", "yx", width=8, poolings=2)))
    lying.card = lying.card.model_copy(update={"reach": (2, 2)})
    for _ in range(2):
        with pytest.raises(ModelError, match="is not local, or sees further than its card says"):
            load_segmenter(lying, 2)
    assert len(tried) == 6
