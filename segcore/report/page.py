"""The page itself: one file of HTML that needs no network, drawn from the findings. The only home of Jinja2."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from segcore.files import save_text
from segcore.ledger import FAILURES_FILE, LEDGER_FILE, REPORT_FILE, RUN_FILE, RunEntry, State, seconds_of
from segcore.report.charts import (
    FEWEST_RUNS,
    PANEL_HEIGHT,
    RUNS,
    WIDTH,
    Bar,
    Line,
    Tick,
    bars,
    cumulative,
    nice_top,
    spread,
    time_ticks,
)
from segcore.report.findings import ClassList, Findings, Row, find
from segcore.report.thumbs import FOLDER, Thumbnails
from segcore.spec import format_seconds

#: Bytes of pictures in the page itself; the thumbnails of older scenes are taken from beside it.
EMBEDDED_BYTES = 12 << 20
#: Seconds for thumbnails that are not kept yet: quicklooks of older versions carry none, and drawing takes its time.
THUMBNAIL_SECONDS = 20.0
#: The states of scenes in the order in which they are sorted: what needs a person first.
STATES: tuple[State, ...] = ("failed", "quarantined", "unfinished", "waiting", "done", "up to date")
#: How many scenes of a group of failures are named in it; the table has all.
NAMED = 12


@dataclass(frozen=True, slots=True)
class RunFigure:
    """The latest run over time: scenes that had ended, and pixels a second; both over one axis of time."""

    began: float
    ended: float
    ticks: list[Tick]
    top: float
    lines: list[tuple[str, Line]]
    rate_top: float
    rates: list[Bar]


@dataclass(frozen=True, slots=True)
class RunsFigure:
    """Run beside run: what each labelled, and on top of it what failed."""

    runs: list[RunEntry]
    form: str
    top: float
    done: list[Bar]
    failed: list[Bar]


def write_report(out: Path, *, thumbnail_seconds: float = THUMBNAIL_SECONDS) -> Path:
    """Write `report.html` into an output folder, in one step. Raises ProductError where nothing was run there."""
    out = out.absolute()
    found = find(out)
    path = out / REPORT_FILE
    save_text(path, render(found, Thumbnails(out, thumbnail_seconds)))
    return path


def render(found: Findings, thumbnails: Thumbnails) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("segcore.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": in_thousands, "amount": amount, "percent": percent, "clock": clock, "day": day, "took": took,
        "rate": rate, "href": quote,
    }  # fmt: skip
    loader = environment.loader
    assert loader is not None
    style, script = (loader.get_source(environment, name)[0] for name in ("report.css", "report.js"))
    data, pictures = _embedded(found, thumbnails)
    run = _run_figure(found)
    return environment.get_template("report.html").render(
        found=found,
        title=found.out.name or str(found.out),
        version=_version(),
        generated=datetime.now(UTC).timestamp(),
        states=[(state, found.counts.get(state, 0)) for state in STATES],
        rows=len(found.rows),
        pixels=sum(row.pixels for row in found.rows),
        class_names=sorted({name for row in found.rows if row.classes for name in row.classes.names}),
        left_out=thumbnails.left_out,
        named=NAMED,
        ledger_file=LEDGER_FILE,
        run=run,
        counted=_counted(found),
        labels=_apart({state: line.last for state, line in run.lines}) if run else {},
        clock_form="%H:%M:%S" if run and run.ended - run.began < 600 else "%H:%M",
        runs=_runs_figure(found),
        width=WIDTH,
        height=PANEL_HEIGHT,
        files={
            name: (found.out / name).exists()
            for name in (RUN_FILE, LEDGER_FILE, FAILURES_FILE)
        },
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=data,
        pictures=pictures,
    )  # fmt: skip


def _embedded(found: Findings, thumbnails: Thumbnails) -> tuple[Markup, Markup]:
    """The rows, and the thumbnails of the latest of them, as JSON that is safe inside of HTML."""
    lists: dict[ClassList, int] = {}
    pictures: list[str] = []
    held = 0
    rows = []
    for row in found.rows:
        where: int | str | None = None
        if (picture := thumbnails.of(row)) is not None:
            if held + len(picture) * 4 // 3 <= EMBEDDED_BYTES:
                where = len(pictures)
                pictures.append(base64.b64encode(picture).decode())
                held += len(pictures[-1])
            elif thumbnails.path(row).exists():
                where = f"{FOLDER}/{thumbnails.path(row).name}"
        rows.append(_values(row, lists.setdefault(row.classes, len(lists)) if row.classes else None, where))
    legends = [{"names": each.names, "colors": each.colors, "unit": each.unit} for each in lists]
    return _json({"states": STATES, "legends": legends, "rows": rows}), _json(pictures)


def _values(row: Row, legend: int | None, picture: int | str | None) -> list[Any]:
    """A row as the script reads it; see the names of the columns there."""
    return [
        row.scene,
        row.uri,
        STATES.index(row.state),
        round(row.time) if row.time is not None else None,
        round(row.seconds, 2) if row.seconds is not None else None,
        row.pixels,
        legend,
        [round(fraction, 4) for fraction in row.fractions],
        [float(f"{value:.5g}") for value in row.amounts],
        row.manifest,
        row.quicklook,
        row.error,
        row.reason,
        row.attempts,
        row.group,
        picture,
        row.warnings,
    ]


def _json(value: object) -> Markup:
    """JSON that cannot end the element around it, whatever a file is called."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _hash(text: str) -> str:
    """What the page's own policy knows its script and its style by; all others are refused."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _run_figure(found: Findings) -> RunFigure | None:
    """None where no scene of the latest run has ended."""
    ends = sorted(found.ends, key=lambda end: end.time)
    if not ends:
        return None
    latest = next((run for run in found.runs if found.status and run.run_id == found.status.run_id), found.runs[-1])
    began = min(seconds_of(latest.started) or ends[0].time, ends[0].time)
    ended = max(seconds_of(latest.ended) or ends[-1].time, ends[-1].time, began + 1)
    times: Mapping[str, list[float]] = {
        state: [end.time for end in ends if end.state == state]
        for state in ("done", "up to date", "failed", "quarantined")
    }
    top = nice_top(max(map(len, times.values())))
    lines = [(state, cumulative(times[state], began, ended, top)) for state in times if times[state]]
    rates = spread([(end.time, end.seconds, end.pixels / 1e6) for end in ends if end.state == "done"], began, ended)
    rate_top = nice_top(max(rates))
    return RunFigure(began, ended, time_ticks(began, ended), top, lines, rate_top, bars(rates, rate_top, gap=0.8))


def _apart(heights: Mapping[str, float]) -> dict[str, float]:
    """Where to write beside the ends of curves, so that no word lies on another; the lowest keeps its place."""
    placed: dict[str, float] = {}
    limit = PANEL_HEIGHT + 4
    for state, height in sorted(heights.items(), key=lambda item: item[1], reverse=True):
        placed[state] = min(height + 4, limit)
        limit = placed[state] - 15
    return placed


def _counted(found: Findings) -> str:
    """What became of the scenes of the latest run, in words."""
    counts = found.status.counts if found.status else {}
    return ", ".join(f"{in_thousands(count)} {state}" for state, count in counts.items() if count)


def _runs_figure(found: Findings) -> RunsFigure:
    runs = list(found.runs[-RUNS:])
    done = [float(run.count("done")) for run in runs]
    failed = [float(run.count("failed") + run.count("quarantined")) for run in runs]
    top = nice_top(max((a + b for a, b in zip(done, failed, strict=True)), default=0.0))
    days = {clock(run.started, "%Y-%m-%d") for run in runs}
    form = "%Y-%m-%d" if len(days) > 1 else "%Y-%m-%d %H:%M"
    return RunsFigure(
        runs,
        form,
        top,
        bars(done, top, gap=3, slots=FEWEST_RUNS),
        bars(failed, top, floor=done, gap=3, slots=FEWEST_RUNS),
    )


def in_thousands(value: float) -> str:
    """`12 345`, with narrow spaces that do not break."""
    return f"{value:,.0f}".replace(",", "\u202f")


def percent(fraction: float) -> str:
    """A share as a person reads it."""
    return f"{fraction:.1%}".replace("%", "\u202f%")


def amount(value: float, unit: str) -> str:
    """An area (m2) or a volume (ml) in the unit in which it is a handy number."""
    scales: dict[str, list[tuple[float, str]]] = {
        "m2": [(1e6, "km²"), (1e4, "ha"), (0, "m²")],
        "ml": [(1e3, "l"), (0, "ml")],
        "px": [(1e12, "Tpx"), (1e9, "Gpx"), (1e6, "Mpx"), (0, "px")],
    }
    scale, name = next(pair for pair in scales[unit] if value >= pair[0])
    number = value / (scale or 1)
    return f"{in_thousands(number) if number >= 100 else f'{number:.3g}'}\u202f{name}"


def rate(value: float) -> str:
    """Megapixels a second."""
    return in_thousands(value) if value >= 100 else f"{value:.2g}"


def took(seconds: float) -> str:
    """A duration, with spaces that do not break."""
    return format_seconds(seconds).replace(" ", "\u202f")


def clock(time: float | str, form: str = "%H:%M") -> str:
    """The time of day in UTC, of seconds since 1970 or of a time of the ledger."""
    moment = _moment(time)
    return moment.strftime(form) if moment else str(time)


def day(time: float | str) -> str:
    """The date, written out: `26 November 2026`."""
    moment = _moment(time)
    return f"{moment.day} {moment:%B %Y}" if moment else str(time)


def _moment(time: float | str) -> datetime | None:
    seconds = time if isinstance(time, float | int) else seconds_of(time)
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _version() -> str:
    try:
        return version("segflow")
    except PackageNotFoundError:  # a source tree that is not installed
        return ""
