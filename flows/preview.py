"""What a run would do: every scene new, changed, up to date or refused, and what the work comes to. Does nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flows.batch import ALL_DONE, SOME_FAILED, Batch, Limits
from segcore.errors import SegcoreError
from segcore.ledger import LEDGER_FILE, Ledger
from segcore.publish import is_current, manifest_path
from segcore.spec import Job, format_bytes, format_seconds
from segcore.survey import survey

Prospects = Literal["new", "changed", "up to date", "quarantined", "refused"]


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a run would make of a scene. `seconds`: None where this model has not run on this machine before."""

    name: str
    uri: str
    state: Prospects
    tiles: int = 0
    pixels: int = 0
    memory: int = 0
    scratch: int = 0
    product: int = 0
    seconds: float | None = None
    reason: str = ""


def preview(batch: Batch, limits: Limits, as_json: bool) -> int:
    """Print what a run would do. Returns the exit code: 1 where a scene would be refused."""
    ledger = Ledger(Path(batch.jobs[0].out) / LEDGER_FILE)
    found = [Foreseen(problem.what, problem.what, "refused", reason=problem.reason) for problem in batch.problems]
    if not as_json:
        for scene in found:
            print(_line(scene))
    at_once = limits.at_once(len(batch.jobs))
    for job in batch.jobs:
        entry = ledger.get(job.name)
        if entry is not None and entry.state == "quarantined" and not limits.retry_failed:
            found.append(Foreseen(job.name, job.uri, "quarantined", reason=entry.reason))
        else:
            found.append(foresee(replace(job, alone=at_once == 1)))
        if not as_json:
            print(_line(found[-1]))
    work = [scene for scene in found if scene.state in ("new", "changed")]
    totals: dict[str, Any] = {
        "counts": dict(Counter(scene.state for scene in found)),
        "tiles": sum(scene.tiles for scene in work),
        "pixels": sum(scene.pixels for scene in work),
        "memory": max((scene.memory for scene in work), default=0),
        "scratch": sum(sorted(scene.scratch for scene in work)[-at_once:]),
        "product": sum(scene.product for scene in work),
        "seconds": _seconds(work),
    }
    if as_json:
        print(json.dumps({**totals, "scenes": [asdict(scene) for scene in found]}, indent=2))
    else:
        for line in _closing(totals, any_work=bool(work)):
            print(line)
    return SOME_FAILED if any(scene.state == "refused" for scene in found) else ALL_DONE


def foresee(job: Job) -> Foreseen:
    """What a run would make of one scene; reads headers only."""
    try:
        prospect = survey(job)
    except SegcoreError as error:
        return Foreseen(job.name, job.uri, "refused", reason=str(error))
    plan, grid = prospect.plan, prospect.source.grid
    manifest = manifest_path(Path(job.out).absolute(), job.name)
    if is_current(manifest, prospect.fingerprint, prospect.job.settings.agreement):
        return Foreseen(job.name, job.uri, "up to date", pixels=grid.size)
    scratch, product = prospect.disk
    speed = prospect.speed
    seconds = None if speed is None else round(speed.predict(prospect.computed, grid.size), 1)
    state: Prospects = "changed" if manifest.exists() else "new"
    return Foreseen(job.name, job.uri, state, len(plan), grid.size, plan.memory, scratch, product, seconds)


def _seconds(work: Sequence[Foreseen]) -> float | None:
    """What all of them take; None unless it is known of each."""
    known = [scene.seconds for scene in work if scene.seconds is not None]
    return round(sum(known), 1) if len(known) == len(work) else None


def _line(scene: Foreseen) -> str:
    tiles = "1 tile" if scene.tiles == 1 else f"{scene.tiles} tiles"
    told = scene.reason or (f"{tiles}, {scene.pixels / 1e6:.4g} megapixels" if scene.tiles else "")
    return f"{scene.state:12}{scene.name}{f': {told}' if told else ''}"


def _closing(totals: dict[str, Any], any_work: bool) -> Iterator[str]:
    yield ", ".join(f"{count} {state}" for state, count in totals["counts"].items())
    if any_work:
        yield f"{totals['tiles']} tiles, {totals['pixels'] / 1e6:.4g} megapixels"
        memory, scratch, product = (format_bytes(totals[key]) for key in ("memory", "scratch", "product"))
        yield f"at most {memory} of memory, {scratch} of scratch, {product} of products"
        if totals["seconds"] is None:
            yield "time: not known, this model has not run here"
        else:
            yield f"time: {format_seconds(totals['seconds'])}, one scene after the other"
