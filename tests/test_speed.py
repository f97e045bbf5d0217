"""What the time of a plan is predicted from."""

from __future__ import annotations

from pathlib import Path

import pytest

from segcore.speed import Speed, recall, remember


@pytest.fixture(autouse=True)
def nothing_known(unproved: Path) -> None:
    """The notes of a machine on which nothing has run."""


def test_a_speed_is_of_labelling_and_of_the_rest() -> None:
    remember("u-net", Speed(2e-6, 1e-7, 10**6))
    speed = recall("u-net")
    assert speed is not None
    assert speed.predict(1.5e6, 10**6) == pytest.approx(3.1)
    assert recall("another") is None


def test_a_small_scene_says_nothing_of_a_large_one() -> None:
    """What a process does once would be multiplied with its pixels."""
    tiny, usual = Speed(3e-4, 4e-4, 900), Speed(1e-6, 1e-7, 10**7)
    remember("u-net", tiny)
    assert recall("u-net") == tiny
    assert tiny.tells_of(900)
    assert not tiny.tells_of(10**7)
    remember("u-net", usual)
    assert recall("u-net") == usual
    assert usual.tells_of(900)
    remember("u-net", tiny)
    assert recall("u-net") == usual, "what is known of large scenes outlives small ones"
    like = Speed(2e-6, 1e-7, 4 * 10**6)
    remember("u-net", like)
    assert recall("u-net") == like, "the latest of those of a size"


def test_notes_of_an_earlier_version_are_not_read(unproved: Path) -> None:
    unproved.mkdir()
    (unproved / "speed.json").write_text('{"u-net": {"label": 1e-6, "rest": 1e-7}}')
    assert recall("u-net") is None
