"""The `segflow` command."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer

from flows import reports
from flows.archive import Archive, guards_of
from flows.batch import NOTHING_RUN, Batch, Limits, find_jobs
from flows.console import Reporter, reporting
from flows.models import AsJson, models
from flows.options import (
    Agreement,
    Bands,
    Cluster,
    EngineName,
    EngineOption,
    LeasesUrl,
    MaxFailureRate,
    MaxScenes,
    Memory,
    ModelName,
    ModeName,
    ModeOption,
    NameFolders,
    Offset,
    Out,
    Overlap,
    PrecisionName,
    PrecisionOption,
    Processes,
    RetryFailed,
    Scale,
    Scenes,
    ScenesAtOnce,
    SceneTimeout,
    Scores,
    StopAfter,
    TileSide,
    TileTimeout,
    Tolerance,
    WeightsOption,
    settings_of,
)
from flows.planning import plan
from flows.preview import preview
from flows.servers import servers
from segcore.errors import SegcoreError, one_line
from segcore.spec import Settings, parse_seconds

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Label every pixel of images of any size with a U-Net, in tiles that leave no seam.",
)
app.add_typer(models, name="model")
app.add_typer(servers, name="prefect")
app.command()(plan)
app.command()(reports.report)
app.command()(reports.status)


@app.command()
def run(
    scenes: Scenes,
    model: ModelName,
    out: Out,
    memory: Memory = None,
    tile: TileSide = None,
    mode: ModeOption = ModeName.auto,
    overlap: Overlap = None,
    weights: WeightsOption = None,
    tolerance: Tolerance = None,
    precision: PrecisionOption = PrecisionName.fp32,
    engine: EngineOption = EngineName.auto,
    agreement: Agreement = 0.995,
    scores: Scores = False,
    bands: Bands = None,
    scale: Scale = None,
    offset: Offset = None,
    cluster: Cluster = None,
    workers: Processes = None,
    max_scenes: MaxScenes = None,
    stop_after: StopAfter = None,
    max_failure_rate: MaxFailureRate = None,
    tile_timeout: TileTimeout = None,
    scene_timeout: SceneTimeout = None,
    retry_failed: RetryFailed = False,
    scenes_at_once: ScenesAtOnce = None,
    leases: LeasesUrl = None,
    name_folders: NameFolders = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    prefect: Annotated[
        bool | None,
        typer.Option("--prefect/--no-prefect", help="Run as a Prefect flow; default: if a server is configured."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Label scenes and write their masks.

    Exit code 0: every scene is done or up to date; 1: some failed, the others are done; 2: nothing was run; 75: stopped
    by SIGTERM or at a limit, run again to go on.
    """
    limits = Limits(
        max_scenes,
        parse_seconds("--stop-after", stop_after) if stop_after is not None else None,
        max_failure_rate,
        parse_seconds("--tile-timeout", tile_timeout) if tile_timeout is not None else None,
        parse_seconds("--scene-timeout", scene_timeout) if scene_timeout is not None else None,
        retry_failed,
        scenes_at_once,
    )
    settings = settings_of(
        memory, tile, mode, overlap, weights, tolerance, precision, engine, agreement, scores, bands, scale, offset
    )
    batch = find_jobs(scenes, model, out, settings, name_folders, cluster)
    if dry_run:
        limits.processes(int(len(batch) > 1), cluster, workers)  # refuses what a run would refuse
        raise typer.Exit(preview(batch, limits, as_json))
    as_flow = server_is_configured() if prefect is None else prefect
    with reporting(quiet=as_json) as reporter:
        if as_flow:
            summary = _run_flow(batch, scenes, name_folders, settings, cluster, workers, limits, leases, reporter)
        else:
            summary = _run_here(batch, cluster, workers, limits, leases, reporter)
    for warning in summary["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(summary, indent=2))
    elif summary["total"] > 1:
        counts = ", ".join(f"{count} {state}" for state, count in summary["counts"].items() if count)
        stopped = f"; {summary['reason']}, run the same command again to go on" if summary["reason"] else ""
        print(f"{counts}{stopped}; see {out}/report.html", file=sys.stderr)
    raise typer.Exit(summary["exit_code"])


@app.command()
def check(
    product: Annotated[str, typer.Argument(help="Folder of a product, or its manifest.")],
    seams: Annotated[
        bool, typer.Option("--seams", help="Label places again with other borders between tiles.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check that a product is whole, and with --seams that its tiles left no trace.

    Exit code 1 where a file differs from its checksum, or a label or a score from what other tiles say.
    """
    from segcore.publish import faults
    from segcore.scene import check_seams

    path = Path(product)
    path = path / f"{path.absolute().name}.json" if path.is_dir() else path
    wrong = faults(path)
    found: dict[str, Any] = {"product": str(path), "faults": wrong}
    if seams and not wrong:
        report = check_seams(path)
        found["seams"] = asdict(report)
        if not report.clean:
            wrong.append(
                f"tiles show: {report.decided} labels differ for no small reason, scores by {report.change:.2g}"
            )
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for fault in wrong:
            print(f"fault: {fault}")
        if "seams" in found:
            print(
                f"seams: {report.places} places, {report.pixels} pixels labelled again with other borders: "
                f"{report.labels} labels differ, scores by at most {report.change:.2g} ({report.allowed:g} is allowed)"
            )
        if not wrong:
            print(f"{path}: whole")
    raise typer.Exit(1 if wrong else 0)


@app.command()
def demo(
    out: Out = "out",
    prefect: Annotated[bool, typer.Option("--prefect/--no-prefect", help="Run as a Prefect flow.")] = True,
) -> None:
    """Label a real cloudy Landsat 8 scene and a real head MRI, and compare with the models' own programs."""
    from segcore import demo as examples

    item, volume = examples.landsat_item(Path(out) / "inputs"), examples.head_mri()
    worst = 0
    with reporting(quiet=False) as reporter:
        ran = []
        for scene, model in ((item, examples.CLOUD_MODEL), (volume, examples.BRAIN_MODEL)):
            batch = find_jobs([str(scene)], model, out, Settings())
            if prefect:
                summary = _run_flow(batch, [str(scene)], 0, Settings(), None, None, Limits(), None, reporter)
            else:
                summary = _run_here(batch, None, None, Limits(), None, reporter)
            worst = max(worst, summary["exit_code"])
            ran += summary["scenes"]
        if worst == 0 and any(record["state"] == "done" for record in ran):
            cloud, brain = (Path(record["product"]).parent for record in ran)
            picture = Path(out) / "cloud_comparison.png"
            clouds = examples.compare_with_csmask(item, cloud / f"{cloud.name}_mask.tif", picture)
            reporter.note(f"agreement   {cloud.name}: {clouds.sentence}")
            brains = examples.compare_with_deepbet(volume, brain / f"{brain.name}_mask.nii.gz")
            reporter.note(f"agreement   {brain.name}: {brains.sentence}")
        for record in ran:
            if record["product"]:
                reporter.note(f"look at     {Path(record['product']).parent}")
    raise typer.Exit(worst)


def server_is_configured() -> bool:
    """Whether a Prefect server is set in the environment or the active profile; Prefect is only asked if it may be."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    if not (home / "profiles.toml").is_file() and "PREFECT_PROFILE" not in os.environ:
        return False
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


def _run_here(
    batch: Batch,
    cluster: str | None,
    workers: int | None,
    limits: Limits,
    leases: str | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Run the archive with the bare engine."""
    from segcore.crew import Crew

    run_id = uuid4().hex
    guards = guards_of(run_id, len(batch), leases)
    with Crew(cluster, limits.processes(int(len(batch) > 1), cluster, workers), limits.deadlines, guards) as crew:
        alone = crew.label_alone if crew.in_this_process else None
        command = " ".join(sys.argv[1:])
        archive = Archive(
            batch.jobs,
            crew.label,
            crew.drain,
            reporter,
            limits,
            batch.problems,
            label_alone=alone,
            command=command,
            run_id=run_id,
        )
        return archive.run().to_json()


def _run_flow(
    batch: Batch,
    scenes: list[str],
    name_folders: int,
    settings: Settings,
    cluster: str | None,
    workers: int | None,
    limits: Limits,
    leases: str | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Run the archive as a Prefect flow, on the configured server or on the embedded one."""
    processes = limits.processes(int(len(batch) > 1), cluster, workers)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    where = os.environ.get("PREFECT_API_URL") if server_is_configured() else None
    reporter.note(f"flow        {where or 'on the embedded Prefect server, which takes 10 to 25 seconds to start'}")
    from flows.segment import segment

    parameters = asdict(settings) | asdict(limits)
    parameters["memory"] = str(settings.memory) if settings.memory else None
    parameters["bands"] = list(settings.bands) if settings.bands else None
    for wanted, given in (
        ("stop_after", "stop_after"),
        ("tile_timeout", "tile_seconds"),
        ("scene_timeout", "scene_seconds"),
    ):
        seconds = parameters.pop(given)
        parameters[wanted] = None if seconds is None else f"{seconds:g}s"
    state = segment(
        scenes=scenes,
        model=batch.jobs[0].model,
        out=batch.jobs[0].out,
        name_folders=name_folders,
        cluster=cluster,
        workers=processes,
        leases=leases,
        **parameters,
        return_state=True,
    )
    if reporter.summary is None:
        raise SegcoreError(state.message or f"the flow run ended as {state.name}")
    summary, reporter.summary = reporter.summary, None
    return summary.to_json()


def _version(value: bool) -> None:
    if value:
        print(f"segflow {version('segflow')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def command() -> None:
    """Run the command line: what a user can mend becomes one line and exit code 2, whatever it is."""
    warnings.filterwarnings("ignore", message=".*no geotransform, gcps, or rpcs.*")
    for talker in ("distributed", "distributed.client"):  # what they would say becomes an error of ours
        logging.getLogger(talker).setLevel(logging.CRITICAL)
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if os.environ.get("SEGFLOW_TRACEBACK"):
            raise
        text = str(error)
        if callable(usage := getattr(error, "format_message", None)):  # the command line itself was wrong
            asked = getattr(getattr(error, "ctx", None), "command_path", "segflow")
            text = f"{usage().replace('Value error, ', '').rstrip('.')}; see `{asked} --help`"
        elif not isinstance(error, SegcoreError):
            text = (
                f"unexpected {type(error).__name__}: {one_line(error)}; SEGFLOW_TRACEBACK=1 shows where, please report"
            )
        if "--json" in sys.argv:
            print(json.dumps({"error": text, "exit_code": NOTHING_RUN}, indent=2))
        else:
            print(f"error: {text}", file=sys.stderr)
        sys.exit(NOTHING_RUN)
    sys.exit(code if isinstance(code, int) else 0)
