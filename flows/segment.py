"""The Prefect flow: scenes in, products out, one Prefect task for each scene; its tiles run on dask inside the task.

Prefect keeps no cache of scenes: whether a product is up to date is decided by its manifest, which knows.
"""

# Annotations are real here, not texts: Prefect makes a form of them, also in processes that get this module pickled.
import contextlib
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.utilities.annotations import quote
from pydantic import Field

from flows.archive import Archive, guards_of
from flows.artifacts import Bars, Showcase
from flows.batch import Batch, Limits, SceneRecord, Summary, find_jobs
from flows.console import Lines, Reporter, current_reporter, report_to
from flows.servers import HOST, PROCESS
from segcore.crew import Crew
from segcore.errors import InUseError, SegcoreError, StoppedError
from segcore.scene import Outcome, Progress
from segcore.spec import Job, Settings, parse_bytes, parse_seconds

#: Scenes of a run that are tasks of their own; of more, a server keeps too many.
MOST_TASKS = 1000


def _may_help(_task: object, _run: TaskRun, state: State[Any]) -> bool:
    """Whether trying a scene again may help: not when its error says otherwise, or when the archive sees to it."""
    try:
        state.result(raise_on_failure=True)
    except (StoppedError, InUseError):
        return False
    except SegcoreError as error:
        return error.retryable
    except Exception:
        return True
    return False


@task(
    name="label-scene",
    task_run_name="{name}",
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_may_help,
    cache_policy=NO_CACHE,
    persist_result=False,
    log_prints=False,
)
def label_scene(name: str, job: dict[str, Any], crew: Any, progress: Any) -> Outcome:
    """Label one scene (`job`: the fields of a Job; `crew` labels it, `progress` hears). Raises SegcoreError."""
    return crew.label(_job(job), progress)


def _name_of_run() -> str:
    scenes = flow_run.parameters.get("scenes") or [""]
    first = str(scenes[0]).rstrip("/").rpartition("/")[2]
    rest = f" and {len(scenes) - 1} more" if len(scenes) > 1 else ""
    return f"{flow_run.parameters.get('model')}: {first}{rest}"


@flow(name="segflow", flow_run_name=_name_of_run, persist_result=False, retries=0)
def segment(
    scenes: Annotated[list[str], Field(min_length=1, description="Files, folders, globs, list files or STAC Items")],
    model: Annotated[str, Field(description="Name of a built-in model, or a folder with a card.json")],
    out: Annotated[str, Field(description="Folder for the products")],
    memory: Annotated[str | None, Field(description="Memory of a worker process, such as 4GiB")] = None,
    tile: Annotated[int | None, Field(ge=1, description="Side of a tile's core in pixels; default: planned")] = None,
    mode: Literal["auto", "exact", "blend"] = "auto",
    overlap: Annotated[int | None, Field(ge=0, description="Pixels that neighbouring windows share")] = None,
    weights: Annotated[
        Literal["cosine", "gaussian", "constant"] | None,
        Field(description="How windows are blended; default: the card's"),
    ] = None,
    tolerance: Annotated[
        float | None, Field(gt=0, lt=1, description="Accept a shorter halo: scores off by this")
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "int8"], Field(description="Numbers that the network computes in")
    ] = "fp32",
    engine: Annotated[
        Literal["auto", "onnxruntime", "openvino"], Field(description="What runs an ONNX network in fp32")
    ] = "auto",
    agreement: Annotated[float, Field(gt=0, le=1, description="Share of labels that must be those of fp32")] = 0.995,
    scores: Annotated[bool, Field(description="Write the score of every class, too")] = False,
    bands: Annotated[list[str] | None, Field(description="Names of the bands of a raster, in file order")] = None,
    scale: Annotated[float | None, Field(description="Physical value = stored x scale + offset")] = None,
    offset: float | None = None,
    cluster: Annotated[
        str | None, Field(description="Address of a dask scheduler, or a cluster file (.yaml); default: none")
    ] = None,
    workers: Annotated[
        int | None,
        Field(ge=0, description="Worker processes; 0: threads of the flow's own. Default: 0, and 1 with deadlines"),
    ] = None,
    max_scenes: Annotated[int | None, Field(ge=1, description="Begin at most so many scenes that take work")] = None,
    stop_after: Annotated[str | None, Field(description="Stop after so long, such as 6h; the next run goes on")] = None,
    max_failure_rate: Annotated[
        float | None, Field(ge=0, le=1, description="Stop when more than this part of the scenes fails")
    ] = None,
    tile_timeout: Annotated[str | None, Field(description="Time that a tile is given, such as 10m")] = None,
    scene_timeout: Annotated[str | None, Field(description="Time that the tiles of a scene are given, as 4h")] = None,
    retry_failed: Annotated[bool, Field(description="Try scenes that are quarantined again")] = False,
    name_folders: Annotated[int, Field(ge=0, description="Names of folders in front of a product's name")] = 0,
    leases: Annotated[str | None, Field(description="Where hosts agree who labels a scene: s3://bucket/prefix")] = None,
    scenes_at_once: Annotated[int | None, Field(ge=1, description="Scenes that are labelled side by side")] = None,
) -> State[Any]:
    """Label every scene with a model and write the masks on the scenes' own grids.

    Ends as Failed when a scene failed, with all others done; the table artifact says which and why.
    """
    try:
        settings = Settings(
            memory=parse_bytes(memory) if memory else None,
            tile=tile,
            mode=mode,
            overlap=overlap,
            weights=weights,
            tolerance=tolerance,
            precision=precision,
            engine=engine,
            agreement=agreement,
            scores=scores,
            bands=tuple(bands) if bands else None,
            scale=scale,
            offset=offset,
        )
        limits = Limits(
            max_scenes,
            parse_seconds("stop_after", stop_after) if stop_after else None,
            max_failure_rate,
            parse_seconds("tile_timeout", tile_timeout) if tile_timeout else None,
            parse_seconds("scene_timeout", scene_timeout) if scene_timeout else None,
            retry_failed,
            scenes_at_once,
        )
        _claim()
        batch = find_jobs(scenes, model, out, settings, name_folders, cluster)
        summary = _label(batch, cluster, limits.processes(0, cluster, workers), limits, leases)
    except SegcoreError as error:
        return Failed(message=str(error))
    if summary.failed:
        return Failed(message=f"{summary.failed} of {summary.total} scenes failed; see the table and {out}/report.html")
    counts = ", ".join(f"{count} {state}" for state, count in summary.counts.items() if count)
    return Completed(message=f"{counts}{f'; {summary.reason}' if summary.reason else ''}")


def _label(batch: Batch, cluster: str | None, workers: int, limits: Limits, leases: str | None) -> Summary:
    run_id = uuid4().hex
    reporter = _Shown(current_reporter() or _Logged())
    with (
        report_to(reporter),
        _log_of_engine(),
        Crew(cluster, workers, limits.deadlines, guards_of(run_id, len(batch), leases)) as crew,
    ):
        as_tasks = {job.name for job in batch.jobs[:MOST_TASKS]}

        def label(job: Job, progress: Progress) -> Outcome:
            if job.name in as_tasks:
                return label_scene(job.name, asdict(job), quote(crew), quote(progress))
            return crew.label(job, progress)

        alone = crew.label_alone if crew.in_this_process else None
        archive = Archive(
            batch.jobs,
            label,
            crew.drain,
            reporter,
            limits,
            batch.problems,
            label_alone=alone,
            retry=False,
            command="a Prefect flow run",
            run_id=run_id,
        )
        summary = archive.run()
        reporter.summary = summary
        reporter.showcase.table(summary)
    return summary


class _Logged(Lines):
    """Lines in the log of the flow run: for runs that a worker started."""

    def note(self, text: str) -> None:
        get_run_logger().info(text)


class _Shown:
    """A reporter that also shows what it hears as artifacts and events."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._bars, self.showcase = reporter, Bars(), Showcase()

    @property
    def summary(self) -> Summary | None:
        return self._reporter.summary

    @summary.setter
    def summary(self, summary: Summary | None) -> None:
        self._reporter.summary = summary

    def progress(self, name: str, done: int, total: int) -> None:
        self._reporter.progress(name, done, total)
        self._bars(name, done, total)

    def ended(self, record: SceneRecord) -> None:
        self._reporter.ended(record)
        self.showcase.show(record)

    def note(self, text: str) -> None:
        self._reporter.note(text)


@contextlib.contextmanager
def _log_of_engine() -> Iterator[None]:
    """What the engine logs, in this process and on workers, goes into the log of the flow run."""
    logger, theirs = logging.getLogger("segcore"), get_run_logger()

    class Passing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            theirs.log(record.levelno, record.getMessage())

    handler = Passing()
    logger.addHandler(handler)
    level, logger.level = logger.level, min(logger.level or logging.INFO, logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _claim() -> None:
    """Say on the flow run which process it is, so that `segflow prefect close-dead` knows when it is gone."""
    if (run_id := flow_run.id) is None:
        return
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(run_id))
        mine = {f"{HOST}{platform.node()}", f"{PROCESS}{os.getpid()}"}
        others = {tag for tag in found.tags if not tag.startswith((HOST, PROCESS))}
        client.update_flow_run(found.id, tags=sorted(others | mine))


def _job(fields: dict[str, Any]) -> Job:
    settings = Settings.from_json(fields["settings"])
    return Job(fields["name"], fields["uri"], fields["model"], fields["out"], settings, fields["alone"])
