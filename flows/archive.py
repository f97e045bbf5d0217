"""An archive: many scenes, one model, one output folder, side by side until all are done or a limit is reached.

Knows nothing of Prefect: a flow and a plain loop both run it. Every scene ends as done, up to date, failed or
quarantined, or was not begun; what became of it is in the ledger at once, and in `run.json` within seconds.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.batch import NOTHING_RUN, STOPPED, Limits, SceneRecord, State, Summary
from flows.console import Reporter
from flows.journal import Journal
from segcore import ledger
from segcore.errors import InUseError, PoisonError, ProductError, SegcoreError, StoppedError, one_line
from segcore.io import Problem
from segcore.lease import Leases, guarding
from segcore.lock import Guarding, held
from segcore.scene import LOCK_SECONDS, Outcome
from segcore.spec import Job
from segcore.survey import HIDDEN

#: A scene whose fault may pass (storage was away, a worker lost) is tried so often, so many seconds apart.
ATTEMPTS, _PAUSE = 3, 5.0
#: Seconds until a scene is looked at again that another run has in work.
_BUSY_PAUSE = 2.0
#: Seconds that scenes under way are given to end their tiles when the run is stopped.
_DRAIN = 7.0
#: Scenes that must have ended before their failure rate says anything.
_ENOUGH = 10
#: Seconds that a scene may take beyond the deadline of its tiles before it is given up, and at least as long as that:
#: for its statistics, its product and the scenes before it. Its thread then hangs in a file.
_GRACE = 60.0
#: Details of a scene that failed which the ledger keeps.
_TOLD = {"attempts", "retryable", "problem"}

#: Labels one scene; the second argument hears of tiles done and in all. Raises SegcoreError.
Label = Callable[[Job, Callable[[str, int, int], None]], Outcome]


@dataclass(slots=True)
class _Visit:
    """A scene, and how often it was tried. `alone`: with nothing else under way, as it may have killed a run."""

    job: Job
    attempt: int = 1
    not_before: float = 0.0
    alone: bool = False
    busy_since: float | None = None


@dataclass(slots=True)
class _UnderWay:
    """A scene that is being labelled."""

    visit: _Visit
    since: str
    began: float
    done: int = 0
    total: int = 0


@dataclass(slots=True)
class Archive:
    """One run over many scenes.

    `label` labels one scene; `label_alone`, where it differs, one that may have killed the process of an earlier run;
    `drain` makes whatever they are in end soon; `retry`: whether a scene is tried again here when its fault may pass.
    """

    jobs: Sequence[Job]
    label: Label
    drain: Callable[[], None]
    reporter: Reporter
    limits: Limits = field(default_factory=Limits)
    problems: Sequence[Problem] = ()
    label_alone: Label | None = None
    retry: bool = True
    command: str = ""
    warnings: list[str] = field(default_factory=list)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _records: dict[str, SceneRecord] = field(default_factory=dict)
    _under_way: dict[str, _UnderWay] = field(default_factory=dict)
    _given_up: set[str] = field(default_factory=set)
    _ended: queue.SimpleQueue[tuple[_Visit, Outcome | Exception, float]] = field(default_factory=queue.SimpleQueue)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _started: str = ""
    _began: float = 0.0
    _worked: int = 0
    _in_vain: int = 0
    _reason: str = ""
    _stopped: bool = False
    _leave_at: float = math.inf
    _code: int | None = None
    _journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self._journal = Journal(self.out, self.run_id, self.warnings, self._stand)

    def run(self) -> Summary:
        """Label the scenes. Returns what became of them; a signal raises SystemExit, with everything written."""
        self._started, self._began = ledger.now(), time.monotonic()
        try:
            self._journal.event(ledger.RUN_STARTED, total=self._total, model=self.jobs[0].model, command=self.command)
            self._journal.begin()
            waiting, suspects = self._arrange()
            for problem in self.problems:
                self._settle(_record_of(problem))
            self._go(waiting, suspects)
            self._code = self._summary(ended=True).exit_code
        except BaseException as error:
            if isinstance(error, Exception):  # a fault of segflow, which the command says is code 2
                self._reason, self._code = f"unexpected {type(error).__name__}: {one_line(error)}", NOTHING_RUN
            else:
                code = getattr(error, "code", None)
                self._reason, self._code = "stopped by a signal", code if isinstance(code, int) and code else STOPPED
            self._stopped = True
            self._drain_all()
            raise
        finally:
            self._journal.close(self._stopped)
        return self._summary(ended=True)

    @property
    def out(self) -> Path:
        return Path(self.jobs[0].out)

    @property
    def _total(self) -> int:
        return len(self.jobs) + len(self.problems)

    def _arrange(self) -> tuple[deque[_Visit], deque[_Visit]]:
        """The scenes in order, and those that were under way when an earlier run died: they come last, and alone.

        What failed before comes behind what did not, so that a run of so many scenes gets on every night.
        """
        past = ledger.Ledger(self.out / ledger.LEDGER_FILE, empty=True)
        with contextlib.suppress(OSError):  # what cannot be read cannot be written either, which is a warning
            past.refresh()
        waiting, again, suspects = deque[_Visit](), deque[_Visit](), deque[_Visit]()
        for job in self.jobs:
            entry = past.get(job.name)
            if entry is not None and entry.state == "quarantined" and not self.limits.retry_failed:
                reason = f"{entry.reason} (found earlier; --retry-failed tries it again)"
                self._records[job.name] = SceneRecord(job.name, job.uri, "quarantined", 0.0, reason, entry.error)
                self._journal.event(ledger.SCENE_QUARANTINED, scene=job.name, uri=job.uri, reason=entry.reason)
            elif entry is not None and entry.state == "unfinished" and self._died_with_its_run(past, entry):
                suspects.append(_Visit(job, alone=self.label_alone is not None))
            else:
                (again if entry is not None and entry.state == "failed" else waiting).append(_Visit(job))
        return waiting + again, suspects

    def _died_with_its_run(self, past: ledger.Ledger, entry: ledger.SceneEntry) -> bool:
        """Whether the run that began a scene has died: it did not say that it ended, and does not hold the scene."""
        run = past.runs.get(str(entry.last.get("run_id")))
        if run is None or run.ended:
            return False
        with contextlib.suppress(ProductError):
            return not held(self.out / HIDDEN / entry.scene)
        return True

    def _go(self, waiting: deque[_Visit], suspects: deque[_Visit]) -> None:
        while True:
            if not waiting and not self._under_way and suspects:
                waiting.append(suspects.popleft())
            while (visit := self._next(waiting)) is not None:
                self._begin(visit)
            if not self._under_way and (not waiting or self._reason):
                return
            with contextlib.suppress(queue.Empty):
                self._end(*self._ended.get(timeout=0.2), waiting)
            self._look_at_limits()
            if time.monotonic() > self._leave_at:
                self._journal.warn(
                    f"{', '.join(self._under_way)} did not end in time; the next run goes on with what is kept"
                )
                return

    def _next(self, waiting: deque[_Visit]) -> _Visit | None:
        """The scene that is to begin now, taken out of those that wait; None where none may."""
        under_way = len(self._under_way)
        if self._reason or under_way >= self.limits.at_once(len(self.jobs)):
            return None
        if any(scene.visit.alone for scene in self._under_way.values()):
            return None
        visit = next((visit for visit in waiting if visit.not_before <= time.monotonic()), None)
        if visit is None or (visit.alone and under_way):
            return None
        if self.limits.max_scenes is not None and self._worked + under_way >= self.limits.max_scenes:
            if not under_way:
                self._reason = f"--max-scenes {self.limits.max_scenes} is reached"
            return None
        waiting.remove(visit)
        return visit

    def _begin(self, visit: _Visit) -> None:
        job = visit.job
        with self._lock:
            self._under_way[job.name] = _UnderWay(visit, ledger.now(), time.monotonic())
        self._journal.event(ledger.SCENE_STARTED, scene=job.name, uri=job.uri, attempt=visit.attempt)
        # Whoever labels may look for its context: a flow run of Prefect is one.
        context = copy_context()
        threading.Thread(target=context.run, args=(self._attempt, visit), name=job.name, daemon=True).start()

    def _attempt(self, visit: _Visit) -> None:
        """Runs in a thread of its own."""
        began = time.monotonic()
        label = self.label_alone if visit.alone and self.label_alone is not None else self.label
        found: Outcome | Exception
        try:
            alone = visit.alone or self.limits.at_once(len(self.jobs)) == 1
            found = label(replace(visit.job, alone=alone), self._progress)
        except Exception as error:
            found = error
        self._ended.put((visit, found, time.monotonic() - began))

    def _progress(self, name: str, done: int, total: int) -> None:
        with self._lock:
            if (scene := self._under_way.get(name)) is not None:
                scene.done, scene.total = done, total
        self.reporter.progress(name, done, total)

    def _end(self, visit: _Visit, found: Outcome | Exception, seconds: float, waiting: deque[_Visit]) -> None:
        job = visit.job
        if job.name in self._given_up:
            return
        with self._lock:
            del self._under_way[job.name]
        if isinstance(found, StoppedError):
            self._reason = self._reason or str(found)
            return
        if isinstance(found, InUseError):
            # Another run has it: the next scene, and later this one again; a run that stops leaves it to the other.
            visit.busy_since = visit.busy_since or time.monotonic()
            if time.monotonic() - visit.busy_since < LOCK_SECONDS:
                visit.not_before = time.monotonic() + _BUSY_PAUSE
                waiting.append(visit)
                return
        passing = isinstance(found, SegcoreError) and found.retryable and not isinstance(found, PoisonError)
        if passing and self.retry and visit.attempt < ATTEMPTS:
            # A run that stops leaves it to the next one.
            pause = time.monotonic() + _PAUSE * visit.attempt
            waiting.append(_Visit(job, visit.attempt + 1, pause, visit.alone))
            return
        self._settle_work(_record(job, found, seconds, visit.attempt))

    def _settle_work(self, record: SceneRecord) -> None:
        """A scene of this run has ended; unless it was up to date, it took work. Limits count these alone."""
        self._worked += record.state != "up to date"
        self._in_vain += record.state in ("failed", "quarantined")
        self._settle(record)

    def _settle(self, record: SceneRecord) -> None:
        """A scene has ended: say so everywhere."""
        with self._lock:
            self._records[record.name] = record
        fields: dict[str, Any] = {"scene": record.name, "uri": record.uri, "seconds": record.seconds}
        if record.product:
            fields["product"] = os.path.relpath(record.product, self.out)
        if record.state == "done":
            event = ledger.SCENE_DONE
            fields |= {key: record.details[key] for key in ("tiles", "pixels", "classes")}
        elif record.state == "up to date":
            event = ledger.SCENE_UP_TO_DATE
        else:
            event = ledger.SCENE_QUARANTINED if record.state == "quarantined" else ledger.SCENE_FAILED
            fields |= {"error": record.error, "reason": record.reason, "attempts": 1, "retryable": False}
            fields |= {key: record.details[key] for key in _TOLD & record.details.keys()}
        self._journal.event(event, **fields)
        self.reporter.ended(record)

    def _look_at_limits(self) -> None:
        limits = self.limits
        if limits.scene_seconds is not None:
            for scene in list(self._under_way.values()):
                if time.monotonic() - scene.began > limits.scene_seconds + max(_GRACE, limits.scene_seconds):
                    self._give_up(scene)
        if self._reason:
            return
        if limits.stop_after is not None and time.monotonic() - self._began > limits.stop_after:
            self._reason = f"--stop-after {limits.stop_after:g} s is reached"
            self._drain_all()
        if (
            limits.max_failure_rate is not None
            and self._worked >= min(_ENOUGH, len(self.jobs))
            and self._in_vain > limits.max_failure_rate * self._worked
        ):
            self._reason = f"{self._in_vain} of {self._worked} scenes failed, more than --max-failure-rate allows"
            self._code = 1
            self.warnings.append(f"{self._reason}; look at {ledger.FAILURES_FILE}: a wrong model or mount?")
            self._drain_all()

    def _give_up(self, scene: _UnderWay) -> None:
        """A scene that hangs where no deadline reaches it: in a file, before its tiles or behind them."""
        job, seconds = scene.visit.job, time.monotonic() - scene.began
        with self._lock:
            del self._under_way[job.name]
        self._given_up.add(job.name)
        reason = f"{job.uri} did not end in {seconds:.0f} s and hangs in a file; is its storage mounted?"
        details = {"attempts": scene.visit.attempt, "retryable": True}
        seconds = round(seconds, 3)
        self._settle_work(SceneRecord(job.name, job.uri, "failed", seconds, reason, "SceneError", details=details))

    def _drain_all(self) -> None:
        """End what is under way, and keep what it has finished. What hangs is left, a while later."""
        self.drain()
        self._leave_at = time.monotonic() + _GRACE
        until = time.monotonic() + _DRAIN
        while self._under_way and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._end(*self._ended.get(timeout=left), deque())

    def _summary(self, ended: bool) -> Summary:
        seconds = time.monotonic() - self._began
        with self._lock:
            names = [*(job.name for job in self.jobs), *(problem.what for problem in self.problems)]
            records = tuple(self._records[name] for name in names if name in self._records)
        first = self.jobs[0]
        described = {"model": first.model, "out": first.out, "settings": asdict(first.settings)}
        return Summary(
            self.run_id,
            str(self.out),
            self._started,
            seconds,
            records,
            described,
            self._total,
            ended,
            tuple(self.warnings),
            self._reason,
            self._code,
        )

    def _stand(self, ended: bool) -> tuple[Summary, list[dict[str, Any]]]:
        """Where the run stands, for its journal."""
        with self._lock:
            under_way = [
                {"name": name, "done": scene.done, "total": scene.total, "since": scene.since}
                for name, scene in self._under_way.items()
            ]
        return self._summary(ended), under_way


def guards_of(run_id: str, scenes: int, leases: str | None) -> Guarding:
    """How a run holds its scenes: a single one is waited for, one of several is come back to.

    `leases`: URL below which they are, None for locks alone. Raises ProductError, PlanError.
    """
    return guarding(run_id, LOCK_SECONDS if scenes == 1 else 0, Leases.at(leases, run_id) if leases else None)


def _record_of(problem: Problem) -> SceneRecord:
    details = {"problem": True}
    return SceneRecord(problem.what, problem.what, "failed", 0.0, problem.reason, "SceneError", details=details)


def _record(job: Job, found: Outcome | Exception, seconds: float, attempts: int) -> SceneRecord:
    """What became of a scene."""
    if isinstance(found, Outcome):
        details = {
            "tiles": found.tiles,
            "tiles_kept": found.tiles_kept,
            "windows": found.windows,
            "pixels": found.pixels,
            "engine": found.engine,
            "classes": [share.to_json() for share in found.shares],
            "warnings": list(found.warnings),
        }
        seconds = round(found.seconds, 3)
        return SceneRecord(found.name, found.uri, found.state, seconds, product=found.product, details=details)
    # A scene that meets a fault of segflow itself fails as any other does; the next one has its chance.
    kind, reason = type(found).__name__, str(found)
    details = {"attempts": attempts, "retryable": isinstance(found, SegcoreError) and found.retryable}
    if not isinstance(found, SegcoreError):
        reason = f"unexpected {kind}: {one_line(found)}; run.json has the details, please report this"
        details |= {"traceback": "".join(traceback.format_exception(found))}
    state: State = "quarantined" if isinstance(found, PoisonError) else "failed"
    return SceneRecord(job.name, job.uri, state, round(seconds, 3), reason, kind, details=details)
