"""From scratch to product: write, verify, move into place, and the manifest last.

Everything is made in a hidden folder on the target's own file system and moved when it is whole. The manifest is the
commit mark: it is removed before the first file of a new product is moved and written after the last, so a product
with a manifest is whole, and one without is not there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segcore.errors import ProductError, unwritten
from segcore.files import sha256_of, write_text
from segcore.io.scratch import Scratch
from segcore.io.source import Legend, Source, sample_positions
from segcore.io.stac import Asset, manifest_item
from segcore.lock import Guard
from segcore.model.card import Card
from segcore.quicklook import View, draw_quicklook, preview_shape, shown_channels

#: What the files of a product are called, behind the name of the scene.
PARTS = ("mask", "scores", "quicklook")


@dataclass(frozen=True, slots=True)
class ClassShare:
    """How much of the valid part of a scene a class holds: pixels, fraction (0 to 1), area in m2 or volume in ml."""

    index: int
    name: str
    pixels: int
    fraction: float
    measure: tuple[float, str] | None

    def to_json(self) -> dict[str, Any]:
        out = {"index": self.index, "name": self.name, "pixels": self.pixels, "fraction": round(self.fraction, 6)}
        if self.measure is not None:
            amount, unit = self.measure
            out[{"m2": "area_m2", "ml": "volume_ml"}[unit]] = round(amount, 3)
        return out


def legend_of(card: Card) -> Legend:
    """The card's classes as the formats want them."""
    return Legend(tuple((label.index, label.name, label.color) for label in card.classes), card.label_nodata)


def class_shares(scratch: Scratch, source: Source, legend: Legend) -> list[ClassShare]:
    """What each class holds, from one pass over the labels."""
    counts = dict.fromkeys((index for index, _, _ in legend.classes), 0)
    valid = 0
    for box in scratch.pieces():
        labels = scratch.read(box)
        valid += int(np.count_nonzero(labels != legend.nodata))
        for index in counts:  # many times faster than one histogram, which turns bytes into integers of eight
            counts[index] += int(np.count_nonzero(labels == index))
    shares = []
    for index, name, _ in legend.classes:
        pixels = counts[index]
        measure = (pixels * source.cell[0], source.cell[1]) if source.cell else None
        shares.append(ClassShare(index, name, pixels, pixels / valid if valid else 0.0, measure))
    return shares


def manifest_path(out: Path, name: str) -> Path:
    """Where the manifest of a scene's product lies."""
    return out / name / f"{name}.json"


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, None where there is none that can be read (then there is no product)."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def is_current(path: Path, fingerprint: str, agreement: float = 0.0) -> bool:
    """Whether the product with this manifest was made of the same input, model and settings, and is whole.

    `agreement`: share of labels that a network in shorter numbers had to have in common with fp32.
    """
    document = read_manifest(path)
    try:
        if document is None or document["properties"]["segflow:fingerprint"] != fingerprint:
            return False
        proofs = [document["properties"].get(key) for key in ("segflow:bf16", "segflow:int8")]
        if any(proof["agreement"] < agreement for proof in proofs if proof):
            return False
    except (KeyError, TypeError):
        return False
    return not _faults(path, document)


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a product. Raises ProductError where there is none."""
    document = read_manifest(path)
    if document is None:
        raise ProductError(f"{path} is no manifest of a product; name the product's folder, or the JSON file in it")
    return document


def faults(path: Path) -> list[str]:
    """What is wrong with the product of this manifest: files that are missing or differ from their checksums, in words.

    Raises ProductError where there is no manifest.
    """
    return _faults(path, manifest_of(path))


def _faults(path: Path, document: dict[str, Any]) -> list[str]:
    found = []
    try:
        if "mask" not in document["assets"]:
            found.append("the manifest names no mask")
        for asset in document["assets"].values():
            file = path.parent / asset["href"]
            try:
                if _multihash(file) != asset["file:checksum"]:
                    found.append(f"{file.name} differs from its checksum")
            except OSError as error:
                found.append(f"{file.name}: {error.strerror or error}")
    except (KeyError, TypeError, AttributeError) as error:
        found.append(f"the manifest is no manifest of a product ({error!r})")
    return found


def publish(
    out: Path,
    hidden: Path,
    source: Source,
    scratch: Scratch,
    card: Card,
    shares: list[ClassShare],
    properties: Mapping[str, Any],
    *,
    scores: bool,
    guard: Guard,
) -> dict[str, Any]:
    """Make the product of a finished scene in `out`, by way of `hidden`, a new folder beside which only older ones lie.

    Returns its manifest. Raises ProductError, also where `guard` does not hold the scene any more.
    """
    legend, name = legend_of(card), source.name
    when = source.datetime or str(properties["created"])
    try:
        for left in hidden.parent.glob("publish-*"):  # by an interrupted run
            shutil.rmtree(left, ignore_errors=True)
        # Under a name of its own: a run that has lost its scene without knowing may still write into its own.
        hidden.mkdir(parents=True)
        assets: dict[str, Asset] = {}
        files: list[Path] = []
        mask = source.frame.write_labels(hidden / f"{name}_mask{source.frame.suffix}", scratch, legend)
        source.frame.verify(mask[0], scratch)
        assets["mask"] = _asset(mask[0], "Class of every pixel", ("data", "labels"), _class_fields(card))
        for sidecar in mask[1:]:
            assets["mask_legend"] = _asset(sidecar, "Class names and colours, for GDAL and QGIS", ("metadata",), {})
        files += mask
        if scores:
            written = source.frame.write_scores(hidden / f"{name}_scores{source.frame.suffix}", scratch, legend)
            source.frame.verify_scores(written[0], scratch, legend)
            fields = {"data_type": "float32", "bands": [{"name": label.name} for label in card.classes]}
            assets["scores"] = _asset(written[0], "Score of every class", ("data",), fields)
            files += written
        picture = draw_quicklook(
            hidden / f"{name}_quicklook.png",
            _view(source, scratch, card),
            legend,
            {s.index: s.fraction for s in shares},
        )
        assets["quicklook"] = _asset(picture, "Image, mask and legend", ("overview", "thumbnail"), {})
        files.append(picture)
        document = manifest_item(
            name, source.frame.footprint(), when, {**source.frame.properties(), **properties}, assets
        )
        link = {"rel": "derived_from", "href": source.uri, "title": "The scene that was labelled"}
        document["links"] = [*document.get("links", []), link]
        # Written before anything is moved: what follows are renames only.
        write_json(hidden / f"{name}.json", document)
        _move(files, hidden / f"{name}.json", manifest_path(out, name), guard)
    except OSError as error:
        raise ProductError(f"cannot publish {out / name}: {unwritten(error)}", retryable=True) from error
    return document


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: it is there whole, or as it was."""
    write_text(path, f"{json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)}\n")


def _move(files: list[Path], document: Path, manifest: Path, guard: Guard) -> None:
    """The commit: old manifest away, new files in place, files of an older product away, new manifest.

    The scene is made sure of after all that takes long, right before the first file is moved. Before the mark of the
    commit only what is known here is asked, since storage that is away must not cost a product that is in place.
    """
    folder = manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    _sync(folder.parent)
    for file in files:
        _sync(file)
    guard.check()
    manifest.unlink(missing_ok=True)
    _sync(folder)
    for file in files:
        os.replace(file, folder / file.name)
    made = {file.name for file in files}
    for file in list(folder.iterdir()):
        if file.name not in made and file.name.startswith(tuple(f"{manifest.stem}_{part}" for part in PARTS)):
            file.unlink()
    _sync(folder)
    if not guard.holds():
        guard.check()
    os.replace(document, manifest)
    _sync(folder)


def _multihash(path: Path) -> str:
    """The checksum of a file as STAC writes it: 0x12 says SHA-256, 0x20 says 32 bytes."""
    return f"1220{sha256_of(path)}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_MEDIA_TYPES = {
    ".tif": "image/tiff; application=geotiff; profile=cloud-optimized",
    ".gz": "application/x-nifti",
    ".png": "image/png",
    ".xml": "application/xml",
    ".npy": "application/octet-stream",
}


def _asset(path: Path, title: str, roles: tuple[str, ...], fields: Mapping[str, Any]) -> Asset:
    facts = {"file:size": path.stat().st_size, "file:checksum": _multihash(path)}
    return Asset(f"./{path.name}", title, _MEDIA_TYPES[path.suffix], roles, {**facts, **fields})


def _class_fields(card: Card) -> dict[str, Any]:
    classes = [
        {
            "value": label.index,
            "name": re.sub(r"[^0-9A-Za-z_-]+", "-", label.name),
            "description": label.name,
            "color_hint": "".join(f"{part:02X}" for part in label.color),
        }
        for label in card.classes
    ]
    nodata = {"value": card.label_nodata, "name": "nodata", "description": "not valid in the scene", "nodata": True}
    return {"data_type": "uint8", "nodata": card.label_nodata, "classification:classes": [*classes, nodata]}


def _view(source: Source, scratch: Scratch, card: Card) -> View:
    """The scene and its labels at the same positions, thinned."""
    shape = preview_shape(source.grid.shape)
    positions = [sample_positions(n, m) for n, m in zip(source.grid.shape, shape, strict=True)]
    labels = scratch.pick(positions)
    # Relative size of a preview pixel: what counts is the proportion.
    size = source.spacing or (1.0,) * len(shape)
    spacing = tuple(s * n / m for s, n, m in zip(size, source.grid.shape, shape, strict=True))
    title = f"{source.name}  ·  {card.name} {card.version}"
    shown = shown_channels(source.channels)
    image, names = source.overview(shape, shown), tuple(source.channels[i] for i in shown)
    return View(title, source.grid.axes, names, image, labels, spacing)
