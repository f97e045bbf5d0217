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
        ('{"type": "FeatureCollection", "features": []}', "not Items with ids"),
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
    assert list(find_scenes([str(tmp_path / "folder")]).strict()) == folder
    assert (
        list(find_scenes([f"{tmp_path}/folder/*.tif", folder[1], f"{tmp_path}/folder/../folder/b.tif"]).strict())
        == folder[1:]
    )
    assert list(find_scenes([str(collection)]).strict()) == [f"{collection}#one", f"{collection}#two"]
    assert list(find_scenes([f"{collection}#two"]).strict()) == [f"{collection}#two"]
    (tmp_path / "list.txt").write_text("# scenes\nfolder/b.tif\n\ns3://bucket/c.tif\n")
    assert list(find_scenes([str(tmp_path / "list.txt")]).strict()) == [folder[1], "s3://bucket/c.tif"]
    for nothing in ("missing.tif", "*.gone", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SceneError):
            find_scenes([str(tmp_path / nothing)])


def test_pictures_of_a_scene_are_not_taken_for_it(tmp_path: Path, band: Path) -> None:
    rgb = [{"eo:common_name": name} for name in ("red", "blue")]
    assets = {
        "thumbnail": {"href": "gone.tif", "roles": ["thumbnail"], "bands": rgb},
        "preview": {"href": "gone.png", "type": "image/png", "bands": rgb},
        "other": {"href": "gone.jp2", "bands": [{"eo:common_name": "blue"}]},
        "blue": {"href": "bands.tif", "roles": ["data"], "bands": [{"eo:common_name": "blue"}]},
    }
    scene = read(item(tmp_path / "item.json", assets), "blue")
    assert np.array_equal(scene.read(scene.grid.box)[0], VALUES[0])


@pytest.mark.parametrize("nodata", ["nan", "inf", "-inf"])
def test_every_nodata_of_stac_is_understood(tmp_path: Path, band: Path, nodata: str) -> None:
    scene = read(
        item(tmp_path / "i.json", {"blue": {"href": "bands.tif", "raster:bands": [{"nodata": nodata}]}}), "blue"
    )
    assert np.array_equal(scene.read(scene.grid.box)[0], VALUES[0])
    json.dumps(scene.identity(), allow_nan=False)


@pytest.mark.parametrize(
    "broken",
    [{"id": 5}, {"id": None}, {"properties": {"datetime": "0001-01-01T00:00:00+05:00"}}, {"stac_version": 7},
     {"assets": {"blue": {"href": "bands.tif", "bands": [1]}}},
     {"assets": {"blue": {"href": "bands.tif", "bands": [{}, {}, {"eo:common_name": "blue"}]}}},
     {"assets": {"blue": {"href": "bands.tif", "raster:bands": [{"scale": 10**400}]}}}],
)  # fmt: skip
def test_items_broken_in_odd_ways_are_refused(tmp_path: Path, band: Path, broken: dict[str, Any]) -> None:
    assets = broken.pop("assets", {"blue": {"href": "bands.tif"}})
    with pytest.raises(SceneError):
        read(item(tmp_path / "item.json", assets, **broken), "blue")


def test_lists_that_list_themselves_and_odd_names(tmp_path: Path, band: Path) -> None:
    (tmp_path / "loop.txt").write_text("loop.txt\n")
    with pytest.raises(SceneError, match="lists itself"):
        find_scenes([str(tmp_path / "loop.txt")]).strict()
    with pytest.raises(SceneError, match="check the path"):
        find_scenes(["x" * 5000])
    odd = tmp_path / "a#1 ü'%.tif"
    odd.write_bytes(band.read_bytes())
    (uri,) = find_scenes([str(odd)]).strict()
    scene = read(uri, "blue", "green")
    assert scene.name == product_name(uri) == "a_1_ü__"
    assert product_name("/data/" + "y" * 240 + ".tif").startswith("y" * 100)
    assert len(product_name("/data/" + "ü" * 240 + ".tif").encode()) <= 180


def test_outlines_across_the_antimeridian_have_a_bounding_box(tmp_path: Path) -> None:
    from segcore.io.stac import manifest_item

    west = [[[-180, 1], [-179, 1], [-179, 2], [-180, 2], [-180, 1]]]
    east = [[[178, 1], [180, 1], [180, 2], [178, 2], [178, 1]]]
    geometry = {"type": "MultiPolygon", "coordinates": [west, east]}
    assert manifest_item("a", geometry, "2020-01-01T00:00:00Z", {}, {})["bbox"] == [178, 1, -179, 2]


def test_the_strongest_name_wins(tmp_path: Path, band: Path) -> None:
    """A common name before a name, a band of its own before one of a picture, and at last an alias."""
    assets = {
        "a_visual": {
            "href": "gone.tif",
            "roles": ["data"],
            "bands": [{"eo:common_name": n} for n in ("red", "nir", "x")],
        },
        "named": {"href": "gone.tif", "roles": ["data"], "bands": [{"name": "nir", "eo:common_name": "nir09"}]},
        "B05": {"href": "bands.tif", "roles": ["data"], "bands": [{"name": "OLI_B5", "eo:common_name": "nir"}]},
        "B06": {"href": "bands.tif", "roles": ["data"], "bands": [{"name": "OLI_B6", "eo:common_name": "swir08"}]},
    }
    path = item(tmp_path / "item.json", assets)
    scene = open_scene(str(path), Wanted(("nir", "swir"), "yx", None, ((), ("swir08",))), Settings())
    assert np.array_equal(scene.read(scene.grid.box), VALUES[[0, 0]])
