"""What the report says: the ledger and the manifests of an output folder, brought together scene by scene."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from segcore.errors import ProductError
from segcore.ledger import (
    LEDGER_FILE,
    RUN_FILE,
    STATES,
    TROUBLED,
    Event,
    Ledger,
    RunEntry,
    SceneEntry,
    State,
    mapping,
    number,
    seconds_of,
    whole,
)
from segcore.publish import manifest_path, read_manifest
from segcore.status import Status, read_status

#: Runs of which every scene's end is kept while the ledger is read: the latest, and those that ran beside it.
_RUNS_KEPT = 3


@dataclass(frozen=True, slots=True)
class ClassList:
    """Classes as one model names them: names, colours (`#rrggbb`, empty where unknown), and their unit, m2 or ml."""

    names: tuple[str, ...]
    colors: tuple[str, ...]
    unit: str


@dataclass(frozen=True, slots=True)
class Row:
    """A scene. `time` in seconds since 1970; `amounts` in m2 or ml; paths relative to the output folder."""

    scene: str
    uri: str
    state: State
    time: float | None = None
    seconds: float | None = None
    pixels: int = 0
    classes: ClassList | None = None
    fractions: tuple[float, ...] = ()
    amounts: tuple[float, ...] = ()
    manifest: str = ""
    quicklook: str = ""
    error: str = ""
    reason: str = ""
    attempts: int = 0
    group: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Scenes that failed for the same reason, but for names and numbers; `reason` is that of the latest."""

    error: str
    reason: str
    scenes: tuple[str, ...]
    quarantined: int


@dataclass(frozen=True, slots=True)
class End:
    """A scene that ended in a run: when, how, and how many pixels in how many seconds."""

    time: float
    state: State
    pixels: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ClassTotal:
    """What all products together hold of a class: m2 or ml, and its share (0 to 1)."""

    name: str
    color: str
    amount: float | None
    unit: str
    fraction: float
    scenes: int


@dataclass(frozen=True, slots=True)
class Findings:
    """All that the page shows. Rows and failure groups: the latest first; runs: the oldest first."""

    out: Path
    rows: tuple[Row, ...]
    groups: tuple[FailureGroup, ...]
    totals: tuple[ClassTotal, ...]
    runs: tuple[RunEntry, ...]
    ends: tuple[End, ...]
    status: Status | None
    counts: Mapping[State, int] = field(default_factory=dict)


def find(out: Path) -> Findings:
    """Read ledger and manifests. Raises ProductError where the folder holds neither a run nor a product."""
    ledger, ends = Ledger(out / LEDGER_FILE, empty=True), _Ends()
    for event in ledger.follow():
        ends.take(event)
    try:
        status = read_status(out)
    except ProductError:
        if (out / RUN_FILE).exists():
            raise
        status = None
    names = [*ledger, *(name for name in _products(out) if name not in ledger)]
    if not names and status is None:
        raise ProductError(f"{out} holds no run and no product; name the --out folder of a run")
    rows = sorted((_row(out, name, ledger.get(name)) for name in names), key=lambda row: row.time or 0.0, reverse=True)
    rows, groups = _grouped(rows)
    runs = sorted(ledger.runs.values(), key=lambda run: run.started)
    latest = status.run_id if status and status.run_id in ledger.runs else runs[-1].run_id if runs else ""
    counts: dict[State, int] = defaultdict(int)
    for row in rows:
        counts[row.state] += 1
    return Findings(out, tuple(rows), groups, _class_totals(rows), tuple(runs), ends.of(latest), status, dict(counts))


class _Ends:
    """The ends of scenes, of the runs that began last."""

    def __init__(self) -> None:
        self._runs: dict[str, list[End]] = {}

    def take(self, event: Event) -> None:
        state, time = STATES.get(event["event"], "unfinished"), seconds_of(event.get("time"))
        if state == "unfinished" or time is None:
            return
        run_id = str(event.get("run_id", ""))
        if run_id not in self._runs and len(self._runs) == _RUNS_KEPT:
            del self._runs[next(iter(self._runs))]
        end = End(time, state, whole(event.get("pixels")), number(event.get("seconds")) or 0.0)
        self._runs.setdefault(run_id, []).append(end)

    def of(self, run_id: str) -> tuple[End, ...]:
        return tuple(self._runs.get(run_id, ()))


def _products(out: Path) -> Iterator[str]:
    """Names of the products in the folder, from their manifests."""
    try:
        with os.scandir(out) as found:
            names = [entry.name for entry in found if not entry.name.startswith(".") and entry.is_dir()]
    except OSError as error:
        raise ProductError(f"{out}: {error.strerror or error}; name the --out folder of a run") from error
    for name in sorted(names):
        if manifest_path(out, name).is_file():
            yield name


def _row(out: Path, name: str, entry: SceneEntry | None) -> Row:
    """One scene. The ledger says how it ended; the manifest, where there is one, what the product is."""
    made = entry.made if entry else None
    path = _inside(out, entry.product) if entry and entry.product else manifest_path(out, name)
    document = (read_manifest(path) if path else None) or {}
    facts = mapping(document.get("properties"))
    if entry is None:
        source = str(mapping(facts.get("segflow:input")).get("uri", ""))
        row = Row(name, source, "done", seconds_of(facts.get("created")))
    else:
        row = Row(
            name, entry.uri, entry.state, seconds_of(entry.time), error=entry.error, reason=entry.reason,
            attempts=entry.attempts,
        )  # fmt: skip
    if not document:
        return row
    spent = mapping(facts.get("segflow:seconds"))
    seconds = number((made or {}).get("seconds")) or (number(spent.get("prepare")) or 0) + (
        number(spent.get("label")) or 0
    )
    held = [share for share in facts.get("segflow:classes") or () if isinstance(share, dict)]
    valid = number(facts.get("segflow:valid_fraction")) or 1.0
    pixels = whole((made or {}).get("pixels")) or round(sum(whole(share.get("pixels")) for share in held) / valid)
    unit = next((unit for unit in ("area_m2", "volume_ml") if held and unit in held[0]), "")
    colors = _colors(document)
    assert path is not None
    folder = path.parent.relative_to(out).as_posix()
    quicklook = mapping(mapping(document.get("assets")).get("quicklook")).get("href")
    return replace(
        row,
        seconds=seconds or None,
        pixels=pixels,
        classes=ClassList(
            tuple(str(share.get("name", "")) for share in held),
            tuple(colors.get(whole(share.get("index")), "") for share in held),
            {"area_m2": "m2", "volume_ml": "ml"}.get(unit, ""),
        ),
        fractions=tuple(number(share.get("fraction")) or 0.0 for share in held),
        amounts=tuple(number(share.get(unit)) or 0.0 for share in held) if unit else (),
        manifest=f"{folder}/{path.name}",
        quicklook=f"{folder}/{Path(str(quicklook)).name}" if quicklook else "",
        warnings=tuple(str(warning) for warning in facts.get("segflow:warnings") or ()),
    )


def _inside(out: Path, product: str) -> Path | None:
    """Where a product of the ledger lies; None where that leads out of the folder."""
    path = out / product
    if ".." in Path(product).parts or not path.is_relative_to(out):
        return None
    return path


def _colors(document: Mapping[str, Any]) -> dict[int, str]:
    mask = mapping(mapping(document.get("assets")).get("mask"))
    found = {}
    for label in mask.get("classification:classes") or ():
        hint = str(mapping(label).get("color_hint", ""))
        if re.fullmatch(r"[0-9A-Fa-f]{6}", hint):
            found[whole(label.get("value"))] = f"#{hint.lower()}"
    return found


def _grouped(rows: list[Row]) -> tuple[list[Row], tuple[FailureGroup, ...]]:
    """Failures under one head where they differ in names and numbers only; the largest group first."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        if row.state in TROUBLED:
            groups[row.error, _gist(row)].append(at)
    ordered = sorted(groups.values(), key=len, reverse=True)
    found = []
    for place, members in enumerate(ordered):
        for at in members:
            rows[at] = replace(rows[at], group=place)
        first = rows[members[0]]
        quarantined = sum(rows[at].state == "quarantined" for at in members)
        scenes = tuple(rows[at].scene for at in members)
        found.append(FailureGroup(first.error, first.reason or "no reason was given", scenes, quarantined))
    return rows, tuple(found)


def _gist(row: Row) -> str:
    """A reason without what is the scene's own: its URI, its name, paths, and numbers."""
    text, file = row.reason, row.uri.rstrip("/").rpartition("/")[2]
    for own in (row.uri, file, file.partition(".")[0], row.scene):
        if own:
            text = re.sub(rf"(?<!\w){re.escape(own)}(?!\w)", "*", text)
    return re.sub(r"\d+(\.\d+)?", "#", re.sub(r"\S*/\S+", "*", text))


def _class_totals(rows: list[Row]) -> tuple[ClassTotal, ...]:
    """What the products hold of each class, models with the same classes together.

    Shares are of the area or volume where it is known, since pixels of one scene may be larger than those of another.
    """
    amounts: dict[tuple[ClassList, int], float] = defaultdict(float)
    scenes: dict[ClassList, int] = defaultdict(int)
    whole_of: dict[ClassList, float] = defaultdict(float)
    for row in rows:
        if row.classes is None:
            continue
        scenes[row.classes] += 1
        held = row.amounts or tuple(fraction * row.pixels for fraction in row.fractions)
        whole_of[row.classes] += sum(held)
        for place, amount in enumerate(held):
            amounts[row.classes, place] += amount
    return tuple(
        ClassTotal(
            name,
            classes.colors[place],
            amounts[classes, place] if classes.unit else None,
            classes.unit,
            amounts[classes, place] / whole_of[classes] if whole_of[classes] else 0.0,
            count,
        )
        for classes, count in scenes.items()
        for place, name in enumerate(classes.names)
    )
