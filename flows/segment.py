"""The Prefect flow: scenes in, products out, one Prefect task for each scene; its tiles run on dask inside the task.

Prefect keeps no cache of scenes: whether a product is up to date is decided by its manifest, which knows.
"""

# Annotations are real here, not texts: Prefect makes a form of them, also in processes that get this module pickled.
import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.batch import SceneRecord, Summary, find_jobs, run_batch
from flows.console import Lines, current_reporter, report_to
from segcore.errors import SegcoreError
from segcore.execute import Workers
from segcore.scene import Outcome, segment_scene
from segcore.spec import Job, Settings, parse_bytes


def _may_help(_task: object, _run: TaskRun, state: State[Any]) -> bool:
    """Whether trying a scene again may help: not when its error says otherwise."""
    try:
        state.result(raise_on_failure=True)
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
def label_scene(name: str, job: dict[str, Any], workers: Workers) -> Outcome:
    """Label one scene (`job`: the fields of a Job). Raises SegcoreError."""
    reporter = current_reporter() or Lines()
    return segment_scene(_job(job), workers, reporter.progress)


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
    agreement: Annotated[float, Field(gt=0, le=1, description="Share of labels that must be those of fp32")] = 0.995,
    scores: Annotated[bool, Field(description="Write the score of every class, too")] = False,
    bands: Annotated[list[str] | None, Field(description="Names of the bands of a raster, in file order")] = None,
    scale: Annotated[float | None, Field(description="Physical value = stored x scale + offset")] = None,
    offset: float | None = None,
    cluster: Annotated[str | None, Field(description="Address of a dask scheduler; default: this process")] = None,
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
            agreement=agreement,
            scores=scores,
            bands=tuple(bands) if bands else None,
            scale=scale,
            offset=offset,
        )
        jobs = find_jobs(scenes, model, out, settings)
        summary = _label(jobs, cluster)
    except SegcoreError as error:
        return Failed(message=str(error))
    _publish_table(summary)
    failed = summary.count("failed")
    if failed:
        return Failed(message=f"{failed} of {len(summary.records)} scenes failed; see the table and {out}/run.json")
    return Completed(message=f"{summary.count('done')} done, {summary.count('up to date')} up to date")


def _label(jobs: list[Job], cluster: str | None) -> Summary:
    with report_to(current_reporter() or _Logged()) as reporter, Workers(cluster) as workers:
        summary = run_batch(jobs, lambda job: label_scene(job.name, asdict(job), workers), reporter.ended)
        reporter.summary = summary
    return summary


class _Logged(Lines):
    """Lines in the log of the flow run: for runs that a worker started."""

    def note(self, text: str) -> None:
        get_run_logger().info(text)


def _publish_table(summary: Summary) -> None:
    """The run as a table artifact; a server that does not take it is no reason for the run to fail."""
    with contextlib.suppress(Exception):
        create_table_artifact(
            key="segflow-run",
            table=[_row(record) for record in summary.records],
            description=f"{len(summary.records)} scenes into {summary.out}",
        )


def _row(record: SceneRecord) -> dict[str, Any]:
    shares: Sequence[dict[str, Any]] = record.details.get("classes", ())
    return {
        "scene": record.name,
        "state": record.state,
        "seconds": record.seconds,
        "tiles": record.details.get("tiles", ""),
        "classes": ", ".join(f"{share['name']} {share['fraction']:.1%}" for share in shares),
        "reason": record.reason,
    }


def _job(fields: dict[str, Any]) -> Job:
    settings = Settings.from_json(fields["settings"])
    return Job(fields["name"], fields["uri"], fields["model"], fields["out"], settings)
