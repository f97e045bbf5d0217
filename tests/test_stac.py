"""STAC: Items of both versions as scenes, and lists of scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from segcore.errors import SceneError
from segcore.io import find_scenes, open_scene, product_name
from segcore.io.source import Wanted
from segcore.spec import Settings

VALUES = np.random.default_rng(3).integers(1, 9999, (2, 8, 9)).astype(np.uint16)


@pytest.fixture
def band(tmp_path: Path) -> Path:
    path = tmp_path / "bands.tif"
    with rasterio.open(path, "w", driver="GTiff", count=2, height=8, width=9, dtype="uint16", crs="EPSG:32616",
                       transform=from_origin(0, 100, 10, 10)) as file:  # fmt: skip
        file.write(VALUES)
    return path


def item(path: Path, assets: dict[str, Any], **changes: Any) -> Path:
    document = {"type": "Feature", "stac_version": "1.0.0", "id": "an item/1", "geometry": None, "links": []}
    document |= {"properties": {"datetime": "2020-05-06T07:08:09Z"}, "assets": assets} | changes
    path.write_text(json.dumps(document))
    return path


def read(path: Path | str, *channels: str) -> Any:
    return open_scene(str(path), Wanted(channels, "yx"), Settings())


@pytest.mark.parametrize("version", ["1.0", "1.1", "asset"])
def test_scale_and_offset_of_both_versions(tmp_path: Path, band: Path, version: str) -> None:
    assets = {
        "1.0": {
            "both": {
                "href": "bands.tif",
                "eo:bands": [{"name": "B2", "common_name": "blue"}, {"name": "B3", "common_name": "green"}],
                "raster:bands": [{"scale": 2.0, "offset": -1.0}, {"scale": 0.5, "nodata": int(VALUES[1, 0, 0])}],
            }
        },
        "1.1": {
            "both": {
                "href": "./bands.tif",
                "bands": [
                    {"name": "B2", "eo:common_name": "blue", "raster:scale": 2.0, "raster:offset": -1.0},
                    {"name": "B3", "eo:common_name": "green", "raster:scale": 0.5, "nodata": int(VALUES[1, 0, 0])},
                ],
            }
        },
        "asset": {
            "one": {"href": str(band), "common_name": "blue", "raster:bands": [{"scale": 2.0, "offset": -1.0}]},
            "two": {"href": str(band), "bands": [{}, {"eo:common_name": "green", "raster:scale": 0.5,
                                                      "nodata": int(VALUES[1, 0, 0])}]},
        },
    }[version]  # fmt: skip
    path = item(tmp_path / "item.json", assets, stac_version="1.1.0" if version == "1.1" else "1.0.0")
    scene = read(path, "green", "blue")
    out = scene.read(scene.grid.box)
    assert np.array_equal(out[1], (VALUES[0] * 2.0 - 1).astype(np.float32))
    assert np.isnan(out[0, 0, 0])
    assert np.array_equal(out[0, 1:], (VALUES[1, 1:] * 0.5).astype(np.float32))
    assert scene.name == product_name(str(path)) == "an_item_1"
    assert scene.datetime == "2020-05-06T07:08:09.000000Z"


def test_the_identity_follows_what_is_said_and_what_is_there(tmp_path: Path, band: Path) -> None:
    path = item(tmp_path / "item.json", {"blue": {"href": "bands.tif"}})
    before = read(path, "blue").identity()
    assert read(path, "blue").identity() == before
    item(path, {"blue": {"href": "bands.tif", "raster:bands": [{"scale": 3}]}})
    assert read(path, "blue").identity() != before
    item(path, {"blue": {"href": "bands.tif"}})
    band.touch()
    assert read(path, "blue").identity() != before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no readable STAC document"),
        ("[]", "no STAC Item"),
        ('{"type": "Feature"}', "broken STAC Item|lacks"),
        ('{"type": "Feature", "id": "a", "stac_version": "1.0.0", "geometry": null, "properties": {}, "links": [], '
         '"assets": {"blue": 7}}', "broken STAC Item"),
        ('{"type": "FeatureCollection", "features": []}', "holds no Item"),
    ],
)  # fmt: skip
def test_broken_items_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "item.json"
    path.write_text(text)
    with pytest.raises(SceneError, match=words):
        read(path, "blue")


def test_missing_channels_and_bad_numbers_are_named(tmp_path: Path, band: Path) -> None:
    path = item(tmp_path / "item.json", {"blue": {"href": "bands.tif"}})
    with pytest.raises(SceneError, match="assets for blue and lacks red"):
        read(path, "red")
    item(path, {"blue": {"href": "bands.tif", "raster:bands": [{"scale": "2"}]}})
    with pytest.raises(SceneError, match="'2' is no number"):
        read(path, "blue")


def test_scenes_are_found_in_every_way(tmp_path: Path, band: Path) -> None:
    for name in ("b.tif", "a.nii.gz", "notes.md"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(b"")
    features = [{"type": "Feature", "id": name} for name in ("one", "two")]
    collection = tmp_path / "items.json"
    collection.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    folder = [str(tmp_path / "folder" / name) for name in ("a.nii.gz", "b.tif")]
    assert find_scenes([str(tmp_path / "folder")]) == folder
    assert find_scenes([f"{tmp_path}/folder/*.tif", folder[1], f"{tmp_path}/folder/../folder/b.tif"]) == folder[1:]
    assert find_scenes([str(collection)]) == [f"{collection}#one", f"{collection}#two"]
    assert find_scenes([f"{collection}#two"]) == [f"{collection}#two"]
    (tmp_path / "list.txt").write_text("# scenes\nfolder/b.tif\n\ns3://bucket/c.tif\n")
    assert find_scenes([str(tmp_path / "list.txt")]) == [folder[1], "s3://bucket/c.tif"]
    for nothing in ("missing.tif", "*.gone", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SceneError):
            find_scenes([str(tmp_path / nothing)])
