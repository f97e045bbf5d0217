"""`segflow report` and `segflow status`: what became of a run, for a person in the morning."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from flows.models import AsJson
from segcore.ledger import seconds_of
from segcore.spec import format_seconds
from segcore.status import Status, read_status

Out = Annotated[str, typer.Argument(help="The --out folder of a run.")]

#: Exit codes of `segflow status`; 2 says that no run was found.
FINE, FAILED = 0, 1


def report(out: Out) -> None:
    """Write OUT/report.html: every scene of a folder with its state, its picture and what it holds."""
    from segcore.report import write_report

    print(write_report(Path(out)))


def status(out: Out, as_json: AsJson = False) -> None:
    """Say how the last run into a folder stands. Needs no server, and does not disturb the run.

    Exit code 0: it is running, or ended well; 1: scenes failed, or the run died; 2: nothing was run there.
    """
    found = read_status(Path(out))
    if as_json:
        print(json.dumps(found.to_json() | {"status_exit_code": FAILED if found.failed else FINE}, indent=2))
    else:
        for line in lines(found, time.time()):
            print(line)
    raise typer.Exit(FAILED if found.failed else FINE)


def lines(found: Status, at: float) -> Iterator[str]:
    """The status in plain lines, which people and grep read; times of day are those of this machine."""
    yield f"run         {_sentence(found)}"
    counts = ", ".join(f"{count} {state}" for state, count in found.counts.items() if count)
    yield f"scenes      {counts or 'none has ended'}; {found.total} in all"
    for scene in found.under_way:
        tiles = f"{scene.done} of {scene.total} tiles" if scene.total else "begun"
        since = seconds_of(scene.since)
        yield f"under way   {scene.name}: {tiles}{f', for {format_seconds(at - since)}' if since else ''}"
    if found.pixels_per_second:
        yield f"speed       {found.pixels_per_second / 1e6:.3g} megapixels a second"
    if found.phase == "running":
        left = found.seconds_left
        when = "not known yet" if left is None else f"in {format_seconds(left)}, {_time_of_day(at + left)}"
        yield f"ends        {when}"
    for warning in found.warnings:
        yield f"warning     {warning}"
    for entry in found.failures:
        yield f"failed      {entry.scene}: {entry.reason}"
    if (more := found.counts.get("failed", 0) - len(found.failures)) > 0:
        yield f"failed      and {more} more; `segflow report` lists them all"


def _sentence(found: Status) -> str:
    age = format_seconds(found.heartbeat_age or 0)
    process = f"process {found.pid} on {found.host}" if found.pid else f"on {found.host}"
    if found.phase == "running":
        return f"running for {format_seconds(found.seconds)}, {process}"
    if found.phase == "died":
        return f"died {age} ago: {process} is gone; run the same command again to go on"
    if found.phase == "silent":
        return f"silent for {age}: {process} may have been stopped; look there, or run the same command again to go on"
    ended = seconds_of(found.ended)
    code = "" if found.exit_code is None else f", exit code {found.exit_code}"
    return f"ended{f' {_time_of_day(ended)}' if ended else ''} after {format_seconds(found.seconds)}{code}"


def _time_of_day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC).astimezone():%Y-%m-%d %H:%M}"
