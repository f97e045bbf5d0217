"""What is known of a scene before any heavy work: headers, card, plan, and whether its product would be the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from segcore.errors import PlanError, SceneError
from segcore.grid import Grid
from segcore.io import open_scene
from segcore.io.source import Source, Wanted
from segcore.machine import free_memory
from segcore.model import check_precision, runner_of, stages_of
from segcore.model.card import Card, Model, load_card
from segcore.model.proved import versions
from segcore.model.quantise import VERSION as QUANTISE_VERSION
from segcore.model.quantise import find_quantised
from segcore.plan import Plan, make_plan
from segcore.spec import Engine, Job, Runner, times
from segcore.speed import Speed, recall
from segcore.staging import Stages

#: Raised whenever a change of this code may change a pixel of a product: old products are then made again. Where a halo
#: is measured, that also goes for what is looked at (`segcore.seams`) and for `MEASURED_CORE`.
PIXEL_VERSION = 2
#: Pixels of a scene, as the network sees it, up to which one pass over it is always as good.
_SMALL = 2**19
#: What OpenVINO holds in one pass, relative to what a run node by node would (measured).
_IN_OPENVINO = 1.15
#: Packages whose versions a manifest tells.
_PACKAGES = ("segflow", "numpy", "onnxruntime", "torch", "rasterio", "nibabel", "zarr", "distributed")
#: Folder inside the output folder for what is not finished.
HIDDEN = ".segflow"


@dataclass(frozen=True, slots=True)
class Prospect:
    """What is known of a job before any heavy work: headers, card, plan and the fingerprint of the product.

    `runner`: what the network is run in; `calibration`: digest of the scene that a network in int8 is calibrated on,
    and of how it was read; None in floats.
    """

    job: Job
    model: Model
    source: Source
    plan: Plan
    fingerprint: str
    runner: Runner
    calibration: str | None = None

    @property
    def hidden(self) -> Path:
        """Where the unfinished product of this scene lies."""
        return Path(self.job.out).absolute() / HIDDEN / self.source.name

    @property
    def scratch_root(self) -> Path:
        core = "x".join(map(str, self.plan.core))
        return self.hidden / f"{_scratch_key(self.fingerprint, self.runner)}-{core}"

    @property
    def engine(self) -> Engine:
        """What workers are to run the network in: that of the plan, or what they take instead where it fails."""
        return "onnxruntime" if self.runner == "onnxruntime" else self.job.settings.engine

    @property
    def speed_key(self) -> str:
        """Under what name the speed of this model on this machine is remembered."""
        return f"{self.model.digest} {self.job.settings.precision} {self.runner}"

    @property
    def speed(self) -> Speed | None:
        """How fast this model was on this machine when it last ran; None where that tells nothing of this scene."""
        known = recall(self.speed_key)
        return known if known and known.tells_of(self.source.grid.size) else None

    def tiling(self) -> dict[str, Any]:
        """The plan as JSON."""
        tiling: dict[str, Any] = {
            "mode": self.plan.mode,
            "core": list(self.plan.core),
            "counts": list(self.plan.counts),
            "canvas": list(self.plan.canvas),
        }
        if self.plan.mode == "blend":
            sight = self.plan.sight
            tiling |= {"window": list(sight.window or ()), "step": list(sight.step), "weights": sight.weights}
        else:
            tiling |= {"halo": [list(sides) for sides in self.plan.halo]}
        if (staging := self.plan.staging) is not None:
            stages = {"levels": staging.levels, "chunk": list(staging.chunk)}
            tiling |= {"stages": stages} if staging.levels else {"cropped": True}
        tiling |= {"work": round(self.plan.work, 4), "predicted_memory_bytes": self.plan.memory}
        return tiling

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings that do nothing for this scene and model, as warnings."""
        settings = self.job.settings
        given = [name for name in ("overlap", "weights") if getattr(settings, name) is not None]
        if self.plan.mode == "blend" or not given:
            return ()
        names = " and ".join(f"--{name}" for name in given)
        return (f"{names}: of no effect, as windows are only blended in blend mode, and this plan is {self.plan.mode}",)

    @property
    def computed(self) -> float:
        """Pixels that the network computes."""
        return self.plan.work * math.prod(self.plan.canvas)

    @property
    def disk(self) -> tuple[int, int]:
        """Bytes that scratch and the product take at most, before compression."""
        pixels, scores = self.source.grid.size, 4 * len(self.model.card.classes) * self.job.settings.scores
        return pixels * (1 + scores) + self.source.staged_bytes, pixels * 4 * (1 + scores) // 3


def survey(job: Job, core: tuple[int, ...] | None = None) -> Prospect:
    """Read card and headers, and plan. Raises SegcoreError for what cannot work, before any heavy work.

    `core`: shape of a tile's core, None for what settings, an interrupted run or the plan say.
    """
    model = load_card(job.model)
    runners = _runners(model, job)
    source = open_scene(job.uri, wanted_by(model.card), job.settings, job.name)
    calibration = _calibration(job, model, source)
    fingerprint = _fingerprint(job, model, source, calibration)
    canvas = canvas_of(source, model.card)
    sight = model.card.sight(job.settings.overlap, job.settings.weights)
    memory = job.settings.memory or free_memory() // 2
    side = job.settings.tile
    given = core or ((side,) * len(canvas) if side else None)

    def plan_with(runner: Runner, core: tuple[int, ...] | None) -> Plan:
        measured = job.settings.tolerance is not None
        stages, precision = _stages_of(model, canvas), job.settings.precision
        held = stages.inner[0].bytes if stages is not None else 0.0
        cost = model.card.cost(runner, model.weights_bytes, precision, least=held, scores=job.settings.scores)
        if stages is not None and runner == "openvino" and precision == "fp32":
            # The card's number is what ONNX Runtime holds, which fills up few channels to sixteen.
            cost = replace(cost, engine_bytes_per_pixel=min(cost.engine_bytes_per_pixel, _IN_OPENVINO * held))
        try:
            return make_plan(
                source.grid,
                canvas,
                sight,
                cost,
                memory,
                core=core,
                mode=job.settings.mode,
                measured=measured,
                stages=stages,
                in_chunks=precision != "int8",
                alone=job.alone,
            )
        except (PlanError, SceneError) as error:
            raise type(error)(f"{source.uri}: {error}") from error

    # With what a run was interrupted that is gone on with if it can be, whatever memory is free today.
    for runner in runners if given is None else []:
        if (interrupted := _interrupted_core(job, source.name, fingerprint, runner)) is not None:
            with contextlib.suppress(PlanError):
                plan = plan_with(runner, interrupted)
                return Prospect(job, model, source, plan, fingerprint, runner, calibration)
    plans: dict[Runner, Plan] = {}
    for runner in runners[:-1]:
        with contextlib.suppress(PlanError):
            plans[runner] = plan_with(runner, given)
    try:
        plans[runners[-1]] = plan_with(runners[-1], given)
    except PlanError:
        if not plans:
            raise
    # The quicker engine holds more: where that makes its tiles too small, the other one is the quicker.
    runner = min(plans, key=lambda runner: plans[runner].effort(runner))
    return Prospect(job, model, source, plans[runner], fingerprint, runner, calibration)


def _runners(model: Model, job: Job) -> list[Runner]:
    """What the network may be run in, the quickest first: OpenVINO takes more memory than some budgets have.

    Raises ModelError, PlanError for what cannot be.
    """
    runner = runner_of(model, job.settings.engine)
    if (precision := job.settings.precision) != "fp32":
        check_precision(model, precision)
        return ["openvino"]
    return [runner, "onnxruntime"] if runner == "openvino" and job.settings.engine == "auto" else [runner]


def _scratch_key(fingerprint: str, runner: Runner) -> str:
    """Tiles that differ by rounding do not lie beside each other."""
    return hashlib.sha256(f"{fingerprint} {runner}".encode()).hexdigest()[:16]


def wanted_by(card: Card) -> Wanted:
    """What a card wants to see of a scene."""
    return Wanted(
        tuple(channel.name for channel in card.channels),
        card.axes,
        card.orientation,
        tuple(channel.aliases for channel in card.channels),
    )


def canvas_of(source: Source, card: Card) -> tuple[int, ...]:
    """Shape of the grid that the network sees: the scene's, or one with the spacing that the card wants."""
    grid: Grid = source.grid
    if card.spacing is None:
        return grid.shape
    if source.spacing is None:
        raise SceneError(
            f"{source.uri} does not say how large its pixels are in metres, and {card.name} wants "
            f"{times(card.spacing)}; reproject it to a projected CRS (gdalwarp)"
        )
    sizes = zip(grid.shape, source.spacing, card.spacing, strict=True)
    return tuple(max(1, round(n * have / want)) for n, have, want in sizes)


def check_range(source: Source, card: Card) -> None:
    """Look at the scene from afar. Raises SceneError where a channel is nowhere near what the model was made for."""
    if not any(channel.valid_range for channel in card.channels):
        return
    preview = source.overview(tuple(min(n, 256) for n in source.grid.shape))
    for values, channel in zip(preview, card.channels, strict=True):
        valid = values[~np.isnan(values)]
        if channel.valid_range is None or not valid.size:
            continue
        low, high = channel.valid_range
        median = float(np.median(valid))
        if not low <= median <= high:
            raise SceneError(
                f"{source.uri}: half of {channel.name} lies above {median:g}, and {card.name} wants {channel.units} "
                f"from {low:g} to {high:g}; say how stored numbers become {channel.units} with --scale and --offset, "
                f"or in a STAC Item (raster:bands)"
            )


def check_unchanged(prospect: Prospect) -> None:
    """Look at a labelled scene's files again. Raises SceneError, retryable, where they are not those of the survey.

    Some tiles may then be of the one, some of the other. Where files are gone, what was labelled is still worth having.
    """
    try:
        now = _fingerprint(prospect.job, prospect.model, prospect.source, prospect.calibration)
    except SceneError as error:
        raise SceneError(
            f"{error}; it was there when it was labelled, and finished tiles are kept: is its storage mounted?",
            retryable=True,
        ) from error
    if now != prospect.fingerprint:
        raise SceneError(
            f"{prospect.source.uri} has changed while it was labelled; run again when it is written whole",
            retryable=True,
        )


def provenance(prospect: Prospect, created: str, engine: str, warnings: Sequence[str]) -> dict[str, Any]:
    """What a manifest says of the making of a product: input, model, settings, plan, versions and warnings."""
    card, source = prospect.model.card, prospect.source
    model = {
        "reference": prospect.job.model,
        "name": card.name,
        "version": card.version,
        "digest": prospect.model.digest,
        "license": card.license,
    }
    model |= {"citation": card.citation, "engine": engine, "weights_sha256": card.artifacts[0].sha256}
    return {
        "created": created,
        "segflow:fingerprint": prospect.fingerprint,
        "segflow:datetime_is": "acquisition"
        if source.datetime
        else "processing: the scene does not say when it was taken",
        "segflow:input": {"uri": source.uri, "identity": dict(source.identity())},
        "segflow:model": model,
        "segflow:settings": asdict(prospect.job.settings),
        "segflow:plan": prospect.tiling(),
        "segflow:versions": {"python": platform.python_version(), **versions(*_PACKAGES)},
        "segflow:warnings": list(warnings),
    }


def _stages_of(model: Model, canvas: tuple[int, ...]) -> Stages | None:
    """How a network can be run in stages; None where it cannot be, or where the scene is too small to be worth it."""
    if math.prod(canvas) <= _SMALL or not model.card.local or model.card.artifacts[0].format != "onnx":
        return None
    path = model.weights()[1]
    return _stages_in(path, len(model.card.channels), model.digest)


@cache
def _stages_in(path: Path, channels: int, _digest: str) -> Stages | None:
    """The same, looked up in the network once for each process."""
    return stages_of(path, channels)


def _calibration(job: Job, model: Model, source: Source) -> str | None:
    """What a network in int8 is calibrated on, None in floats: the scene of the one that is kept, or else this one."""
    if job.settings.precision != "int8":
        return None
    if (kept := find_quantised(model)) is not None:
        return kept.calibration
    mine = {"input": source.identity(), "settings": job.settings.pixels(), "quantise": QUANTISE_VERSION}
    return hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()


def _fingerprint(job: Job, model: Model, source: Source, calibration: str | None) -> str:
    """SHA-256 of all that a product depends on: input, model, settings, and the version of the arithmetic.

    Of a network in int8 also what it was calibrated on, which may be another scene.
    """
    parts = {
        "pixels": PIXEL_VERSION,
        "input": source.identity(),
        "model": model.digest,
        "settings": job.settings.pixels(),
    }
    if calibration is not None:
        parts["calibration"] = calibration
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _interrupted_core(job: Job, name: str, fingerprint: str, runner: Runner) -> tuple[int, ...] | None:
    """The core of a run that was interrupted, so that its tiles can be used whatever memory is free today."""
    for folder in sorted((Path(job.out) / HIDDEN / name).glob(f"{_scratch_key(fingerprint, runner)}-*")):
        with contextlib.suppress(ValueError):
            return tuple(int(side) for side in folder.name.partition("-")[2].split("x"))
    return None
