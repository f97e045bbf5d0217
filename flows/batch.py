"""What a run is asked to do and what it did: jobs, limits, records. Knows nothing of Prefect."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from segcore.errors import CardError, PlanError, ProductError
from segcore.io import Problem, find_scenes, product_names
from segcore.ledger import RUN_FILES
from segcore.machine import check_memory
from segcore.model import check_processor
from segcore.model.card import built_in_models, load_card
from segcore.scene import Deadlines
from segcore.spec import Job, Settings
from segcore.survey import HIDDEN

State = Literal["done", "up to date", "failed", "quarantined"]

#: Exit codes of `segflow run`; the last one: stopped by SIGTERM or at a limit, run again to go on.
ALL_DONE, SOME_FAILED, NOTHING_RUN, STOPPED = 0, 1, 2, 75
#: Scenes that are labelled side by side: enough that small ones leave no worker idle.
_AT_ONCE = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a run ends although there is more to do, and what a scene may take.

    `max_scenes`: scenes that take work, those up to date not among them; `stop_after`, `tile_seconds` and
    `scene_seconds` in seconds; `max_failure_rate`: 0 to 1, of the scenes that took work; `retry_failed`: whether scenes
    that are quarantined are tried again; `scenes_at_once`: None to choose. Raises PlanError.
    """

    max_scenes: int | None = None
    stop_after: float | None = None
    max_failure_rate: float | None = None
    tile_seconds: float | None = None
    scene_seconds: float | None = None
    retry_failed: bool = False
    scenes_at_once: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--max-scenes", self.max_scenes), ("--scenes-at-once", self.scenes_at_once)):
            if value is not None and value < 1:
                raise PlanError(f"{option} {value} must be 1 or more")
        if self.max_failure_rate is not None and not 0 <= self.max_failure_rate <= 1:
            raise PlanError(f"--max-failure-rate {self.max_failure_rate} must be 0 to 1, such as 0.2 for a fifth")

    @property
    def deadlines(self) -> Deadlines:
        return Deadlines(self.tile_seconds, self.scene_seconds)

    def processes(self, usual: int, cluster: str | None, wanted: int | None) -> int:
        """Worker processes of this machine: as `wanted`, or else `usual`; deadlines end processes, and need one.

        Raises PlanError for what contradicts.
        """
        if cluster is not None:
            if wanted:
                raise PlanError("--workers are processes here, and --cluster has its own; leave one of them out")
            return 0
        ended_by_force = self.tile_seconds is not None or self.scene_seconds is not None
        if wanted is None:
            return max(usual, int(ended_by_force))
        if wanted == 0 and ended_by_force:
            raise PlanError(
                "--tile-timeout and --scene-timeout end worker processes; use --workers 1, or leave them out"
            )
        return wanted

    def at_once(self, scenes: int) -> int:
        """How many scenes are labelled side by side."""
        return min(scenes, self.scenes_at_once or _AT_ONCE)


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
    total: int
    ended: bool = True
    warnings: tuple[str, ...] = ()
    reason: str = ""
    code: int | None = None

    def count(self, state: State) -> int:
        return sum(record.state == state for record in self.records)

    @property
    def counts(self) -> dict[str, int]:
        """Scenes by state; `waiting` are those that were not begun, or are under way."""
        counts: dict[str, int] = {state: self.count(state) for state in get_args(State)}
        return counts | {"waiting": self.total - len(self.records)}

    @property
    def failed(self) -> int:
        """Scenes that need a person."""
        return self.count("failed") + self.count("quarantined")

    @property
    def exit_code(self) -> int:
        if self.code is not None:
            return self.code
        if len(self.records) < self.total:
            return STOPPED
        failed = [record for record in self.records if record.state in ("failed", "quarantined")]
        if not failed:
            return ALL_DONE
        hopeless = {CardError.__name__, PlanError.__name__}
        if len(failed) == len(self.records) and all(record.error in hopeless for record in failed):
            return NOTHING_RUN
        return SOME_FAILED

    def to_json(self, most: int | None = None) -> dict[str, Any]:
        """The run with its scenes, at most so many of them, those with a fault first."""
        scenes = self.records
        if most is not None:
            scenes = tuple(sorted(scenes, key=lambda record: record.state in ("done", "up to date"))[:most])
        return {
            "run_id": self.run_id,
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code if self.ended else None,
            "reason": self.reason,
            "total": self.total,
            "counts": self.counts,
            "warnings": list(self.warnings),
            **self.job,
            "scenes": [asdict(record) for record in scenes],
        }


@dataclass(frozen=True, slots=True)
class Batch:
    """What a run is to do: its jobs, and what was named but leads to no scene, which fails at once."""

    jobs: list[Job]
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.jobs) + len(self.problems)


def find_jobs(
    arguments: Sequence[str],
    model: str,
    out: str,
    settings: Settings,
    folders: int = 0,
    cluster: str | None = None,
) -> Batch:
    """The jobs of a run, or a refusal before anything is done.

    `folders`: how many names of folders are put in front of a product's name; `cluster`: whose workers label them, None
    for this machine's. Raises SegcoreError where an argument leads nowhere or to no scene at all, the model is not what
    its card says, two scenes would write the same product, `out` cannot be written, or this machine has not so much
    memory, or no arithmetic for the numbers that are wanted.
    """
    if not out:
        raise PlanError('--out "" names no folder; give the one that products are to lie in')
    if cluster is None:
        check_memory(settings.memory)
        check_processor(settings.precision)
    loaded = load_card(model)
    loaded.weights()
    items = Path(out) / HIDDEN / ".items"  # no product has a name with a dot in front
    found = find_scenes(arguments, channel=loaded.card.channels[0].name, keep=items)
    uris = found.uris or found.strict()
    if not uris:
        raise PlanError("no scene was named; give files, folders, globs, list files or STAC Items")
    named: dict[str, list[str]] = defaultdict(list)
    for uri, name in product_names(uris, folders).items():
        named[name].append(uri)
    for name, same in named.items():
        if name in RUN_FILES:
            raise PlanError(f"{same[0]} would write {Path(out) / name}, which is a file of the run; rename the scene")
        if len(same) > 1:
            raise PlanError(
                f"{len(same)} scenes would all write {Path(out) / name}: {', '.join(same[:3])}; put names of "
                f"folders in front (--name-folders), or run them with different --out folders"
            )
    _check_writable(Path(out))
    reference = model if model in built_in_models() else str(loaded.folder)
    jobs = [Job(name, uri, reference, str(Path(out).absolute()), settings) for name, (uri,) in named.items()]
    return Batch(jobs, tuple(found.problems))


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
