"""The whole story of one scene, top to bottom.

job -> card, headers -> up to date?  -> plan, or a refusal with numbers -> statistics of the scene
    -> tiles to the workers, labels to scratch -> publish: write, verify, move, manifest last
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar
from uuid import uuid4

from segcore.errors import LateError, MemoryShortageError, ProductError, SceneError, SegcoreError
from segcore.execute import Workers, label_tiles, run_once
from segcore.io.scratch import Scratch
from segcore.lock import Guard, Guarding, empty, held, locked
from segcore.model import load_segmenter
from segcore.model.quantise import Quantised, find_quantised, keep_quantised, put
from segcore.precision import Proof, compare, look, look_for_bf16, make_int8
from segcore.publish import ClassShare, class_shares, is_current, legend_of, manifest_of, manifest_path, publish
from segcore.scaling import Scaling, fit_scaling
from segcore.seams import Measured, SeamReport, measure_halo, report_seams
from segcore.spec import SAME_SCORES, Engine, Job, Settings, usable_cores
from segcore.speed import Speed, remember
from segcore.survey import Prospect, check_range, check_unchanged, provenance, survey
from segcore.tile import Labeller
from segcore.worker import Recipe, TileReport

#: How long to wait for another run that has the same scene in work.
LOCK_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a scene ended. `windows` were inferred; `tiles_kept` were there already, of a run that was interrupted."""

    state: Literal["done", "up to date"]
    name: str
    uri: str
    product: str
    seconds: float
    tiles: int = 0
    tiles_kept: int = 0
    windows: int = 0
    pixels: int = 0
    engine: str = ""
    shares: tuple[ClassShare, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a tile and the tiles of a scene are given; None for as long as they take."""

    tile_seconds: float | None = None
    scene_seconds: float | None = None


@dataclass(slots=True)
class Tally:
    """What the tiles of a scene took, added up: of a million reports only the sum is kept."""

    tiles: int = 0
    windows: int = 0
    engine: str = ""
    read: float = 0.0
    infer: float = 0.0
    label: float = 0.0
    write: float = 0.0

    def add(self, report: TileReport) -> None:
        self.tiles += 1
        self.windows += report.windows
        self.engine = self.engine or (report.engine if report.windows else "")
        self.read += report.read_seconds
        self.infer += report.infer_seconds
        self.label += report.label_seconds
        self.write += report.write_seconds

    def busy_fraction(self, seconds: float, devices: int) -> float:
        """For which part of the time the devices were at work."""
        return round(min(1.0, self.infer / max(seconds * devices, 1e-9)), 4)

    def to_json(self) -> dict[str, float]:
        """Seconds in each stage, of all workers together; stages of several tiles overlap."""
        stages = {"read_and_scale": self.read, "infer": self.infer, "blend_and_label": self.label, "store": self.write}
        return {stage: round(seconds, 3) for stage, seconds in stages.items()}


Progress = Callable[[str, int, int], None]
"""Called with the scene's name, tiles done and tiles in all, whenever these change."""


def segment_scene(
    job: Job,
    workers: Workers,
    progress: Progress = lambda *_: None,
    deadlines: Deadlines = Deadlines(),
    guarding: Guarding | None = None,
) -> Outcome:
    """Label one scene, or find that its product is up to date. Raises SegcoreError; then there is no new product.

    After a kill at any moment the same call goes on with the tiles that were finished, and ends with the same bytes.
    Tiles that do not fit in memory are tried once more at half their size. `guarding` holds the scene against other
    runs; by default a lock does, and waits for them (`LOCK_SECONDS`). Raises InUseError where another run has it.
    """
    guarding = guarding or partial(locked, wait_seconds=LOCK_SECONDS)
    try:
        return _segment(job, workers, progress, deadlines, guarding, None)
    except MemoryShortageError as error:
        core = error.core
        if core is None or max(core) == 1 or workers.draining:
            raise
        return _segment(job, workers, progress, deadlines, guarding, tuple(-(-side // 2) for side in core))


def _segment(
    job: Job,
    workers: Workers,
    progress: Progress,
    deadlines: Deadlines,
    guarding: Guarding,
    core: tuple[int, ...] | None,
) -> Outcome:
    """The story, with cores of this shape or with those of the plan."""
    began = time.perf_counter()
    prospect = survey(job, core)
    source, plan, card = prospect.source, prospect.plan, prospect.model.card
    manifest = manifest_path(Path(job.out).absolute(), source.name)
    if is_current(manifest, prospect.fingerprint, prospect.job.settings.agreement):
        _tidy(prospect.hidden, guarding)
        return Outcome("up to date", source.name, source.uri, str(manifest), time.perf_counter() - began, len(plan))
    with guarding(prospect.hidden) as guard:
        if is_current(manifest, prospect.fingerprint, prospect.job.settings.agreement):  # another run has just made it
            return Outcome("up to date", source.name, source.uri, str(manifest), time.perf_counter() - began, len(plan))
        try:
            created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            scratch = Scratch.create(
                prospect.scratch_root,
                source.grid,
                plan.core,
                card.label_nodata,
                len(card.classes) if job.settings.scores else None,
            )
            with workers.desk:
                workers.keep_on()  # it may have waited for long
                source = source.stage(prospect.hidden / "staged")
                check_range(source, card)
                scaling = _kept(scratch.root / "scaling.json", Scaling, lambda: fit_scaling(card.scaling, source))
            recipe = Recipe(plan, prospect.model, source, scaling, scratch, engine=prospect.engine)
            recipe, proof = _in_precision(recipe, workers, prospect)
            halo = _measure_halo(recipe, workers, job.settings.tolerance)
            if halo is not None:
                plan = plan.with_halo(halo.halo)
                recipe, prospect = replace(recipe, plan=plan), replace(prospect, plan=plan)
            prepared = time.perf_counter()
            kept, tally = _label_all(recipe, workers, _while_held(guard, progress), deadlines)
            labelled = time.perf_counter()
            check_unchanged(prospect)
            with workers.desk:
                shares = class_shares(scratch, source, legend_of(card))
                if not any(share.pixels for share in shares):
                    raise SceneError(
                        f"{source.uri} has no valid pixel: all {source.grid.size} are nodata; check its nodata value "
                        f"and its bands"
                    )
                warnings = (*source.warnings, *prospect.idle, *(proof.warnings if proof else ()))
                facts = {
                    **provenance(prospect, created, tally.engine, warnings),
                    **({f"segflow:{proof.precision}": proof.to_json()} if proof else {}),
                    **({"segflow:measured_halo": halo.to_json()} if halo else {}),
                    "segflow:classes": [share.to_json() for share in shares],
                    "segflow:valid_fraction": round(sum(share.pixels for share in shares) / source.grid.size, 6),
                    "segflow:scaling": scaling.to_json(),
                    "segflow:tiles": {"total": len(plan), "kept_of_an_interrupted_run": kept},
                    "segflow:seconds": {
                        "prepare": round(prepared - began, 3),
                        "label": round(labelled - prepared, 3),
                        **tally.to_json(),
                    },
                    "segflow:device_busy_fraction": tally.busy_fraction(labelled - prepared, workers.devices),
                }
                publish(
                    Path(job.out).absolute(),
                    prospect.hidden / f"publish-{uuid4().hex[:12]}",
                    source,
                    scratch,
                    card,
                    shares,
                    facts,
                    scores=job.settings.scores,
                    guard=guard,
                )
        except SegcoreError as error:
            # Finished tiles are kept where the scene may still succeed: storage was away, the disk full, or time short.
            hopeless = isinstance(error, SceneError) and not isinstance(error, LateError) and not error.retryable
            if hopeless and guard.holds():
                check_unchanged(prospect)  # else that is why, and the next attempt sees all of it
                empty(prospect.hidden)
            raise
        if guard.holds():
            empty(prospect.hidden)
    if kept == 0 and (job.alone or prospect.speed is None):  # beside others it waits for them, too
        rest = time.perf_counter() - began - (labelled - prepared)
        speed = Speed((labelled - prepared) / prospect.computed, rest / source.grid.size, source.grid.size)
        remember(prospect.speed_key, speed)
    return Outcome(
        "done",
        source.name,
        source.uri,
        str(manifest),
        time.perf_counter() - began,
        len(plan),
        kept,
        tally.windows,
        source.grid.size,
        tally.engine,
        tuple(shares),
        warnings,
    )


def check_seams(product: Path) -> SeamReport:
    """Label places of a finished product again, in this process and with other borders between tiles.

    `product`: its manifest. Raises ProductError where there is none, or where scene or model are no longer what it was
    made of; SceneError, ModelError.
    """
    document = manifest_of(product)
    try:
        made = document["properties"]
        settings, tiling = Settings.from_json(made["segflow:settings"] | {"memory": 2**60}), made["segflow:plan"]
        uri, reference = made["segflow:input"]["uri"], made["segflow:model"]["reference"]
        scaling, mask = Scaling.from_json(made["segflow:scaling"]), product.parent / document["assets"]["mask"]["href"]
        halo = Measured.from_json(made["segflow:measured_halo"]) if "segflow:measured_halo" in made else None
        core, fingerprint = tuple(map(int, tiling["core"])), str(made["segflow:fingerprint"])
        engine = str(made["segflow:model"]["engine"]).partition(" ")[0]
    except (KeyError, TypeError, ValueError) as error:
        raise ProductError(
            f"{product} is no manifest of this version of segflow ({error!r}); run the scene again"
        ) from error
    prospect = survey(Job(document["id"], uri, reference, str(product.parent.parent), settings))
    if prospect.fingerprint != fingerprint:
        raise ProductError(f"{product}: the scene or the model has changed since it was made; run the scene again")
    plan = replace(prospect.plan, core=core, shortened=halo.halo if halo else None)
    if plan.mode != "blend" and not plan.sight.local:
        return SeamReport(0, 0, 0, 0, 0.0, SAME_SCORES)  # one tile is the only way to label it
    network = find_quantised(prospect.model) if prospect.calibration else None
    if prospect.calibration and network is None:
        raise ProductError(f"{product}: the network in int8 that made it is no longer kept; run the scene again")
    made_in: Engine = "openvino" if engine == "openvino" else "onnxruntime" if engine == "onnxruntime" else "auto"
    segmenter = load_segmenter(
        prospect.model, usable_cores(), quantised=network, engine=made_in, precision=settings.precision
    )
    with tempfile.TemporaryDirectory() as folder:
        source = prospect.source.stage(Path(folder))
        labeller = Labeller(plan, prospect.model.card, source, scaling, segmenter)
        allowed = halo.tolerance if halo else SAME_SCORES
        return report_seams(labeller, lambda box: source.frame.read_labels(mask, box), allowed)


def _while_held(guard: Guard, progress: Progress) -> Progress:
    """Progress that also stops a run whose scene is another's by now, so that two do not work at it."""

    def told(name: str, done: int, total: int) -> None:
        if not guard.holds():
            guard.check()
        progress(name, done, total)

    return told


def _label_all(recipe: Recipe, workers: Workers, progress: Progress, deadlines: Deadlines) -> tuple[int, Tally]:
    """Label every tile that scratch does not hold. Returns how many it held, and what the others took."""
    done = recipe.scratch.done()
    total, tally = len(recipe.plan), Tally()
    progress(recipe.source.name, len(done), total)
    todo = (index for index in recipe.plan.indices() if index not in done)
    try:
        for report in label_tiles(recipe, todo, workers, deadlines.tile_seconds, deadlines.scene_seconds):
            tally.add(report)
            progress(recipe.source.name, len(done) + tally.tiles, total)
    except MemoryShortageError as error:
        error.core = recipe.plan.core
        raise
    missing = total - len(recipe.scratch.present())
    if missing:
        raise ProductError(f"{missing} of {total} tiles are not in {recipe.scratch.root}; report this bug")
    return len(done), tally


def _in_precision(recipe: Recipe, workers: Workers, prospect: Prospect) -> tuple[Recipe, Proof | None]:
    """The recipe in the numbers that are wanted, and what these were found to be worth on this scene; None in fp32.

    Raises ModelError where the network agrees too little with itself in fp32.
    """
    model, settings = prospect.model, prospect.job.settings
    if settings.precision == "int8":
        return _quantised(recipe, workers, prospect)
    if settings.precision == "fp32":
        return recipe, None
    quick = replace(recipe, precision=settings.precision)

    def prove() -> Proof:
        expected = run_once(_whole(recipe), workers, look_for_bf16)
        return compare(expected, run_once(quick, workers, partial(look, places=expected.places)), model.card)

    proof = _kept(recipe.scratch.root / "bf16.json", Proof, prove)
    proof.check(settings.agreement, model.card.name)
    return quick, proof


def _quantised(recipe: Recipe, workers: Workers, prospect: Prospect) -> tuple[Recipe, Proof]:
    """The same in int8. The network lies beside the tiles: a restart takes the very same, and so does every worker."""
    assert prospect.calibration is not None
    model, path = prospect.model, recipe.scratch.root / "int8.zip"
    kept, made = find_quantised(model), ""
    if kept is not None and kept.calibration == prospect.calibration:
        made = f" (it was calibrated on the first scene that it was made for: remove {kept.path} to make it anew)"
        try:
            put(kept.path, path)
        except OSError as error:
            raise ProductError(f"cannot write {path}: {error.strerror or error}", retryable=True) from error
        kept = replace(kept, path=path)
    else:  # this scene is calibrated on, whatever another run has kept since
        kept = None
    work = partial(make_int8, model=model, path=path, kept=kept, calibration=prospect.calibration)

    def prove() -> Proof:
        network, expected = run_once(_whole(recipe), workers, work)
        found = run_once(replace(recipe, quantised=network), workers, partial(look, places=expected.places))
        return compare(expected, found, model.card, network)

    proof = _kept(recipe.scratch.root / "int8.json", Proof, prove)
    proof.check(prospect.job.settings.agreement, model.card.name, made)
    assert proof.sha256 is not None
    network = Quantised(path, proof.sha256, prospect.calibration)
    if proof.says_much:  # else other scenes would be labelled with it, too
        keep_quantised(model, network)
    return replace(recipe, quantised=network), proof


def _whole(recipe: Recipe) -> Recipe:
    """The recipe for places that are labelled whole in fp32, in one pass each."""
    return replace(recipe, plan=replace(recipe.plan, staging=None))


def _measure_halo(recipe: Recipe, workers: Workers, tolerance: float | None) -> Measured | None:
    """The halo that will do within this tolerance; None where the network's whole reach is wanted."""
    if tolerance is None:
        return None
    return _kept(
        recipe.scratch.root / "halo.json",
        Measured,
        lambda: run_once(recipe, workers, partial(measure_halo, tolerance=tolerance)),
    )


def _tidy(hidden: Path, guarding: Guarding) -> None:
    """Remove what a run left that was killed between its commit and its end; what another run has is left alone."""
    with contextlib.suppress(ProductError, OSError):
        if hidden.exists() and not held(hidden):
            with guarding(hidden) as guard:
                if guard.holds():
                    empty(hidden)


class _Finding(Protocol):
    """What was measured on a scene, as JSON."""

    def to_json(self) -> Any: ...

    @classmethod
    def from_json(cls, fields: Any, /) -> Self: ...


_F = TypeVar("_F", bound=_Finding)


def _kept(path: Path, kind: type[_F], measure: Callable[[], _F]) -> _F:
    """What was measured on the scene: kept beside its tiles, so that a restart takes the very same numbers."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return kind.from_json(json.loads(path.read_text()))
    found = measure()
    unfinished = path.with_suffix(".partial")
    try:
        unfinished.write_text(json.dumps(found.to_json()))
        os.replace(unfinished, path)
    except OSError as error:
        raise ProductError(
            f"cannot write {path}: {error.strerror or error}; free some space, run again", retryable=True
        ) from error
    return found
