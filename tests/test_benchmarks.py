"""The cheap parts of the benchmarks: mosaics are the chip again and again, and processes are measured whole."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from benchmarks import scenes
from benchmarks.agreement import boxes_of, change, format_boxes, keep, kept, parse_boxes, same_labels
from benchmarks.measure import measure
from benchmarks.table import Row, table

from segcore.io import open_scene
from segcore.io.source import Wanted
from segcore.spec import Settings

MIB = 2**20


def test_a_mosaic_is_the_chip_and_its_mirror_image(tmp_path: Path) -> None:
    names = ("red", "swir22")
    path = scenes.mosaic(2050, names, tmp_path)
    with rasterio.open(path) as file:
        assert (file.shape, file.dtypes, file.descriptions) == ((2050, 2050), ("uint16",) * 2, names)
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        values = file.read()
    chip, _ = scenes._chip(names)
    rows, columns = chip.shape[1:]
    assert (rows, columns) == (1947, 1933)
    assert np.array_equal(values[:, :rows, :columns], chip)
    assert np.array_equal(values[:, rows:, :columns], chip[:, ::-1][:, : 2050 - rows])
    assert np.array_equal(values[:, :rows, columns:], chip[:, :, ::-1][:, :, : 2050 - columns])
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing unfinished stays"


def test_a_volume_is_the_head_and_its_mirror_image(tmp_path: Path, head: Path) -> None:
    wanted = Wanted(("T1w",), "xyz")
    large = open_scene(str(scenes.volume(190, tmp_path)), wanted, Settings())
    small = open_scene(str(head), wanted, Settings())
    large, small = (scene.stage(tmp_path) for scene in (large, small))
    values, chip = large.read(large.grid.box)[0], small.read(small.grid.box)[0]
    assert values.shape == (190, 190, 190)
    assert np.array_equal(values[:176], chip[:, :190, :190])
    assert np.array_equal(values[176:], chip[::-1][:14, :190, :190])


def test_a_process_and_its_child_are_measured() -> None:
    child = f"import time; held = b'1' * {150 * MIB}; time.sleep(1)"
    parent = (
        f"import json, subprocess, sys; held = b'1' * {100 * MIB}\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
        f"sum(range(10**6)); print('words'); print(json.dumps({{'said': 7}}))"
    )
    found = measure([sys.executable, "-c", parent])
    assert found.said == {"said": 7}
    assert 250 < found.peak < 350, "what both hold at one time"
    assert found.wall >= 1
    assert found.cpu > 0


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3:\s+no such luck"):
        measure([sys.executable, "-c", "import sys; print('no such luck', file=sys.stderr); sys.exit(3)"])


def test_a_process_is_stopped_when_it_has_come_far_enough(tmp_path: Path) -> None:
    sign = tmp_path / "pid"
    program = f"import os, time; open({str(sign)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    began = time.monotonic()
    found = measure([sys.executable, "-c", program], lambda: sign.exists() and sign.read_text() != "")
    assert found.wall <= time.monotonic() - began
    with pytest.raises(ProcessLookupError):
        os.kill(int(sign.read_text()), 0)


def test_labels_are_compared_in_boxes(tmp_path: Path) -> None:
    assert [box.shape for box in boxes_of((2000, 2000))] == [(2000, 2000)]
    boxes = boxes_of((2064, 8000))
    assert parse_boxes(format_boxes(boxes)) == boxes
    assert all(b <= n for box in boxes for b, n in zip(box.stop, (2064, 8000), strict=True))
    scores = np.random.default_rng(0).random((3, 4, 5), np.float32)
    keep(tmp_path / "scores.npz", [scores])
    labels = scores.argmax(0).astype(np.float32)
    labels[0, 0] += 1
    assert same_labels([labels], kept(tmp_path / "scores.npz")) == 19 / 20
    assert change([scores + np.float32(0.25)], [scores]) == pytest.approx(0.25)


def test_ratios_are_of_pace_not_of_seconds() -> None:
    one = measure([sys.executable, "-c", "print('{}')"])
    text = table("rows", [Row("small", one, 1), Row("large", one, 4, {"engine": "some"})])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert cells[0][3] == "ratio"
    assert [row[3] for row in cells[2:]] == ["1.00", "0.25"]
    assert [row[-1] for row in cells[2:]] == ["", "some"]
