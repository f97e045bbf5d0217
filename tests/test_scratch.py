"""Scratch: a chunk present is a tile done, and nothing else is."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from segcore.box import Box
from segcore.errors import ProductError
from segcore.grid import Grid
from segcore.io.scratch import Scratch

GRID = Grid("yx", (25, 17))


def create(root: Path, classes: int | None = None) -> Scratch:
    return Scratch.create(root, GRID, (10, 8), 255, classes)


def test_tiles_are_done_when_they_are_there(tmp_path: Path) -> None:
    scratch = create(tmp_path / "s")
    assert scratch.done() == set()
    labels = np.arange(80, dtype=np.uint8).reshape(10, 8)
    scratch.write((1, 0), Box((10, 0), (20, 8)), labels)
    # A tile that holds nothing but nodata is as done as any other.
    scratch.write((2, 2), Box((20, 16), (25, 17)), np.full((5, 1), 255, np.uint8))
    again = create(tmp_path / "s")
    assert again.done() == {(1, 0), (2, 2)}
    assert np.array_equal(again.read(Box((10, 0), (20, 8))), labels)
    assert np.array_equal(pickle.loads(pickle.dumps(again)).read(GRID.box), again.read(GRID.box))
    assert again.core == (10, 8)


def test_chunks_that_are_cut_short_are_made_again(tmp_path: Path) -> None:
    scratch = create(tmp_path / "s", classes=2)
    for row in (0, 1):
        core = Box((10 * row, 0), (10 * row + 10, 8))
        scratch.write((row, 0), core, np.ones((10, 8), np.uint8), np.ones((2, 10, 8), np.float32))
    chunk = tmp_path / "s" / "labels" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    assert scratch.done() == {(1, 0)}
    assert not chunk.exists()
    (tmp_path / "s" / "scores" / "c" / "1" / "1" / "0").write_bytes(b"")
    assert scratch.done() == set()


def test_damage_that_is_old_is_found_when_it_is_read(tmp_path: Path) -> None:
    scratch = create(tmp_path / "s")
    for row in (0, 1, 2):
        core = Box((10 * row, 0), (10 * row + 10, 8)) & GRID.box
        scratch.write((row, 0), core, np.ones(core.shape, np.uint8))
    chunks = [tmp_path / "s" / "labels" / "c" / str(row) / "0" for row in range(3)]
    chunks[0].write_bytes(chunks[0].read_bytes()[:-3])
    chunks[1].write_bytes(b"")
    for chunk in chunks[:2]:
        os.utime(chunk, (1e9, 1e9))
    assert scratch.done() == {(0, 0), (2, 0)}
    with pytest.raises(ProductError, match="1 damaged tiles") as caught:
        scratch.read(GRID.box)
    assert caught.value.retryable
    assert scratch.done() == {(2, 0)}


def test_a_tile_without_its_scores_is_not_done(tmp_path: Path) -> None:
    scratch = create(tmp_path / "s", classes=2)
    for row in (0, 1):
        core = Box((10 * row, 0), (10 * row + 10, 8))
        scratch.write((row, 0), core, np.ones((10, 8), np.uint8), np.ones((2, 10, 8), np.float32))
    (tmp_path / "s" / "scores" / "c" / "1" / "0" / "0").unlink()
    assert scratch.done() == scratch.present() == {(1, 0)}


@pytest.mark.parametrize("pixels", [1, 100, 10**6])
def test_pieces_are_whole_tiles_and_cover_the_grid_once(tmp_path: Path, pixels: int) -> None:
    seen = np.zeros(GRID.shape, int)
    for box in create(tmp_path / "s").pieces(pixels):
        seen[box.slices()] += 1
        assert all(a % c == 0 for a, c in zip(box.start, (10, 8), strict=True))
    assert (seen == 1).all()


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    scratch = create(tmp_path / "s")
    leftover = tmp_path / "s" / "labels" / "c" / "0" / "0.3f2a.partial"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    assert scratch.done() == set()
    assert not leftover.exists()


def test_labels_and_scores_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 3, GRID.shape).astype(np.uint8), rng.random((3, *GRID.shape)).astype(np.float32)
    scratch = create(tmp_path / "s", classes=3)
    for i in range(3):
        for j in range(3):
            core = Box((10 * i, 8 * j), (10 * i + 10, 8 * j + 8)) & GRID.box
            scratch.write((i, j), core, labels[core.slices()], scores[(slice(None), *core.slices())])
    box = Box((3, 5), (24, 16))
    assert np.array_equal(scratch.read(box), labels[box.slices()])
    assert np.array_equal(scratch.read_scores(box, 1), scores[(1, *box.slices())])
    picks = [np.array([0, 7, 24]), np.array([2, 16])]
    assert np.array_equal(scratch.pick(picks), labels[np.ix_(*picks)])


def test_a_store_whose_metadata_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    create(tmp_path / "s").write((0, 0), Box((0, 0), (10, 8)), np.ones((10, 8), np.uint8))
    (tmp_path / "s" / "labels" / "zarr.json").write_text("{")
    assert create(tmp_path / "s").done() == set()


def test_a_store_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProductError, match="cannot write"):
        create(tmp_path / "file" / "s")
    with pytest.raises(ProductError, match="no scores"):
        create(tmp_path / "s").read_scores(GRID.box, 0)
