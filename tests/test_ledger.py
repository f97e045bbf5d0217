"""The ledger: whole lines whatever is killed and whoever writes beside, and the latest state of every scene."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcore import ledger
from segcore.errors import ProductError
from segcore.ledger import (
    RUN_ENDED,
    RUN_STARTED,
    SCENE_DONE,
    SCENE_FAILED,
    SCENE_QUARANTINED,
    SCENE_STARTED,
    SCENE_UP_TO_DATE,
    Ledger,
    append,
    new_event,
    read,
    read_back,
    write_failures,
)

APPEND = """
import sys
from pathlib import Path
from segcore.ledger import SCENE_DONE, append, new_event
for n in range(300):
    append(Path(sys.argv[1]), new_event(SCENE_DONE, sys.argv[2], {"scene": f"s{n}", "filler": "x" * (n * 7 % 5000)}))
"""


def write(path: Path, *events: tuple[str, str, dict[str, Any]]) -> Path:
    for kind, run_id, fields in events:
        append(path, new_event(kind, run_id, fields))
    return path


def test_processes_side_by_side_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), f"run {n}"]) for n in range(3)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 900
    for n in range(3):
        mine = [event["scene"] for line in lines if (event := json.loads(line))["run_id"] == f"run {n}"]
        assert mine == [f"s{i}" for i in range(300)]


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl", (SCENE_DONE, "r1", {"scene": "a"}), (SCENE_DONE, "r1", {"scene": "b"}))
    whole = path.read_bytes()
    for length in range(len(whole.splitlines()[0]) + 2, len(whole)):  # the second line, cut anywhere
        path.write_bytes(whole[:length])
        assert [event["scene"] for event in read(path)] == ["a"]
        append(path, new_event(SCENE_DONE, "r2", {"scene": "c"}))
        scenes = [event["scene"] for event in read(path)]
        assert scenes in (["a", "c"], ["a", "b", "c"])  # the latter where the cut took but the end of the line
        assert [event["scene"] for event in read_back(path)] == scenes[::-1]


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = b"[1]", b'"x"', b'{"event": "a.later.word", "scene": "b"}', b'{"a": 1}', b'{"event": 3}', b"\xff\xfe", b""
    path.write_bytes(b"\n".join([*lines, b'{"event": "scene.done", "scene": "a"}', b""]))
    assert [event["scene"] for event in read(path)] == ["b", "a"]
    assert list(Ledger(path)) == ["a"]
    assert list(Ledger(tmp_path / "none.jsonl")) == list(read(tmp_path / "none.jsonl")) == []
    assert list(read_back(tmp_path / "none.jsonl")) == []


@given(st.lists(st.integers(0, 3000), max_size=30), st.booleans())
def test_read_from_both_ends(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], torn: bool) -> None:
    path = tmp_path_factory.mktemp("ledger") / "events.jsonl"
    lines = [json.dumps({"event": SCENE_DONE, "scene": f"{n}", "filler": "é" * n}) for n in lengths]
    path.write_text("".join(f"{line}\n" for line in lines) + ('{"event": "scene.do' if torn else ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "_BLOCK_BYTES", 1000)
        assert list(read_back(path)) == list(read(path))[::-1] == [json.loads(line) for line in lines][::-1]


def test_latest_state_of_every_scene(tmp_path: Path) -> None:
    made = {"uri": "/in/a.tif", "product": "a/a.json", "seconds": 2.0, "tiles": 4, "pixels": 100, "classes": []}
    path = write(
        tmp_path / "events.jsonl",
        (RUN_STARTED, "r1", {"total": 3, "model": "m", "command": []}),
        (SCENE_STARTED, "r1", {"scene": "a", "uri": "/in/a.tif"}),
        (SCENE_DONE, "r1", {"scene": "a", **made}),
        (SCENE_STARTED, "r1", {"scene": "b", "uri": "/in/b.tif"}),
        (RUN_STARTED, "r2", {"total": 3, "model": "m", "command": []}),
        (SCENE_UP_TO_DATE, "r2", {"scene": "a", "uri": "/in/a.tif", "product": "a/a.json"}),
        (SCENE_FAILED, "r2", {"scene": "b", "uri": "/in/b.tif", "error": "SceneError", "reason": "x", "attempts": 3}),
        (SCENE_QUARANTINED, "r2", {"scene": "c", "uri": "/in/c.tif", "reason": "failed 5 times"}),
        (RUN_ENDED, "r2", {"exit_code": 1, "seconds": 3.0, "counts": {}, "reason": ""}),
        (SCENE_STARTED, "r3", {"scene": "e"}),
    )  # fmt: skip
    found = Ledger(path)
    assert {name: entry.state for name, entry in found.items()} == {
        "a": "up to date",
        "b": "failed",
        "c": "quarantined",
        "e": "unfinished",
    }
    assert found["a"].product == "a/a.json"
    assert found["a"].made is not None
    assert found["a"].made["pixels"] == 100
    assert (found["b"].error, found["b"].reason, found["b"].attempts) == ("SceneError", "x", 3)
    assert [entry.scene for entry in found.troubled()] in (["c", "b"], ["b", "c"])
    first, second = found.runs["r1"], found.runs["r2"]
    assert (first.total, first.count("done"), first.pixels, first.tiles, first.ended) == (3, 1, 100, 4, "")
    assert (second.count("up to date"), second.count("failed"), second.exit_code) == (1, 1, 1)
    assert (found.totals.scenes, found.totals.pixels, found.totals.failures, found.totals.last_success) == (
        1,
        100,
        1,
        "",
    )


def test_refresh_reads_what_was_appended_since(tmp_path: Path) -> None:
    path = write(tmp_path / "events.jsonl", (SCENE_STARTED, "r", {"scene": "a"}))
    found = Ledger(path)
    with path.open("ab") as file:
        file.write(b'{"event": "scene.fail')
        file.flush()
        found.refresh()  # half a line of another process, whose other half is on its way
        file.write(b'ed", "scene": "b", "run_id": "r"}\n')
    write(path, (SCENE_DONE, "r", {"scene": "a", "tiles": 2}))
    found.refresh()
    found.refresh()
    assert {name: entry.state for name, entry in found.items()} == {"a": "done", "b": "failed"}
    assert found.totals == Ledger(path).totals
    assert found.runs == Ledger(path).runs
    assert found.totals.tiles == 2


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no event of the ledger"):
        new_event("scene.vanished", "r", {})
    with pytest.raises(ProductError, match=r"cannot append to .*: Is a directory; choose another --out"):
        append(tmp_path, new_event(SCENE_DONE, "r", {}))
    with pytest.raises(ProductError, match=r"cannot write .*: No such file or directory; choose another --out"):
        write_failures(tmp_path / "none" / "failures.csv", [])


def test_failures_as_a_table(tmp_path: Path) -> None:
    uri, reason = '/in/a, \udc80 "b".tif', 'line one\nline "two", and a comma'
    path = write(
        tmp_path / "events.jsonl",
        (SCENE_FAILED, "r", {"scene": "a", "uri": uri, "error": "SceneError", "reason": reason, "attempts": 2}),
        (SCENE_DONE, "r", {"scene": "b", "uri": "/in/b.tif"}),
        (SCENE_QUARANTINED, "r", {"scene": "c", "uri": "/in/c.tif", "reason": "too often"}),
    )
    write_failures(tmp_path / "failures.csv", Ledger(path).troubled())
    with (tmp_path / "failures.csv").open(newline="") as file:
        rows = {row["scene"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a", "c"}
    assert rows["a"]["uri"] == uri.replace("\udc80", "\\udc80")
    assert (rows["a"]["reason"], rows["a"]["attempts"], rows["a"]["state"]) == (reason, "2", "failed")
    assert (rows["c"]["reason"], rows["c"]["attempts"]) == ("too often", "")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
