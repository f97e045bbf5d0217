"""How a run stands, from its files alone: no server is asked, and the run need not be alive."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from segcore.errors import ProductError
from segcore.ledger import (
    LEDGER_FILE,
    RUN_FILE,
    RUN_STARTED,
    SCENE_DONE,
    SCENE_FAILED,
    STATES,
    SceneEntry,
    mapping,
    number,
    read_back,
    seconds_of,
    whole,
)

#: Seconds without a heartbeat after which a run is asked for.
STALE_SECONDS = 60.0
#: A process may be this many seconds older than what its run says of its start.
_SLACK_SECONDS = 5.0
#: Three heartbeats: so long a run whose process is not to be seen may be in another container of the same name.
_GONE_SECONDS = 15.0
#: How many of the scenes that ended last tell how fast the run is now, and how many failures are named.
_RECENT, _LAST_FAILURES = 200, 5

Phase = Literal["running", "ended", "died", "silent"]
"""`died`: no heartbeat for 15 s, and its process is gone. `silent`: none for a minute, and nobody here can tell why."""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A scene that is being labelled: tiles done and in all."""

    name: str
    done: int
    total: int
    since: str


@dataclass(frozen=True, slots=True)
class Status:
    """How a run stands. Times in seconds; `heartbeat_age` counts from the last sign of life."""

    phase: Phase
    run_id: str
    model: str
    started: str
    ended: str
    host: str
    pid: int | None
    exit_code: int | None
    seconds: float
    heartbeat_age: float | None
    total: int
    counts: Mapping[str, int]
    under_way: tuple[UnderWay, ...]
    pixels_per_second: float | None
    seconds_left: float | None
    failures: tuple[SceneEntry, ...]
    warnings: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether somebody has to look: a scene failed, or the run did not end as it should."""
        return self.counts.get("failed", 0) > 0 or self.phase == "died" or self.exit_code in (1, 2)

    def to_json(self) -> dict[str, Any]:
        failures = [
            {"scene": entry.scene, "uri": entry.uri, "error": entry.error, "reason": entry.reason, "time": entry.time}
            for entry in self.failures
        ]
        fields = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("under_way", "failures")
        }
        return {**fields, "under_way": [asdict(scene) for scene in self.under_way], "failures": failures}


def read_run(out: Path) -> dict[str, Any]:
    """What the last run says of itself. Raises ProductError where there was none."""
    path = out / RUN_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProductError(
            f"{out} holds no {RUN_FILE}: nothing was run there; name the --out folder of a run"
        ) from error
    except (OSError, ValueError) as error:
        raise ProductError(f"{path} cannot be read ({error}); name the --out folder of a run") from error
    if not isinstance(document, dict) or "run_id" not in document:
        raise ProductError(f"{path} is not the file of a run; name the --out folder of a run")
    return document


def read_status(out: Path, at: float | None = None) -> Status:
    """How the last run into `out` stands, at a time in seconds since 1970 (now). Raises ProductError where none was."""
    run, moment = read_run(out), time.time() if at is None else at
    phase, age = _phase(run, moment)
    counts = {str(state): whole(count) for state, count in mapping(run.get("counts")).items()}
    under_way = tuple(
        UnderWay(
            str(each.get("name", "")), whole(each.get("done")), whole(each.get("total")), str(each.get("since", ""))
        )
        for each in run.get("under_way") or ()
        if isinstance(each, dict)
    )
    recent = _Recent.of(out / LEDGER_FILE, str(run["run_id"]))
    total, ended = whole(run.get("total")), sum(count for state, count in counts.items() if state != "waiting")
    began = seconds_of(run.get("started"))
    last = moment if phase == "running" else moment - age if age is not None else moment
    seconds = number(run.get("seconds")) or 0.0
    if phase != "ended" and began is not None:
        seconds = max(seconds, last - began)
    partly = sum(scene.done / scene.total for scene in under_way if scene.total)
    return Status(
        phase=phase,
        run_id=str(run["run_id"]),
        model=str(run.get("model", "")),
        started=str(run.get("started", "")),
        ended=str(run.get("ended") or ""),
        host=str(run.get("host", "")),
        pid=run["pid"] if isinstance(run.get("pid"), int) else None,
        exit_code=run["exit_code"] if isinstance(run.get("exit_code"), int) else None,
        seconds=round(seconds, 3),
        heartbeat_age=round(age, 3) if age is not None else None,
        total=total,
        counts=counts,
        under_way=under_way if phase != "ended" else (),
        pixels_per_second=recent.pixels_per_second(began),
        seconds_left=recent.seconds_left(total - ended, partly, began, moment) if phase == "running" else None,
        failures=recent.failures,
        warnings=tuple(str(warning) for warning in run.get("warnings") or ()),
    )


def _phase(run: Mapping[str, Any], moment: float) -> tuple[Phase, float | None]:
    beat = seconds_of(run.get("heartbeat")) or seconds_of(run.get("started"))
    age = max(0.0, moment - beat) if beat is not None else None
    if run.get("ended") or run.get("exit_code") is not None:
        return "ended", age
    if age is not None and age <= _GONE_SECONDS:
        return "running", age
    pid = run.get("pid")
    if isinstance(pid, int) and run.get("host") == platform.node() and not _alive(pid, seconds_of(run.get("started"))):
        return "died", age
    return "running" if age is not None and age <= STALE_SECONDS else "silent", age


def _alive(pid: int, began: float | None) -> bool:
    """Whether the process is still there, and is not another one that was given the same number later."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    try:  # Linux tells when a process began: ticks since the boot, behind the name in brackets
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        since = int(boot.split()[1]) + int(stat[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return True
    return stat[0] != "Z" and (began is None or since <= began + _SLACK_SECONDS)


@dataclass(frozen=True, slots=True)
class _Recent:
    """The scenes of a run that ended last: when, in how many pixels, and those that failed."""

    ends: tuple[float, ...]
    pixels: int
    failures: tuple[SceneEntry, ...]

    @classmethod
    def of(cls, path: Path, run_id: str) -> _Recent:
        ends: list[float] = []
        failures: list[SceneEntry] = []
        pixels = 0
        for event in read_back(path):
            if event.get("run_id") != run_id:
                continue
            kind = event["event"]
            if kind == RUN_STARTED:
                break
            if STATES.get(kind, "unfinished") == "unfinished":
                continue
            ended = seconds_of(event.get("time"))
            if ended is not None and len(ends) < _RECENT:
                ends.append(ended)
                pixels += whole(event.get("pixels")) if kind == SCENE_DONE else 0
            if kind == SCENE_FAILED and len(failures) < _LAST_FAILURES:
                failures.append(SceneEntry(str(event.get("scene", "")), "failed", event))
        return cls(tuple(ends), pixels, tuple(failures))

    def pixels_per_second(self, began: float | None) -> float | None:
        """Of the whole run, all scenes side by side, over the scenes that ended last."""
        if not self.ends or not self.pixels:
            return None
        first = began if len(self.ends) < _RECENT and began is not None else self.ends[-1]
        return self.pixels / (self.ends[0] - first) if self.ends[0] > first else None

    def seconds_left(self, scenes: int, partly: float, began: float | None, moment: float) -> float | None:
        """How long the rest takes if it goes on as over the scenes that ended last; `partly`: under way, in scenes."""
        if scenes <= 0:
            return 0.0
        first = began if len(self.ends) < _RECENT and began is not None else self.ends[-1] if self.ends else None
        if first is None or moment <= first or len(self.ends) + partly < 1:
            return None
        return round(max(0.0, scenes - partly) * (moment - first) / (len(self.ends) + partly), 1)
