"""The `segflow` command."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows.batch import NOTHING_RUN, Summary, find_jobs, run_batch
from flows.console import Reporter, reporting
from flows.models import AsJson, models
from segcore.errors import PlanError, SegcoreError, one_line
from segcore.spec import Job, Settings, format_bytes, in_words, parse_bytes, times

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Label every pixel of images of any size with a U-Net, in tiles that leave no seam.",
)
app.add_typer(models, name="model")


class ModeName(StrEnum):
    """`--mode`."""

    auto = "auto"
    exact = "exact"
    blend = "blend"


class WeightsName(StrEnum):
    """`--weights`."""

    cosine = "cosine"
    gaussian = "gaussian"
    constant = "constant"


class PrecisionName(StrEnum):
    """`--precision`."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


Scenes = Annotated[list[str], typer.Argument(help="Files, folders, globs, list files (.txt) or STAC Items.")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="A built-in model, or a folder with a card.json.")]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder for the products.")]
Memory = Annotated[
    str | None, typer.Option(help="Memory of a worker process, such as 4GiB; default: half of what is free.")
]
TileSide = Annotated[int | None, typer.Option("--tile", help="Side of a tile's core in pixels; default: planned.")]
ModeOption = Annotated[ModeName, typer.Option("--mode", help="How tiles are joined; auto asks the model's card.")]
Overlap = Annotated[int | None, typer.Option(help="Pixels that windows share in blend mode; default: the card's.")]
WeightsOption = Annotated[
    WeightsName | None, typer.Option("--weights", help="How windows are blended; default: the card's.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(help="Accept scores that differ by this from the whole image's, for a shorter halo; default: none."),
]
PrecisionOption = Annotated[
    PrecisionName,
    typer.Option("--precision", help="Numbers that the network computes in; int8: once it has proved itself."),
]
Agreement = Annotated[
    float, typer.Option(help="Share of labels that must be those of fp32, or --precision is refused.")
]
Scores = Annotated[bool, typer.Option("--scores", help="Write the score of every class, too.")]
Bands = Annotated[str | None, typer.Option(help="Names of a raster's bands in file order, such as blue,green,red,nir.")]
Scale = Annotated[float | None, typer.Option(help="Of a raster that carries none: value = stored x scale + offset.")]
Offset = Annotated[float | None, typer.Option(help="See --scale.")]
Cluster = Annotated[str | None, typer.Option(help="Address of a dask scheduler (tcp://...); default: this process.")]


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
    agreement: Agreement = 0.995,
    scores: Scores = False,
    bands: Bands = None,
    scale: Scale = None,
    offset: Offset = None,
    cluster: Cluster = None,
    prefect: Annotated[
        bool | None,
        typer.Option("--prefect/--no-prefect", help="Run as a Prefect flow; default: if a server is configured."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Label scenes and write their masks.

    Exit code 0: every scene is done or up to date; 1: some failed, the others are done; 2: nothing was run; 75: stopped
    by SIGTERM, run again to go on.
    """
    settings = _settings(
        memory, tile, mode, overlap, weights, tolerance, precision, agreement, scores, bands, scale, offset
    )
    as_flow = server_is_configured() if prefect is None else prefect
    with reporting(quiet=as_json) as reporter:
        if as_flow:
            summary = _run_flow(scenes, model, out, settings, cluster, reporter)
        else:
            summary = _run_here(find_jobs(scenes, model, out, settings), cluster, reporter)
    for warning in summary["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(summary, indent=2))
    elif len(summary["scenes"]) > 1:
        counts = ", ".join(f"{count} {state}" for state, count in summary["counts"].items())
        print(f"{counts}; see {out}/run.json", file=sys.stderr)
    raise typer.Exit(summary["exit_code"])


@app.command()
def plan(
    scene: Annotated[str, typer.Argument(help="One scene.")],
    model: ModelName,
    out: Out = "out",
    memory: Memory = None,
    tile: TileSide = None,
    mode: ModeOption = ModeName.auto,
    overlap: Overlap = None,
    weights: WeightsOption = None,
    tolerance: Tolerance = None,
    precision: PrecisionOption = PrecisionName.fp32,
    agreement: Agreement = 0.995,
    bands: Bands = None,
    scale: Scale = None,
    offset: Offset = None,
    as_json: AsJson = False,
) -> None:
    """Show how a scene would be tiled, without running the network."""
    from segcore.io import find_scenes, product_name
    from segcore.scene import provenance, survey

    uris = find_scenes([scene])
    if len(uris) > 1:
        raise PlanError(f"{scene} names {len(uris)} scenes; plan one at a time, such as {uris[0]}")

    settings = _settings(
        memory, tile, mode, overlap, weights, tolerance, precision, agreement, False, bands, scale, offset
    )
    prospect = survey(Job(product_name(uris[0]), uris[0], model, out, settings))
    facts = provenance(prospect, "", "")["segflow:plan"] | {"tiles": len(prospect.plan)}
    facts |= {"scene": prospect.source.uri, "grid": list(prospect.source.grid.shape)}
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    source, table = prospect.source, Table(show_header=False, box=None)
    table.add_row(
        "scene",
        f"{source.name}, {source.grid} pixels, channels: {', '.join(source.channels)}",
    )
    table.add_row("mode", _mode_sentence(facts))
    table.add_row("tiles", f"{len(prospect.plan)} with cores of {times(facts['core'])}")
    table.add_row("work", f"{facts['work']:.2f} times the pixels that the network sees ({times(facts['canvas'])})")
    table.add_row("memory", f"{format_bytes(facts['predicted_memory_bytes'])} at the peak (predicted)")
    for warning in prospect.source.warnings:
        table.add_row("warning", warning)
    Console().print(table)


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
            if prefect:
                summary = _run_flow([str(scene)], model, out, Settings(), None, reporter)
            else:
                summary = _run_here(find_jobs([str(scene)], model, out, Settings()), None, reporter)
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


def _run_here(jobs: list[Job], cluster: str | None, reporter: Reporter) -> dict[str, Any]:
    """Run the batch with the bare engine."""
    from segcore.execute import Workers
    from segcore.scene import segment_scene

    with Workers(cluster) as workers:
        summary: Summary = run_batch(jobs, lambda job: segment_scene(job, workers, reporter.progress), reporter.ended)
    return summary.to_json()


def _run_flow(
    scenes: list[str], model: str, out: str, settings: Settings, cluster: str | None, reporter: Reporter
) -> dict[str, Any]:
    """Run the batch as a Prefect flow, on the configured server or on the embedded one."""
    jobs = find_jobs(scenes, model, out, settings)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    where = os.environ.get("PREFECT_API_URL") if server_is_configured() else None
    reporter.note(f"flow        {where or 'on the embedded Prefect server, which takes 10 to 25 seconds to start'}")
    from flows.segment import segment

    parameters = asdict(settings)
    parameters["memory"] = str(settings.memory) if settings.memory else None
    parameters["bands"] = list(settings.bands) if settings.bands else None
    state = segment(
        scenes=[job.uri for job in jobs],
        model=jobs[0].model,
        out=jobs[0].out,
        cluster=cluster,
        **parameters,
        return_state=True,
    )
    if reporter.summary is None:
        raise SegcoreError(state.message or f"the flow run ended as {state.name}")
    summary, reporter.summary = reporter.summary, None
    return summary.to_json()


def _settings(
    memory: str | None,
    tile: int | None,
    mode: ModeName,
    overlap: int | None,
    weights: WeightsName | None,
    tolerance: float | None,
    precision: PrecisionName,
    agreement: float,
    scores: bool,
    bands: str | None,
    scale: float | None,
    offset: float | None,
) -> Settings:
    names = tuple(name.strip() for name in bands.split(",")) if bands else None
    return Settings(
        memory=parse_bytes(memory) if memory is not None else None,
        tile=tile,
        mode=mode.value,
        overlap=overlap,
        weights=weights.value if weights else None,
        tolerance=tolerance,
        precision=precision.value,
        agreement=agreement,
        scores=scores,
        bands=names,
        scale=scale,
        offset=offset,
    )


def _mode_sentence(facts: dict[str, Any]) -> str:
    if facts["mode"] == "blend":
        windows = f"windows of {times(facts['window'])} every {times(facts['step'])} pixels"
        return f"blend, {windows}, {facts['weights']} weights"
    halo = in_words(tuple((before, after) for before, after in facts["halo"]))
    if facts["mode"] == "exact":
        return f"exact, halo {halo} pixels"
    return f"measured: a halo of at most {halo} pixels, to be shortened on the scene itself"


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
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what it would say becomes an error of ours
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if os.environ.get("SEGFLOW_TRACEBACK"):
            raise
        text = str(error)
        if callable(usage := getattr(error, "format_message", None)):  # the command line itself was wrong
            text = f"{usage()}; see `segflow --help`"
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
