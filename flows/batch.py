"""A batch: many scenes, one model, one output folder. Knows nothing of Prefect: a flow and a plain loop both run it."""

from __future__ import annotations

import platform
import tempfile
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from segcore.errors import CardError, PlanError, ProductError, SegcoreError, one_line
from segcore.io import find_scenes, product_names
from segcore.model.card import built_in_models, load_card
from segcore.publish import write_json
from segcore.scene import Outcome
from segcore.spec import Job, Settings

State = Literal["done", "up to date", "failed"]

#: Exit codes of `segflow run`; besides, 75 means that it was stopped by SIGTERM.
ALL_DONE, SOME_FAILED, NOTHING_RUN = 0, 1, 2
#: Where a run says what it did; no product can have this name.
RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class SceneRecord:
    """How one scene of a batch ended: every scene gets exactly one."""

    name: str
    uri: str
    state: State
    seconds: float
    reason: str = ""
    error: str = ""
    product: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did; written to `OUT/run.json`."""

    run_id: str
    out: str
    started: str
    seconds: float
    records: tuple[SceneRecord, ...]
    job: dict[str, Any]
    ended: bool = True
    warnings: tuple[str, ...] = ()

    def count(self, state: State) -> int:
        return sum(record.state == state for record in self.records)

    @property
    def exit_code(self) -> int:
        failed = [record for record in self.records if record.state == "failed"]
        if not failed:
            return ALL_DONE
        hopeless = {CardError.__name__, PlanError.__name__}
        if len(failed) == len(self.records) and all(record.error in hopeless for record in failed):
            return NOTHING_RUN
        return SOME_FAILED

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "segflow": version("segflow"),
            "host": platform.node(),
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code if self.ended else None,
            "counts": {state: self.count(state) for state in ("done", "up to date", "failed")},
            "warnings": list(self.warnings),
            **self.job,
            "scenes": [asdict(record) for record in self.records],
        }


def find_jobs(arguments: Sequence[str], model: str, out: str, settings: Settings) -> list[Job]:
    """The jobs of a batch, or a refusal before anything is done.

    Raises SegcoreError where a scene is not there, the model is not what its card says, two scenes would write the
    same product, or `out` cannot be written.
    """
    loaded = load_card(model)
    loaded.weights()
    uris = find_scenes(arguments, channel=loaded.card.channels[0].name).strict()
    if not uris:
        raise PlanError("no scene was named; give files, folders, globs, list files or STAC Items")
    named: dict[str, list[str]] = defaultdict(list)
    for uri, name in product_names(uris).items():
        named[name].append(uri)
    for name, same in named.items():
        if name == RUN_FILE:
            raise PlanError(f"{same[0]} would write {Path(out) / name}, which is the file of the run; rename the scene")
        if len(same) > 1:
            raise PlanError(
                f"{len(same)} scenes would all write {Path(out) / name}: {', '.join(same[:3])}; run them with "
                f"different --out folders"
            )
    _check_writable(Path(out))
    reference = model if model in built_in_models() else str(loaded.folder)
    return [Job(name, uri, reference, str(Path(out).absolute()), settings) for name, (uri,) in named.items()]


def run_batch(jobs: Iterable[Job], label: Callable[[Job], Outcome], ended: Callable[[SceneRecord], None]) -> Summary:
    """Label the scenes one after the other, their tiles side by side; a scene that fails does not stop the next.

    `label` labels one scene or raises; `ended` hears of each that ends. Writes `run.json` after every scene.
    """
    jobs = list(jobs)
    first = jobs[0]
    records: list[SceneRecord] = []
    started, began, run_id = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), time.perf_counter(), uuid.uuid4().hex
    described = {"model": first.model, "out": first.out, "settings": asdict(first.settings), "total": len(jobs)}

    def summary() -> Summary:
        seconds, finished = time.perf_counter() - began, len(records) == len(jobs)
        return Summary(run_id, first.out, started, seconds, tuple(records), described, finished)

    warnings = _write_run(summary())  # what an older run said is no longer true
    for job in jobs:
        records.append(_attempt(job, label))
        ended(records[-1])
        warnings = _write_run(summary())
    return replace(summary(), warnings=warnings)


def _attempt(job: Job, label: Callable[[Job], Outcome]) -> SceneRecord:
    began = time.perf_counter()
    details: dict[str, Any] = {}
    try:
        outcome = label(job)
    except Exception as error:
        # A scene that meets a fault of segflow itself fails as any other does; the next one has its chance.
        kind, reason = type(error).__name__, str(error)
        if not isinstance(error, SegcoreError):
            reason = f"unexpected {kind}: {one_line(error)}; run.json has the details, please report this"
            details = {"traceback": traceback.format_exc()}
        seconds = round(time.perf_counter() - began, 3)
        return SceneRecord(job.name, job.uri, "failed", seconds, reason, kind, details=details)
    details = {
        "tiles": outcome.tiles,
        "tiles_kept": outcome.tiles_kept,
        "windows": outcome.windows,
        "engine": outcome.engine,
        "classes": [share.to_json() for share in outcome.shares],
        "warnings": list(outcome.warnings),
    }
    return SceneRecord(
        outcome.name,
        outcome.uri,
        outcome.state,
        round(outcome.seconds, 3),
        product=outcome.product,
        details=details,
    )


def _check_writable(out: Path) -> None:
    """Raises ProductError unless files can be made in the folder; leaves nothing behind."""
    existing = out.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(20, "Not a directory")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ProductError(
            f"cannot write to {out}: {existing}: {error.strerror or error}; choose another --out"
        ) from error


def _write_run(summary: Summary) -> tuple[str, ...]:
    """Write the file of the run; products do not depend on it, so that a failure is a warning, which is returned."""
    out = Path(summary.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RUN_FILE, summary.to_json())
    except (OSError, ValueError) as error:
        return (f"cannot write {out / RUN_FILE}: {one_line(error)}",)
    return ()
