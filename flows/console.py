"""What a person sees: a progress bar on a terminal, plain lines elsewhere, one JSON object when asked."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from flows.batch import SceneRecord, Summary

#: Seconds between two plain lines about one scene.
_QUIET_SECONDS = 10.0


class Reporter(Protocol):
    """Hears how a run goes on."""

    def progress(self, name: str, done: int, total: int) -> None:
        """Tiles done, and tiles in all, of a scene."""
        ...

    def ended(self, record: SceneRecord) -> None:
        """A scene has ended."""
        ...

    def note(self, text: str) -> None:
        """Something else worth a line."""
        ...

    summary: Summary | None
    """Left here by a run that has ended; a flow has no other way to hand it to the command that called it."""


class Silent:
    """Says nothing: for `--json`."""

    def __init__(self) -> None:
        self.summary: Summary | None = None

    def progress(self, name: str, done: int, total: int) -> None: ...

    def ended(self, record: SceneRecord) -> None: ...

    def note(self, text: str) -> None: ...


class Lines:
    """Plain lines on standard error: logs of scheduled jobs are read by people and by grep."""

    def __init__(self) -> None:
        self.summary: Summary | None = None
        self._last: dict[str, float] = {}

    def progress(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last.setdefault(name, now) > _QUIET_SECONDS:
            self._last[name] = now
            self.note(f"{name}: {done} of {total} tiles")

    def ended(self, record: SceneRecord) -> None:
        self.note(sentence(record))
        _tell_warnings(self, record)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bar:
    """A bar for the scene under way, and a line for each that has ended."""

    def __init__(self, console: Console) -> None:
        self.summary: Summary | None = None
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tiles")
        self.live = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def progress(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self.live.add_task(name, total=total)
        self.live.update(self._tasks[name], completed=done, total=total)

    def ended(self, record: SceneRecord) -> None:
        if record.name in self._tasks:
            self.live.remove_task(self._tasks.pop(record.name))
        style = {"done": "green", "up to date": "cyan"}.get(record.state, "red")
        self.live.console.print(sentence(record), style=style, highlight=False, markup=False, soft_wrap=True)
        _tell_warnings(self, record)

    def note(self, text: str) -> None:
        self.live.console.print(text, highlight=False, markup=False, soft_wrap=True)


#: Whom a flow tells. Its parameters are JSON values, so this way leads past them.
_current: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


def current_reporter() -> Reporter | None:
    """The reporter of the command around this code, or of the flow."""
    return _current.get()


@contextlib.contextmanager
def report_to(reporter: Reporter) -> Iterator[Reporter]:
    """Make this the current reporter."""
    token = _current.set(reporter)
    try:
        yield reporter
    finally:
        _current.reset(token)


@contextlib.contextmanager
def reporting(quiet: bool) -> Iterator[Reporter]:
    """A reporter that fits standard error, for as long as the context lasts."""
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        reporter: Reporter
        if quiet:
            reporter = Silent()
        elif console.is_terminal:
            bar = Bar(console)
            stack.enter_context(bar.live)
            reporter = bar
        else:
            reporter = Lines()
        yield stack.enter_context(report_to(reporter))


def _tell_warnings(reporter: Reporter, record: SceneRecord) -> None:
    for warning in record.details.get("warnings", ()):
        reporter.note(f"warning: {record.name}: {warning}")


def sentence(record: SceneRecord) -> str:
    """One line about a scene that has ended."""
    if record.state in ("failed", "quarantined"):
        return f"{record.state:11} {record.name}: {record.reason}"
    if record.state == "up to date":
        return f"up to date  {record.name}"
    shares = ", ".join(f"{share['name']} {share['fraction']:.1%}" for share in record.details.get("classes", ()))
    kept = record.details.get("tiles_kept", 0)
    resumed = f", {kept} of them kept of an interrupted run" if kept else ""
    tiles = record.details.get("tiles", 0)
    plural = "tile" if tiles == 1 else "tiles"
    return f"done        {record.name}: {tiles} {plural}{resumed}, {record.seconds:.1f} s: {shares}"
