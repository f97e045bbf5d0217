"""The ledger of an output folder: what every run did with every scene, one JSON object a line, only ever appended to.

A line is written with one call, under a lock of the file, so that runs side by side do not mix theirs on a local file
system, and a kill leaves at most one torn line, which is passed over. Products do not depend on it: whether a scene is
done its manifest says.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from segcore.errors import ProductError, unwritten
from segcore.files import save_text

#: What a run writes into an output folder besides its products.
RUN_FILE = "run.json"
LEDGER_FILE = "events.jsonl"
FAILURES_FILE = "failures.csv"
REPORT_FILE = "report.html"
METRICS_FILE = "metrics.prom"
#: No product can have one of these names.
RUN_FILES = frozenset({RUN_FILE, LEDGER_FILE, FAILURES_FILE, REPORT_FILE, METRICS_FILE})

#: The words of the events.
RUN_STARTED = "run.started"
RUN_ENDED = "run.ended"
SCENE_STARTED = "scene.started"
SCENE_DONE = "scene.done"
SCENE_UP_TO_DATE = "scene.up_to_date"
SCENE_FAILED = "scene.failed"
SCENE_QUARANTINED = "scene.quarantined"

State = Literal["done", "up to date", "failed", "quarantined", "waiting", "unfinished"]
"""`unfinished`: it began and has not ended, because it is under way or its run was stopped. `waiting`: not begun."""

#: In what state an event leaves its scene.
STATES: dict[str, State] = {
    SCENE_STARTED: "unfinished",
    SCENE_DONE: "done",
    SCENE_UP_TO_DATE: "up to date",
    SCENE_FAILED: "failed",
    SCENE_QUARANTINED: "quarantined",
}
EVENTS = frozenset({RUN_STARTED, RUN_ENDED, *STATES})
#: The states in which a scene has no product of this run and needs a person.
TROUBLED: tuple[State, ...] = ("failed", "quarantined")

Event = dict[str, Any]
_BLOCK_BYTES = 1 << 16
_LOCK_SECONDS = 1.0


def now() -> str:
    """The time as the ledger writes it: UTC, ISO 8601, milliseconds, `Z`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_of(time: object) -> float | None:
    """Seconds since 1970 of a time as the ledger writes it; None where it is none."""
    try:
        found = datetime.fromisoformat(str(time))
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def new_event(event: str, run_id: str, fields: Mapping[str, Any]) -> Event:
    """An event of this moment. Raises ValueError for a word that is no event."""
    if event not in EVENTS:
        raise ValueError(f"{event!r} is no event of the ledger; it knows {', '.join(sorted(EVENTS))}")
    return {"time": now(), "run_id": run_id, "event": event, **fields}


def append(path: Path, event: Mapping[str, Any], *, sync: bool = False) -> None:
    """Append one event as one line, by one write; `sync` waits until it is on the disk. Raises ProductError.

    Several processes of one host may append; over NFS, which knows no appending, one host at a time.
    """
    line = json.dumps(event, allow_nan=False).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # While a line is written, the file grows page by page. Without a lock one may look torn: one blank line.
            _lock(descriptor)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a killed run left half a line
                line = b"\n" + line
            if os.write(descriptor, line) != len(line):
                raise OSError(28, "no space left on the device")
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ProductError(f"cannot append to {path}: {unwritten(error)}", retryable=True) from error


def _lock(descriptor: int) -> None:
    """Lock the file against other writers; not for longer than they take to write: one may be stopped, or hang."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return
            time.sleep(0.001)
        except OSError:  # there are no locks here
            return
        else:
            return


def read(path: Path) -> Iterator[Event]:
    """The events, oldest first, one line in memory at a time; none where there is no file. Passes over torn lines."""
    for event, _ in _read_from(path, 0):
        yield event


def read_back(path: Path) -> Iterator[Event]:
    """The events, newest first, read from the end: what happened last is found without reading all."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            first, *lines = (file.read(end - start) + rest).split(b"\n")
            for line in reversed(lines):
                if (event := _parse(line)) is not None:
                    yield event
            rest, end = first, start
        if (event := _parse(rest)) is not None:
            yield event


def _read_from(path: Path, offset: int) -> Iterator[tuple[Event, int]]:
    """The events behind a byte, each with the byte at which it ends. A last line that has no end yet is left alone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            if (event := _parse(line)) is not None:
                yield event, offset


def _parse(line: bytes) -> Event | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


@dataclass(frozen=True, slots=True)
class SceneEntry:
    """The latest state of a scene: the event that put it there, and the latest that made its product, if any did."""

    scene: str
    state: State
    last: Event
    made: Event | None = None

    @property
    def uri(self) -> str:
        return str(self.last.get("uri", ""))

    @property
    def time(self) -> str:
        return str(self.last.get("time", ""))

    @property
    def product(self) -> str:
        """Path of the manifest, relative to the output folder; empty where the scene never had a product."""
        return str(self.last.get("product") or (self.made or {}).get("product") or "")

    @property
    def reason(self) -> str:
        return str(self.last.get("reason") or "")

    @property
    def error(self) -> str:
        return str(self.last.get("error") or "")

    @property
    def attempts(self) -> int:
        return whole(self.last.get("attempts"))


@dataclass(frozen=True, slots=True)
class RunEntry:
    """What the ledger says of a run. `counts`: scenes by state; `ended`: empty while it runs or where it was killed."""

    run_id: str
    started: str
    total: int = 0
    model: str = ""
    ended: str = ""
    exit_code: int | None = None
    reason: str = ""
    counts: dict[State, int] = field(default_factory=dict)
    pixels: int = 0
    tiles: int = 0

    def count(self, state: State) -> int:
        return self.counts.get(state, 0)


@dataclass(frozen=True, slots=True)
class Totals:
    """What was labelled in an output folder, all runs together; these numbers only ever grow."""

    scenes: int = 0
    pixels: int = 0
    tiles: int = 0
    failures: int = 0
    last_success: str = ""


class Ledger(Mapping[str, SceneEntry]):
    """The latest state of every scene, by name, and every run; `refresh` reads what has been appended since."""

    def __init__(self, path: Path, *, empty: bool = False) -> None:
        """`empty`: read nothing yet."""
        self.path = path
        self.runs: dict[str, RunEntry] = {}
        self.totals = Totals()
        self._scenes: dict[str, SceneEntry] = {}
        self._offset = 0
        if not empty:
            self.refresh()

    def __getitem__(self, scene: str) -> SceneEntry:
        return self._scenes[scene]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scenes)

    def __len__(self) -> int:
        return len(self._scenes)

    def refresh(self) -> None:
        """Take in what was appended since the last time."""
        for _ in self.follow():
            pass

    def follow(self) -> Iterator[Event]:
        """The same, event by event: each is taken in, and then handed out."""
        for event, end in _read_from(self.path, self._offset):
            self._offset = end
            self._take(event)
            yield event

    def troubled(self) -> list[SceneEntry]:
        """The scenes that failed or are quarantined, the latest first."""
        found = [entry for entry in self._scenes.values() if entry.state in TROUBLED]
        return sorted(found, key=lambda entry: entry.time, reverse=True)

    def _take(self, event: Event) -> None:
        kind, run_id = event["event"], str(event.get("run_id", ""))
        if kind not in EVENTS:  # of a later version
            return
        run = self.runs.get(run_id)
        if run is None:
            run = self.runs[run_id] = RunEntry(run_id, str(event.get("time", "")))
        if kind == RUN_STARTED:
            total, model = whole(event.get("total")), str(event.get("model", ""))
            self.runs[run_id] = replace(run, started=str(event.get("time", "")), total=total, model=model)
            # What led to no scene is looked for anew by every run: mended, it goes by the name of its scene.
            for name in [name for name, entry in self._scenes.items() if entry.last.get("problem")]:
                del self._scenes[name]
        elif kind == RUN_ENDED:
            code, time = event.get("exit_code"), str(event.get("time", ""))
            code = code if isinstance(code, int) else None
            self.runs[run_id] = replace(run, ended=time, exit_code=code, reason=str(event.get("reason") or ""))
            if code == 0:
                self.totals = replace(self.totals, last_success=time)
        elif isinstance(scene := event.get("scene"), str):
            self._take_scene(scene, event, run)

    def _take_scene(self, scene: str, event: Event, run: RunEntry) -> None:
        state, before = STATES[event["event"]], self._scenes.get(scene)
        made = event if state == "done" else before.made if before else None
        self._scenes[scene] = SceneEntry(scene, state, event, made)
        if state == "unfinished":
            return
        run.counts[state] = run.count(state) + 1
        if state == "done":
            pixels, tiles, old = whole(event.get("pixels")), whole(event.get("tiles")), self.totals
            self.runs[run.run_id] = replace(run, pixels=run.pixels + pixels, tiles=run.tiles + tiles)
            self.totals = replace(old, scenes=old.scenes + 1, pixels=old.pixels + pixels, tiles=old.tiles + tiles)
        elif state == "failed":
            self.totals = replace(self.totals, failures=self.totals.failures + 1)


def write_failures(path: Path, entries: Iterable[SceneEntry]) -> None:
    """Write the scenes that need a person as a table (CSV), in one step. Raises ProductError."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("scene", "uri", "state", "error", "reason", "attempts", "time"))
    for entry in entries:
        table.writerow(
            (entry.scene, entry.uri, entry.state, entry.error, entry.reason, entry.attempts or "", entry.time)
        )
    save_text(path, text.getvalue())


def whole(value: object) -> int:
    """A whole number of a document; 0 where there is none."""
    return int(value) if isinstance(value, int | float) and value == value else 0


def number(value: object) -> float | None:
    """A number of a document; None where there is none."""
    return float(value) if isinstance(value, int | float) and value == value else None


def mapping(value: object) -> Mapping[str, Any]:
    """An object of a document; an empty one where there is none."""
    return value if isinstance(value, dict) else {}
