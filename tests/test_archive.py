"""Archives: many scenes side by side; limits, retries, quarantine, what a run writes, and runs that end early."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import save_local_unet, segflow_command
from rasterio.transform import from_origin

from flows.archive import Archive
from flows.batch import Limits, Summary
from flows.console import Silent
from segcore import ledger
from segcore.errors import PlanError, PoisonError, SceneError, StoppedError
from segcore.io import Problem
from segcore.lock import locked
from segcore.scene import Outcome
from segcore.spec import Job, parse_seconds

Run = Callable[..., subprocess.CompletedProcess[str]]


def write(path: Path, seed: int, side: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", count=1, height=side, width=side, dtype="float32",
                       crs="EPSG:32616", transform=from_origin(452475, 3408645, 30, 30)) as file:  # fmt: skip
        file.write(np.random.default_rng(seed).random((1, side, side)).astype(np.float32))
    return path


class Fake:
    """Labels scenes by their names, and notes which it labelled, side by side with how many."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.names, self.most, self.alone = seconds, list[str](), 0, set[bool]()
        self._inside, self._lock, self.drained = 0, threading.Lock(), threading.Event()

    def __call__(self, job: Job, progress: Callable[[str, int, int], None]) -> Outcome:
        with self._lock:
            self.names.append(job.name)
            self.alone.add(job.alone)
            self._inside += 1
            self.most = max(self.most, self._inside)
        try:
            progress(job.name, 0, 1)
            if self.drained.wait(self.seconds):
                raise StoppedError("stopped")
            if job.name.startswith("odd"):
                raise KeyError("a fault of segflow")
            if job.name.startswith("bad"):
                raise SceneError(f"{job.uri} is damaged")
            if job.name.startswith("away") and self.names.count(job.name) < 2:
                raise SceneError("storage was away", retryable=True)
            if job.name.startswith("poison"):
                raise PoisonError("tile (0, 0) killed its worker, 2 times")
            state = "up to date" if job.name.startswith("old") else "done"
            return Outcome(state, job.name, job.uri, f"{job.out}/{job.name}/{job.name}.json", 0.0, tiles=1, pixels=100)
        finally:
            with self._lock:
                self._inside -= 1


def run(out: Path, names: Sequence[str], fake: Fake, alone: Fake | None = None, **limits: Any) -> Summary:
    jobs = [Job(name, name, "m", str(out)) for name in names]
    return Archive(jobs, fake, fake.drained.set, Silent(), Limits(**limits), label_alone=alone).run()


def states(summary: Summary) -> dict[str, str]:
    return {record.name: record.state for record in summary.records}


def test_every_scene_ends_in_one_state_and_the_files_say_so(tmp_path: Path) -> None:
    summary = run(tmp_path, ["odd", "good", "bad", "old", "poison", "away"], fake := Fake(0.2))
    assert states(summary) == {"odd": "failed", "good": "done", "bad": "failed", "old": "up to date",
                               "poison": "quarantined", "away": "done"}  # fmt: skip
    assert summary.exit_code == 1
    assert fake.names.count("away") == 2
    assert fake.most > 1
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["counts"] == {"done": 2, "up to date": 1, "failed": 2, "quarantined": 1, "waiting": 0}
    assert document["exit_code"] == 1
    assert document["ended"] >= document["started"]
    assert "Traceback" in next(s["details"]["traceback"] for s in document["scenes"] if s["name"] == "odd")
    rows = list(csv.DictReader((tmp_path / "failures.csv").read_text().splitlines()))
    assert {row["scene"]: row["state"] for row in rows} == {"odd": "failed", "bad": "failed", "poison": "quarantined"}
    assert "unexpected KeyError" in next(row["reason"] for row in rows if row["scene"] == "odd")
    assert {"report.html", "metrics.prom"} < {path.name for path in tmp_path.iterdir()}
    past = ledger.Ledger(tmp_path / "events.jsonl")
    assert {name: past[name].state for name in past} == states(summary)
    assert past.runs[summary.run_id].exit_code == 1


def test_quarantined_scenes_are_left_alone_until_they_are_asked_for(tmp_path: Path) -> None:
    run(tmp_path, ["poison", "good"], Fake())
    again = run(tmp_path, ["poison", "good"], fake := Fake())
    assert fake.names == ["good"]
    assert states(again)["poison"] == "quarantined"
    assert again.exit_code == 1
    assert "--retry-failed" in again.records[0].reason
    retried = run(tmp_path, ["poison", "good"], fake := Fake(), retry_failed=True)
    assert sorted(fake.names) == ["good", "poison"]
    assert states(retried)["poison"] == "quarantined"


def test_so_many_scenes_and_no_more(tmp_path: Path) -> None:
    names = ["old1", "a", "b", "c", "d"]
    first = run(tmp_path, names, fake := Fake(), max_scenes=2, scenes_at_once=1)
    assert fake.names == ["old1", "a", "b"]
    assert first.exit_code == 75
    assert first.counts["waiting"] == 2
    assert "--max-scenes 2" in first.reason


def test_a_run_stops_when_too_many_fail(tmp_path: Path) -> None:
    names = [f"bad{i}" for i in range(30)] + ["good"]
    summary = run(tmp_path, names, fake := Fake(), max_failure_rate=0.5)
    assert 10 <= len(fake.names) < 20
    assert summary.exit_code == 1
    assert "10 of 10 scenes failed" in summary.warnings[0]
    fine = run(tmp_path / "other", ["bad", *(f"good{i}" for i in range(12))], Fake(), max_failure_rate=0.5)
    assert fine.counts["done"] == 12


def test_a_run_stops_after_its_time_and_says_how_to_go_on(tmp_path: Path) -> None:
    began = time.monotonic()
    summary = run(tmp_path, ["a", "b", "c", "d"], Fake(600.0), stop_after=1.0)
    assert time.monotonic() - began < 10
    assert summary.exit_code == 75
    assert summary.counts["waiting"] == 4
    assert json.loads((tmp_path / "run.json").read_text())["exit_code"] == 75


def test_what_was_under_way_when_a_run_died_comes_last_and_alone(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    for name in ("killer", "beside"):
        ledger.append(events, ledger.new_event(ledger.SCENE_STARTED, "dead", {"scene": name, "uri": name}))
    alone = Fake()
    summary = run(tmp_path, ["killer", "a", "beside", "b"], fake := Fake(), alone)
    assert sorted(fake.names) == ["a", "b"]
    assert alone.names == ["killer", "beside"]
    assert alone.most == 1
    assert (alone.alone, fake.alone) == ({True}, {False})
    assert summary.exit_code == 0
    # What a run left that was told to stop is not suspect.
    stopped = run(tmp_path / "stopped", ["a", "b"], Fake(600.0), stop_after=0.5)
    assert stopped.exit_code == 75
    resumed = Fake()
    run(tmp_path / "stopped", ["a", "b"], resumed, Fake())
    assert sorted(resumed.names) == ["a", "b"]


def test_limits_count_the_work_of_this_run_alone(tmp_path: Path) -> None:
    """Neither what leads to no scene nor what was quarantined long ago took work."""
    for i in range(12):
        ledger.append(tmp_path / "events.jsonl", ledger.new_event(
            ledger.SCENE_QUARANTINED, "earlier", {"scene": f"poison{i}", "uri": "p", "reason": "killed its worker"}
        ))  # fmt: skip
    names = [*(f"poison{i}" for i in range(12)), "a", "b", "c"]
    fake = Fake()
    jobs = [Job(name, name, "m", str(tmp_path)) for name in names]
    problems = [Problem(f"gone{i}.tif", "there is no such file") for i in range(12)]
    limits = Limits(max_scenes=2, max_failure_rate=0.1, scenes_at_once=1)
    summary = Archive(jobs, fake, fake.drained.set, Silent(), limits, problems).run()
    assert fake.names == ["a", "b"]
    assert summary.counts == {"done": 2, "up to date": 0, "failed": 12, "quarantined": 12, "waiting": 1}
    rows = list(csv.DictReader((tmp_path / "failures.csv").read_text().splitlines()))
    assert sum(row["state"] == "failed" for row in rows) == 12
    run(tmp_path, ["c"], Fake())  # the links were mended: they are no failures any more
    rows = list(csv.DictReader((tmp_path / "failures.csv").read_text().splitlines()))
    assert {row["state"] for row in rows} == {"quarantined"}


def test_what_failed_before_is_not_in_the_way_of_the_rest(tmp_path: Path) -> None:
    names = ["bad1", "bad2", "a", "b"]
    assert run(tmp_path, names, Fake(), max_scenes=2, scenes_at_once=1).counts["failed"] == 2
    run(tmp_path, names, again := Fake(), max_scenes=2, scenes_at_once=1)
    assert again.names == ["a", "b"]
    assert again.alone == {True}


def test_a_scene_that_hangs_is_given_up_and_may_end_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs where no deadline of tiles reaches. That it ends at last, while the run drains, changes nothing."""
    monkeypatch.setattr("flows.archive._GRACE", 0.5)
    fake, hung, ended = Fake(), threading.Event(), threading.Event()

    def label(job: Job, progress: Callable[[str, int, int], None]) -> Outcome:
        if job.name == "hung":
            hung.wait(60)
            ended.set()
        return fake(job, progress)

    def drain() -> None:
        hung.set()
        ended.wait(60)
        time.sleep(0.2)
        fake.drained.set()

    fake.seconds = 600.0
    jobs = [Job(name, name, "m", str(tmp_path)) for name in ("hung", "a")]
    limits = Limits(scene_seconds=0.2, stop_after=2.0, scenes_at_once=1)
    summary = Archive(jobs, label, drain, Silent(), limits).run()
    assert states(summary)["hung"] == "failed"
    assert "hangs in a file" in summary.records[0].reason


def test_a_run_that_is_to_stop_leaves_what_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.archive._GRACE", 0.2)
    monkeypatch.setattr("flows.archive._DRAIN", 0.1)
    fake = Fake(600.0)
    jobs = [Job("hung", "hung", "m", str(tmp_path))]
    summary = Archive(jobs, fake, lambda: None, Silent(), Limits(stop_after=0.2)).run()
    fake.drained.set()
    assert summary.exit_code == 75
    assert "hung did not end in time" in summary.warnings[0]
    assert ledger.Ledger(tmp_path / "events.jsonl").runs[summary.run_id].exit_code == 75


def test_a_run_that_stops_leaves_to_the_next_what_may_pass(tmp_path: Path) -> None:
    """A scene whose storage was away is not failed because the run ended before its next attempt."""
    summary = run(tmp_path, ["away", "slow"], Fake(), stop_after=0.5)
    assert summary.counts["waiting"] == 1
    assert summary.exit_code == 75


def test_a_scene_that_another_run_has_in_work_is_not_suspect(tmp_path: Path) -> None:
    for name in ("held", "dead"):
        event = ledger.new_event(ledger.SCENE_STARTED, "other", {"scene": name, "uri": name})
        ledger.append(tmp_path / "events.jsonl", event)
    alone = Fake()
    with locked(tmp_path / ".segflow" / "held", 0):
        run(tmp_path, ["held", "dead"], fake := Fake(), alone)
    assert (fake.names, alone.names) == (["held"], ["dead"])


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    summary = run(tmp_path, ["good"], Fake())
    assert summary.exit_code == 0
    assert "report.html" in summary.warnings[0]


def test_a_signal_before_the_first_scene_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise SystemExit(130)

    monkeypatch.setattr(Archive, "_arrange", stop)
    with pytest.raises(SystemExit):
        run(tmp_path, ["a"], Fake())
    document = json.loads((tmp_path / "run.json").read_text())
    assert (document["exit_code"], document["reason"]) == (130, "stopped by a signal")


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = run(tmp_path / "file", ["good"], Fake())
    assert blocked.exit_code == 0
    assert any("run.json" in warning for warning in blocked.warnings)


def test_the_same_trouble_is_one_warning_however_often_it_comes(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    troubled = run(tmp_path, ["good"], Fake())
    said = f"cannot write {tmp_path / 'run.json'}: Is a directory"
    assert [warning for warning in troubled.warnings if warning.startswith("cannot write " + str(tmp_path))] == [said]


def test_limits_and_times_are_checked() -> None:
    with pytest.raises(PlanError, match="--max-scenes 0 must be 1 or more"):
        Limits(max_scenes=0)
    with pytest.raises(PlanError, match=r"--max-failure-rate 1\.5 must be 0 to 1"):
        Limits(max_failure_rate=1.5)
    assert [parse_seconds("--stop-after", text) for text in ("45", "45s", "1.5m", "6h", "2d")] == [
        45, 45, 90, 21600, 172800
    ]  # fmt: skip
    for text in ("", "soon", "-3h", "0", "1w", "nan"):
        with pytest.raises(PlanError, match="is no time"):
            parse_seconds("--stop-after", text)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    for i in range(6):
        write(tmp_path / "scenes" / f"s{i}.tif", i)
    (tmp_path / "scenes" / "torn.tif").write_bytes((tmp_path / "scenes" / "s0.tif").read_bytes()[:100])
    return tmp_path / "scenes"


def test_the_command_runs_an_archive_and_only_what_is_new(tmp_path: Path, scenes: Path, run_segflow: Run) -> None:
    model, out = save_local_unet(tmp_path / "unet", "yx"), tmp_path / "out"
    dry = run_segflow("run", scenes, "-m", model, "-o", out, "--dry-run", "--json")
    assert json.loads(dry.stdout)["counts"] == {"new": 6, "refused": 1}
    foreseen = {scene["name"]: scene["memory"] for scene in json.loads(dry.stdout)["scenes"]}
    assert not out.exists()
    refused = run_segflow("run", scenes, "-m", model, "-o", out, "--dry-run", "--workers", 0, "--tile-timeout", "5s")
    assert refused.returncode == 2
    assert "use --workers 1" in refused.stderr
    first = run_segflow("run", scenes, "-m", model, "-o", out, "--max-scenes", 4, "--json")
    told = json.loads(first.stdout)
    assert first.returncode == 75, first.stderr
    assert told["counts"]["done"] + told["counts"]["failed"] == 4
    second = json.loads(run_segflow("run", scenes, "-m", model, "-o", out, "--json").stdout)
    assert second["counts"] == {"done": 6 - told["counts"]["done"], "up to date": told["counts"]["done"],
                                "failed": 1, "quarantined": 0, "waiting": 0}  # fmt: skip
    assert second["exit_code"] == 1
    for i in range(6):  # what is foreseen counts scenes side by side, as a run does
        made = json.loads((out / f"s{i}" / f"s{i}.json").read_text())["properties"]
        assert made["segflow:plan"]["predicted_memory_bytes"] == foreseen[f"s{i}"]
    write(scenes / "s1.tif", 99)
    dry = run_segflow("run", scenes, "-m", model, "-o", out, "--dry-run")
    assert dry.returncode == 1
    assert "changed     s1" in dry.stdout
    assert "5 up to date" in dry.stdout


def test_two_runs_at_once_label_each_scene_once(tmp_path: Path, scenes: Path) -> None:
    model, out = save_local_unet(tmp_path / "unet", "yx"), tmp_path / "out"
    command = [
        segflow_command(),
        "run",
        str(scenes),
        "-m",
        str(model),
        "-o",
        str(out),
        "--no-prefect",
        "--workers",
        "0",
    ]
    both = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(200) for process in both] == [1, 1]
    events = list(ledger.read(out / "events.jsonl"))
    done = [event["scene"] for event in events if event["event"] == ledger.SCENE_DONE]
    assert sorted(done) == [f"s{i}" for i in range(6)]
    assert not list((out / ".segflow").glob("s*"))


def test_sigterm_drains_in_ten_seconds_and_the_next_run_goes_on(tmp_path: Path) -> None:
    model, out = save_local_unet(tmp_path / "unet", "yx", width=16, poolings=2), tmp_path / "out"
    for i in range(3):
        write(tmp_path / "scenes" / f"s{i}.tif", i, 1500)
    command = [segflow_command(), "run", str(tmp_path / "scenes"), "-m", str(model), "-o", str(out), "--no-prefect",
               "--tile", "64"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    labels = out / ".segflow"
    until = time.monotonic() + 120
    while len(list(labels.glob("s*/*/labels/c/*/*"))) < 30:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert time.monotonic() - began < 15
    assert process.stderr is not None
    with process.stderr as said:
        told = said.read()
    assert "Traceback" not in told
    assert "stopped; run the same command again to go on" in told
    assert json.loads((out / "run.json").read_text())["exit_code"] == 75
    kept = len(list(labels.glob("s*/*/labels/c/*/*")))
    ended = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)["scenes"]
    assert sum(scene["details"]["tiles_kept"] for scene in found if scene["state"] == "done") == kept
    assert os.listdir(labels) in ([], [".thumbs"])
