"""`segflow plan`: how a scene would be tiled, and what that takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows.models import AsJson
from flows.options import (
    Agreement,
    Bands,
    EngineName,
    EngineOption,
    Memory,
    ModelName,
    ModeName,
    ModeOption,
    Offset,
    Out,
    Overlap,
    PrecisionName,
    PrecisionOption,
    Processes,
    Scale,
    Scores,
    TileSide,
    Tolerance,
    WeightsOption,
    settings_of,
)
from segcore.errors import PlanError
from segcore.spec import Job, format_bytes, format_seconds, in_words, times
from segcore.speed import Speed
from segcore.survey import Prospect


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
    engine: EngineOption = EngineName.auto,
    agreement: Agreement = 0.995,
    bands: Bands = None,
    scale: Scale = None,
    offset: Offset = None,
    workers: Processes = None,
    scores: Scores = False,
    calibrated: Annotated[
        bool, typer.Option("--calibrate", help="Run the network for some seconds first, to know its speed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a scene would be tiled, in what memory, on what disk and in what time, without labelling it."""
    from segcore.calibrate import calibrate
    from segcore.io import find_scenes, product_name
    from segcore.machine import check_memory
    from segcore.model import check_processor
    from segcore.survey import survey

    uris = find_scenes([scene]).strict()
    if len(uris) > 1:
        raise PlanError(f"{scene} names {len(uris)} scenes; plan one at a time, such as {uris[0]}")
    settings = settings_of(
        memory, tile, mode, overlap, weights, tolerance, precision, engine, agreement, scores, bands, scale, offset
    )
    check_memory(settings.memory)
    check_processor(settings.precision)
    prospect = survey(Job(product_name(uris[0]), uris[0], model, out, settings))
    prospect.model.weights()  # what a run would refuse
    speed = calibrate(prospect) if calibrated else prospect.speed
    facts = _facts(prospect, speed, workers or 0, calibrated)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, text in _rows(prospect, facts):
        table.add_row(name, text)
    Console().print(table)


def _facts(prospect: Prospect, speed: Speed | None, processes: int, calibrated: bool) -> dict[str, Any]:
    """The plan as JSON; bytes and seconds are predictions."""
    plan, source = prospect.plan, prospect.source
    scratch, product = prospect.disk
    seconds = None if speed is None else round(speed.predict(prospect.computed, source.grid.size), 1)
    return {
        **prospect.tiling(),
        "tiles": len(plan),
        "engine": prospect.runner,
        "scene": source.uri,
        "grid": list(source.grid.shape),
        # With workers of their own, the process that hands out the tiles makes statistics and products.
        "predicted_memory_bytes_in_total": plan.memory if not processes else processes * plan.memory + plan.resting,
        "predicted_scratch_bytes": scratch,
        "predicted_product_bytes": product,
        "predicted_seconds": seconds,
        "prediction_from": None if seconds is None else "calibration" if calibrated else "the last run here",
        "warnings": [*source.warnings, *prospect.idle],
    }


def _rows(prospect: Prospect, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The plan in words."""
    source = prospect.source
    yield "scene", f"{source.name}, {source.grid} pixels, channels: {', '.join(source.channels)}"
    yield "mode", _mode_sentence(facts)
    yield "engine", facts["engine"]
    yield "tiles", f"{facts['tiles']} with cores of {times(facts['core'])}"
    yield "work", f"{facts['work']:.2f} times the pixels that the network sees ({times(facts['canvas'])})"
    each, total = facts["predicted_memory_bytes"], facts["predicted_memory_bytes_in_total"]
    yield (
        "memory",
        f"{format_bytes(each)} for each worker process at its peak, {format_bytes(total)} in total (predicted)",
    )
    sizes = format_bytes(facts["predicted_scratch_bytes"]), format_bytes(facts["predicted_product_bytes"])
    yield "disk", f"at most {sizes[0]} of scratch while it runs, {sizes[1]} of product (before compression)"
    seconds = facts["predicted_seconds"]
    told = "not known, as this model has not run here on a scene of this size: --calibrate measures it"
    yield "time", told if seconds is None else f"{format_seconds(seconds)} (from {facts['prediction_from']})"
    for warning in facts["warnings"]:
        yield "warning", warning


def _mode_sentence(facts: dict[str, Any]) -> str:
    if facts["mode"] == "blend":
        windows = f"windows of {times(facts['window'])} every {times(facts['step'])} pixels"
        return f"blend, {windows}, {facts['weights']} weights"
    halo = in_words(tuple((before, after) for before, after in facts["halo"]))
    if facts["mode"] == "exact":
        stages = facts.get("stages")
        levels = f", {stages['levels']} outer levels in chunks of {times(stages['chunk'])}" if stages else ""
        levels += ", and only what is wanted of a window rises" if facts.get("cropped") else ""
        return f"exact, halo {halo} pixels{levels}"
    return f"measured: a halo of at most {halo} pixels, to be shortened on the scene itself"
