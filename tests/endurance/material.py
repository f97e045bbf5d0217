"""Scenes cut out of real Landsat 8 and Sentinel-2 images, small U-Nets, and products that are looked at."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rasterio
from conftest import save_local_unet
from numpy.typing import NDArray
from rasterio.transform import from_origin

from segcore import demo
from segcore.files import sha256_of
from segcore.io import open_scene
from segcore.io.source import Wanted
from segcore.publish import faults
from segcore.spec import Settings

_PLACE = from_origin(452475, 3408645, 30, 30)
CHANNELS = ("green", "red", "nir")


def model(folder: Path, width: int = 4, poolings: int = 1) -> Path:
    """A small U-Net with random, fixed weights, which wants reflectance."""
    save_local_unet(folder, "yx", CHANNELS, width, poolings=poolings)
    card = json.loads((folder / "card.json").read_text())
    for channel in card["channels"]:
        channel |= {"units": "reflectance", "valid_range": [-0.1, 1.5]}
    (folder / "card.json").write_text(json.dumps(card, indent=2))
    return folder


@cache
def images() -> tuple[NDArray[np.float32], ...]:
    """Reflectance of the Landsat 8 and of the Sentinel-2 image, (3, rows, columns) each."""
    found = []
    with TemporaryDirectory() as folder:
        for item in (demo.landsat_item(Path(folder)), demo.sentinel_item(Path(folder))):
            source = open_scene(str(item), Wanted(CHANNELS, "yx"), Settings())
            found.append(source.read(source.grid.box))
    return tuple(found)


def cut(number: int, side: int) -> NDArray[np.float32]:
    """A piece of one of the images, without gaps; the same for the same number. (3, side, side)"""
    draw = np.random.default_rng(number)
    while True:
        image = images()[number % 2]
        row, col = (int(draw.integers(n - side + 1)) for n in image.shape[1:])
        piece = image[:, row : row + side, col : col + side]
        if np.isfinite(piece).all():
            return piece


def write(path: Path, values: NDArray[np.float32]) -> Path:
    """A GeoTIFF in strips of 16 rows, its bands named."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, dtype="float32",
                       crs="EPSG:32616", transform=_PLACE, blockysize=16) as file:  # fmt: skip
        file.write(values)
        for band, name in enumerate(CHANNELS[:count], start=1):
            file.set_band_description(band, name)
    return path


def manifests(out: Path) -> dict[str, Path]:
    """The manifests that are there, by scene."""
    return {path.parent.name: path for path in sorted(out.glob("*/*.json")) if path.stem == path.parent.name}


def assets(manifest: Path) -> dict[str, str]:
    """SHA-256 of the files that a manifest names, from their bytes."""
    document: dict[str, Any] = json.loads(manifest.read_text())
    names = [Path(asset["href"]).name for asset in document["assets"].values()]
    return {name: sha256_of(manifest.parent / name) for name in names}


def wrong(out: Path, whole: dict[str, dict[str, str]], other: dict[str, dict[str, str]] | None = None) -> list[str]:
    """What is wrong with the products that have a manifest: with themselves, and beside the undisturbed ones.

    `other`: undisturbed ones, too, of a scene that was exchanged; a product is whole of the one or of the other.
    """
    found = []
    for name, manifest in manifests(out).items():
        found += [f"{name}: {fault}" for fault in faults(manifest)]
        with suppress(FileNotFoundError):  # said above
            files = assets(manifest)
            if name in whole and files not in (whole[name], (other or whole).get(name)):
                differ = sorted(
                    key for key in files.keys() | whole[name].keys() if files.get(key) != whole[name].get(key)
                )
                found.append(f"{name}: {', '.join(differ)} differ from the undisturbed run's")
    return found


def products(out: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of all files of all products."""
    return {name: assets(manifest) for name, manifest in manifests(out).items()}


def tiles(out: Path) -> dict[str, set[Path]]:
    """The finished tiles in scratch, by scene; also while they come and go."""
    found: dict[str, set[Path]] = {}
    hidden = out / ".segflow"
    for folder, _, names in os.walk(hidden):
        inside = Path(folder).relative_to(hidden).parts
        if len(inside) == 5 and inside[2:4] == ("labels", "c"):
            found.setdefault(inside[0], set()).update(Path(folder, name) for name in names if name.isdigit())
    return found


def strays(out: Path) -> list[str]:
    """What lies in an output folder, all scenes done, beyond products and the files of a run."""
    runs = {"run.json", "events.jsonl", "failures.csv", "report.html", "metrics.prom", ".segflow"}
    found = [path.name for path in out.iterdir() if path.name not in runs and not path.is_dir()]
    found += [f".segflow/{path.name}" for path in out.glob(".segflow/*") if path.name != ".thumbs"]
    for name, manifest in manifests(out).items():
        found += [
            f"{name}/{p.name}" for p in manifest.parent.iterdir() if p != manifest and p.name not in assets(manifest)
        ]
    return found
