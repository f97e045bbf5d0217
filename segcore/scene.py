"""The whole story of one scene, top to bottom.

job -> card, headers -> up to date?  -> plan, or a refusal with numbers -> statistics of the scene
    -> tiles to the workers, labels to scratch -> publish: write, verify, move, manifest last
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np

from segcore.errors import PlanError, ProductError, SceneError, SegcoreError
from segcore.execute import Recipe, TileReport, Workers, free_memory, label_tiles, run_once
from segcore.grid import Grid
from segcore.io import open_scene
from segcore.io.scratch import Scratch
from segcore.io.source import Source, Wanted
from segcore.model import check_int8, load_segmenter
from segcore.model.card import Card, Model, load_card
from segcore.model.quantise import Quantised, find_quantised, keep_quantised, put
from segcore.plan import Plan, make_plan
from segcore.precision import Proof, prove
from segcore.publish import ClassShare, class_shares, is_current, legend_of, manifest_of, manifest_path, publish
from segcore.scaling import Scaling, fit_scaling
from segcore.seams import Measured, SeamReport, measure_halo, report_seams
from segcore.spec import SAME_SCORES, Job, Settings, times, usable_cores
from segcore.tile import Labeller

#: Raised whenever a change of this code may change a pixel of a product: old products are then made again. Where a halo
#: is measured, that also goes for what is looked at (`segcore.seams`) and for `MEASURED_CORE`.
PIXEL_VERSION = 2
#: How long to wait for another run that has the same scene in work.
LOCK_SECONDS = 600.0
#: Folder inside the output folder for what is not finished.
HIDDEN = ".segflow"


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
    engine: str = ""
    shares: tuple[ClassShare, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prospect:
    """What is known of a job before any heavy work: headers, card, plan and the fingerprint of the product.

    `calibration`: digest of the scene that a network in int8 is calibrated on, and of how it was read; None in fp32.
    """

    job: Job
    model: Model
    source: Source
    plan: Plan
    fingerprint: str
    calibration: str | None = None

    @property
    def hidden(self) -> Path:
        """Where the unfinished product of this scene lies."""
        return Path(self.job.out).absolute() / HIDDEN / self.source.name

    @property
    def scratch_root(self) -> Path:
        core = "x".join(map(str, self.plan.core))
        return self.hidden / f"{self.fingerprint[:16]}-{core}"


Progress = Callable[[str, int, int], None]
"""Called with the scene's name, tiles done and tiles in all, whenever these change."""


def survey(job: Job) -> Prospect:
    """Read card and headers, and plan. Raises SegcoreError for what cannot work, before any heavy work."""
    model = load_card(job.model)
    source = open_scene(job.uri, wanted_by(model.card), job.settings)
    calibration = _calibration(job, model, source)
    fingerprint = _fingerprint(job, model, source, calibration)
    canvas = canvas_of(source, model.card)
    sight = model.card.sight(job.settings.overlap, job.settings.weights)
    memory = job.settings.memory or free_memory() // 2
    side = job.settings.tile
    core = (side,) * len(canvas) if side else _interrupted_core(job, source.name, fingerprint)

    def plan_with(core: tuple[int, ...] | None) -> Plan:
        measured = job.settings.tolerance is not None
        cost, mode = model.card.cost(), job.settings.mode
        return make_plan(source.grid, canvas, sight, cost, memory, core=core, mode=mode, measured=measured)

    try:
        plan = plan_with(core)
    except PlanError:
        if side or core is None:
            raise
        plan = plan_with(None)
    return Prospect(job, model, source, plan, fingerprint, calibration)


def segment_scene(job: Job, workers: Workers, progress: Progress = lambda *_: None) -> Outcome:
    """Label one scene, or find that its product is up to date. Raises SegcoreError; then there is no new product.

    After a kill at any moment the same call goes on with the tiles that were finished, and ends with the same bytes.
    """
    began = time.perf_counter()
    prospect = survey(job)
    source, plan, card = prospect.source, prospect.plan, prospect.model.card
    manifest = manifest_path(Path(job.out).absolute(), source.name)
    if is_current(manifest, prospect.fingerprint):
        return Outcome("up to date", source.name, source.uri, str(manifest), time.perf_counter() - began, len(plan))
    with _locked(prospect.hidden):
        if is_current(manifest, prospect.fingerprint):  # another run has just made it
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
            source = source.stage(prospect.hidden / "staged")
            check_range(source, card)
            scaling = _kept(scratch.root / "scaling.json", Scaling, lambda: fit_scaling(card.scaling, source))
            recipe = Recipe(plan, prospect.model, source, scaling, scratch)
            recipe, proof = _quantise(recipe, workers, prospect)
            halo = _measure_halo(recipe, workers, job.settings.tolerance)
            if halo is not None:
                plan = plan.with_halo(halo.halo)
                recipe, prospect = replace(recipe, plan=plan), replace(prospect, plan=plan)
            prepared = time.perf_counter()
            kept, reports = _label_all(recipe, workers, progress)
            labelled = time.perf_counter()
            shares = class_shares(scratch, source, legend_of(card))
            if not any(share.pixels for share in shares):
                raise SceneError(
                    f"{source.uri} has no valid pixel: all {source.grid.size} are nodata; check its nodata value "
                    f"and its bands"
                )
            engine = next((report.engine for report in reports), "")
            facts = {
                **provenance(prospect, created, engine),
                **({"segflow:int8": proof.to_json()} if proof else {}),
                **({"segflow:measured_halo": halo.to_json()} if halo else {}),
                "segflow:classes": [share.to_json() for share in shares],
                "segflow:valid_fraction": round(sum(share.pixels for share in shares) / source.grid.size, 6),
                "segflow:scaling": scaling.to_json(),
                "segflow:tiles": {"total": len(plan), "kept_of_an_interrupted_run": kept},
                "segflow:seconds": {
                    "prepare": round(prepared - began, 3),
                    "label": round(labelled - prepared, 3),
                    "read_and_scale": round(sum(report.read_seconds for report in reports), 3),
                    "infer": round(sum(report.infer_seconds for report in reports), 3),
                    "blend_and_label": round(sum(report.label_seconds for report in reports), 3),
                    "store": round(sum(report.write_seconds for report in reports), 3),
                },
            }
            publish(
                Path(job.out).absolute(),
                prospect.hidden / "publish",
                source,
                scratch,
                card,
                shares,
                facts,
                scores=job.settings.scores,
            )
        except SegcoreError as error:
            # Finished tiles are kept where the scene may still succeed: storage was away, or the disk full.
            if isinstance(error, SceneError) and not error.retryable:
                _empty(prospect.hidden)
            raise
        _empty(prospect.hidden)
    return Outcome(
        "done",
        source.name,
        source.uri,
        str(manifest),
        time.perf_counter() - began,
        len(plan),
        kept,
        sum(report.windows for report in reports),
        engine,
        tuple(shares),
        source.warnings,
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
    segmenter = load_segmenter(prospect.model, usable_cores(), network)
    with tempfile.TemporaryDirectory() as folder:
        source = prospect.source.stage(Path(folder))
        labeller = Labeller(plan, prospect.model.card, source, scaling, segmenter)
        allowed = halo.tolerance if halo else SAME_SCORES
        return report_seams(labeller, lambda box: source.frame.read_labels(mask, box), allowed)


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


def provenance(prospect: Prospect, created: str, engine: str) -> dict[str, Any]:
    """The part of a manifest that is known before the first tile: input, model, settings, plan and versions."""
    card, plan, source = prospect.model.card, prospect.plan, prospect.source
    model = {
        "reference": prospect.job.model,
        "name": card.name,
        "version": card.version,
        "digest": prospect.model.digest,
        "license": card.license,
    }
    model |= {"citation": card.citation, "engine": engine, "weights_sha256": card.artifacts[0].sha256}
    tiling: dict[str, Any] = {
        "mode": plan.mode,
        "core": list(plan.core),
        "counts": list(plan.counts),
        "canvas": list(plan.canvas),
    }
    if plan.mode == "blend":
        sight = plan.sight
        tiling |= {"window": list(sight.window or ()), "step": list(sight.step), "weights": sight.weights}
    else:
        tiling |= {"halo": [list(sides) for sides in plan.halo]}
    tiling |= {"work": round(plan.work, 4), "predicted_memory_bytes": plan.memory}
    return {
        "created": created,
        "segflow:fingerprint": prospect.fingerprint,
        "segflow:datetime_is": "acquisition"
        if source.datetime
        else "processing: the scene does not say when it was taken",
        "segflow:input": {"uri": source.uri, "identity": dict(source.identity())},
        "segflow:model": model,
        "segflow:settings": asdict(prospect.job.settings),
        "segflow:plan": tiling,
        "segflow:versions": {"python": platform.python_version(), **_versions()},
        "segflow:warnings": list(source.warnings),
    }


def _label_all(recipe: Recipe, workers: Workers, progress: Progress) -> tuple[int, list[TileReport]]:
    """Label every tile that scratch does not hold. Returns how many it held, and reports of the others."""
    done = recipe.scratch.done()
    total, reports = len(recipe.plan), []
    progress(recipe.source.name, len(done), total)
    todo = (index for index in recipe.plan.indices() if index not in done)
    for report in label_tiles(recipe, todo, workers):
        reports.append(report)
        progress(recipe.source.name, len(done) + len(reports), total)
    missing = total - len(recipe.scratch.present())
    if missing:
        raise ProductError(f"{missing} of {total} tiles are not in {recipe.scratch.root}; report this bug")
    return len(done), reports


def _measure_halo(recipe: Recipe, workers: Workers, tolerance: float | None) -> Measured | None:
    """The halo that will do within this tolerance; None where the network's whole reach is wanted."""
    if tolerance is None:
        return None
    return _kept(
        recipe.scratch.root / "halo.json",
        Measured,
        lambda: run_once(recipe, workers, partial(measure_halo, tolerance=tolerance)),
    )


def _quantise(recipe: Recipe, workers: Workers, prospect: Prospect) -> tuple[Recipe, Proof | None]:
    """The recipe with the network in int8, where that is wanted, and what it was found to be worth on this scene.

    The network lies beside the tiles: a restart takes the very same, and so does every worker. Raises ModelError where
    it agrees too little with fp32.
    """
    if prospect.calibration is None:
        return recipe, None
    model, path = prospect.model, recipe.scratch.root / "int8.zip"
    kept = find_quantised(model)
    if kept is not None and kept.calibration == prospect.calibration:
        try:
            put(kept.path, path)
        except OSError as error:
            raise ProductError(f"cannot write {path}: {error.strerror or error}", retryable=True) from error
        kept = replace(kept, path=path)
    else:  # this scene is calibrated on, whatever another run has kept since
        kept = None
    work = partial(prove, model=model, path=path, kept=kept, calibration=prospect.calibration)
    proof = _kept(recipe.scratch.root / "int8.json", Proof, lambda: run_once(recipe, workers, work))
    proof.check(prospect.job.settings.agreement, model.card.name)
    network = Quantised(path, proof.sha256, proof.calibration)
    keep_quantised(model, network)
    return replace(recipe, quantised=network), proof


def _calibration(job: Job, model: Model, source: Source) -> str | None:
    """What a network in int8 is calibrated on, None in fp32: the scene of the one that is kept, or else this one.

    Raises PlanError, ModelError where the precision is not to be had.
    """
    if job.settings.precision == "fp32":
        return None
    if job.settings.precision == "bf16":
        raise PlanError("--precision bf16 is for a GPU, and none is used here; leave it out, or try --precision int8")
    check_int8(model)
    if (kept := find_quantised(model)) is not None:
        return kept.calibration
    mine = {"input": source.identity(), "settings": job.settings.pixels()}
    return hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()


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
        raise ProductError(f"cannot write {path}: {error.strerror or error}", retryable=True) from error
    return found


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


def _interrupted_core(job: Job, name: str, fingerprint: str) -> tuple[int, ...] | None:
    """The core of a run that was interrupted, so that its tiles can be used whatever memory is free today."""
    for folder in sorted((Path(job.out) / HIDDEN / name).glob(f"{fingerprint[:16]}-*")):
        with contextlib.suppress(ValueError):
            return tuple(int(side) for side in folder.name.partition("-")[2].split("x"))
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the hidden folder of a scene against other runs; the lock goes with the process, however that ends."""
    until = time.monotonic() + LOCK_SECONDS
    while (descriptor := _lock(folder)) is None:
        if time.monotonic() > until:
            raise ProductError(f"{folder} is in use by another run; wait for it to end", retryable=True)
        time.sleep(0.2)
    try:
        yield
    finally:
        # Empty it is of no use; removed while it is locked, so that no other run can be in it.
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(descriptor)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def _lock(folder: Path) -> int | None:
    """A locked descriptor of the folder, which is made; None while another run holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None  # another run removed it between the two
    except OSError as error:
        raise ProductError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another run may have ended, and removed the folder, since it was opened.
        if os.fstat(descriptor).st_ino == os.stat(folder).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(descriptor)
        raise ProductError(f"cannot lock {folder}: {error.strerror or error}; choose another --out") from error
    os.close(descriptor)
    return None


def _empty(folder: Path) -> None:
    """Remove what is in a folder, and not the folder: it is the lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("segflow", "numpy", "onnxruntime", "torch", "rasterio", "nibabel", "zarr", "distributed"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
