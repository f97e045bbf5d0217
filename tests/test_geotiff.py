"""Rasters: what is read is what is there, and what is written lies on it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
import pytest
import rasterio
from rasterio._env import get_gdal_config
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from rio_cogeo.cogeo import cog_validate

from segcore.box import Box
from segcore.errors import ProductError, SceneError
from segcore.io.cog import _mode_of_four, gdal_environment
from segcore.io.geotiff import Band, Raster, raster_file
from segcore.io.memory import ArrayLabels
from segcore.io.scratch import Scratch
from segcore.io.source import Legend, Wanted, sample_positions
from segcore.spec import GDAL_CACHE

LEGEND = Legend(((0, "clear", (10, 20, 30)), (1, "cloud", (255, 255, 255)), (2, "shadow", (9, 9, 99))))
RNG = np.random.default_rng(5)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make(values: np.ndarray, name: str = "scene.tif", **options: Any) -> Path:
        names, alpha, mask = options.pop("names", None), options.pop("alpha", None), options.pop("mask", None)
        scales, tags = options.pop("scales", None), options.pop("tags", {})
        profile = {"crs": "EPSG:32616", "transform": from_origin(452475, 3408645, 30, 30)} | options
        path = tmp_path / name
        count, rows, cols = values.shape
        with rasterio.open(
            path, "w", driver="GTiff", count=count + (alpha is not None), height=rows, width=cols, dtype=values.dtype,
            **profile,
        ) as file:  # fmt: skip
            file.write(values, list(range(1, count + 1)))
            file.update_tags(**tags)
            for i, band in enumerate(names or [], start=1):
                file.set_band_description(i, band)
            if alpha is not None:
                file.write(alpha.astype(values.dtype), count + 1)
                file.colorinterp = [ColorInterp.undefined] * count + [ColorInterp.alpha]
            if mask is not None:
                file.write_mask(mask)
            if scales is not None:
                file.scales, file.offsets = [scales[0]] * count, [scales[1]] * count
        return path

    return make


def wanted(*names: str) -> Wanted:
    return Wanted(names, "yx")


def test_bands_are_found_by_name_in_any_order(make: Callable[..., Path]) -> None:
    values = RNG.integers(0, 9999, (4, 11, 7)).astype(np.uint16)
    path = make(values, names=["nir", "Red", "other", "blue"])
    raster = raster_file(str(path), "scene", wanted("blue", "red"))
    assert np.array_equal(raster.read(raster.grid.box), values[[3, 1]])
    raster = raster_file(str(path), "scene", wanted("blue", "red"), bands=["red", "a", "blue", "b"])
    assert np.array_equal(raster.read(Box((2, 3), (9, 4))), values[[2, 0], 2:9, 3:4])


def test_bands_without_names_are_taken_in_order_with_a_warning(make: Callable[..., Path]) -> None:
    path = make(RNG.integers(0, 9999, (2, 5, 5)).astype(np.uint16))
    assert "taken in order" in raster_file(str(path), "scene", wanted("a", "b")).warnings[0]
    with pytest.raises(SceneError, match=r"2 bands \(without names\) and lacks a, b, c"):
        raster_file(str(path), "scene", wanted("a", "b", "c"))
    with pytest.raises(SceneError, match="--bands names 1"):
        raster_file(str(path), "scene", wanted("a"), bands=["a"])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_every_type_with_scale_offset_and_nodata(make: Callable[..., Path], dtype: str) -> None:
    values = RNG.integers(1, 200, (1, 9, 9)).astype(dtype)
    values[0, 2, 3] = 7
    path = make(values, nodata=7, scales=(0.5, -3), names=["a"])
    out = raster_file(str(path), "scene", wanted("a")).read(Box.of((9, 9)))
    expected = np.where(values == 7, np.nan, values * 0.5 - 3)
    assert np.array_equal(out, expected.astype(np.float32), equal_nan=True)
    out = raster_file(str(path), "scene", wanted("a"), None, 2.0, 1.0).read(Box.of((9, 9)))
    assert np.array_equal(out, np.where(values == 7, np.nan, values * 2.0 + 1).astype(np.float32), equal_nan=True)


def test_a_file_that_does_not_say_what_its_pixels_are(make: Callable[..., Path], tmp_path: Path) -> None:
    """A VRT that was written by hand: GDAL reads its pixels as areas, and so is the mask's frame."""
    path = make(RNG.integers(0, 9, (1, 30, 40)).astype(np.uint8), "a.tif")
    with rasterio.open(path) as file:
        crs, t = file.crs.to_wkt(), file.transform
    (tmp_path / "hand.vrt").write_text(
        f'<VRTDataset rasterXSize="40" rasterYSize="30"><SRS>{escape(crs)}</SRS>'
        f"<GeoTransform>{t.c}, {t.a}, {t.b}, {t.f}, {t.d}, {t.e}</GeoTransform>"
        f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>{path}</SourceFilename>'
        f"<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    frame = raster_file(str(tmp_path / "hand.vrt"), "scene", wanted("a")).frame
    labels = ArrayLabels(RNG.integers(0, 3, (30, 40)).astype(np.uint8))
    frame.write_labels(tmp_path / "mask.tif", labels, LEGEND)
    frame.verify(tmp_path / "mask.tif", labels)


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [("uint8", 0), ("uint16", 65535), ("int16", -32768), ("int32", -(2**31)), ("uint32", 2**32 - 1), ("float32", 0.1),
     ("float64", -1e300), ("float32", float("nan")), ("int64", 2**40), ("int8", -7)],
)  # fmt: skip
def test_nodata_is_what_gdal_masks(make: Callable[..., Path], dtype: str, nodata: float) -> None:
    """Where a value says by itself what is not valid, GDAL is not asked: it would read the file again."""
    values = RNG.integers(1, 100, (2, 600, 700)).astype(dtype)
    values[0, 5:90, 40:300] = nodata
    path = make(values, nodata=nodata, names=["a", "b"])
    out = raster_file(str(path), "scene", wanted("a", "b")).read(Box.of((600, 700)))
    with rasterio.open(path) as file:
        masked = file.read_masks() == 0
    assert masked.any()
    assert np.array_equal(np.isnan(out), masked)
    assert np.array_equal(out[~masked], values[~masked].astype(np.float32))


def test_nan_infinity_masks_and_alpha_are_invalid(make: Callable[..., Path]) -> None:
    values = RNG.random((1, 6, 6)).astype(np.float32)
    values[0, 0, 0], values[0, 1, 1] = np.nan, -np.inf
    out = raster_file(str(make(values)), "scene", wanted("a")).read(Box.of((6, 6)))
    assert np.argwhere(np.isnan(out[0])).tolist() == [[0, 0], [1, 1]]
    whole = RNG.integers(1, 99, (2, 6, 6)).astype(np.uint8)
    alpha = np.full((6, 6), 255, np.uint8)
    alpha[3:] = 0
    for options in ({"alpha": alpha}, {"mask": alpha > 0}):
        raster = raster_file(str(make(whole, names=["a", "b"], **options)), "scene", wanted("a", "b"))
        assert np.array_equal(np.isnan(raster.read(raster.grid.box)), np.broadcast_to(alpha == 0, (2, 6, 6)))


def test_bands_of_several_resolutions_lie_on_the_finest(make: Callable[..., Path]) -> None:
    fine = np.arange(70, dtype=np.float32).reshape(1, 7, 10)
    # A pixel of 20 m that begins 10 m west of the scene and ends a row before it, as Sentinel-2 chips do.
    coarse = np.arange(18, dtype=np.float32).reshape(1, 3, 6)
    a = make(fine, "fine.tif", transform=from_origin(110, 170, 10, 10))
    b = make(coarse, "coarse.tif", transform=from_origin(100, 170, 20, 20))
    raster = Raster("both", "both", [Band(str(a), 1), Band(str(b), 1)], ["a", "b"])
    assert raster.grid.shape == (7, 10)
    out = raster.read(raster.grid.box)
    assert np.array_equal(out[0], fine[0])
    assert np.isnan(out[1, 6]).all()
    rows, cols = (np.arange(6) + 0.5) / 2 - 0.5, (np.arange(10) + 1.5) / 2 - 0.5
    ramp = np.clip(rows, 0, 2)[:, None] * 6 + np.clip(cols, 0, 5)[None]
    assert np.allclose(out[1, :6], ramp, atol=1e-5)
    for box in (Box((1, 2), (5, 9)), Box((6, 0), (7, 10)), Box((3, 3), (4, 4))):
        assert np.array_equal(raster.read(box), out[(slice(None), *box.slices())], equal_nan=True)


def test_bands_that_do_not_lie_on_each_other_are_refused(make: Callable[..., Path]) -> None:
    values = np.zeros((1, 8, 8), np.float32)
    a = make(values, "a.tif")
    for name, options, words in (
        ("crs.tif", {"crs": "EPSG:32617"}, "one CRS"),
        ("shift.tif", {"transform": from_origin(452475 + 11, 3408645, 30, 30)}, "does not lie on the grid"),
        ("far.tif", {"transform": from_origin(452475 + 30000, 3408645, 30, 30)}, "do not overlap"),
    ):
        b = make(values, name, **options)
        with pytest.raises(SceneError, match=words):
            Raster("both", "both", [Band(str(a), 1), Band(str(b), 1)], ["a", "b"])


FRAMES: dict[str, dict[str, Any]] = {
    "utm": {},
    "point": {"tags": {"AREA_OR_POINT": "Point"}},
    "geographic": {"crs": "EPSG:4326", "transform": from_origin(-87.123456789012, 30.1, 1 / 3600, 1 / 3600)},
    "south-up": {"transform": Affine(30, 0, 1000, 0, 30, 2000)},
    "rotated": {"transform": Affine(20.1, 7.3, 452475.25, 6.9, -21.7, 3408645.125)},
    "no crs": {"crs": None},
    "nothing": {"crs": None, "transform": None},
    "gcps": {
        "transform": None,
        "gcps": [GroundControlPoint(r, c, 1000 + c * 2.0, 2000 - r * 3.0) for r, c in ((0, 0), (0, 9), (9, 0), (9, 9))],
    },
}


@pytest.mark.parametrize("kind", FRAMES)
def test_masks_lie_exactly_on_their_scene(make: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    options = {k: v for k, v in FRAMES[kind].items() if v is not None or k == "crs"}
    if FRAMES[kind].get("transform", 0) is None:
        options["transform"] = None
    path = make(RNG.integers(0, 99, (1, 70, 50)).astype(np.uint8), **options)
    raster = raster_file(str(path), "scene", wanted("a"))
    labels = ArrayLabels(RNG.integers(0, 3, (70, 50)).astype(np.uint8), RNG.random((3, 70, 50)).astype(np.float32))
    mask, sidecar = raster.frame.write_labels(tmp_path / "mask.tif", labels, LEGEND)
    raster.frame.verify(mask, labels)
    (scores,) = raster.frame.write_scores(tmp_path / "scores.tif", labels, LEGEND)
    with rasterio.open(path) as scene, rasterio.open(mask) as written, rasterio.open(scores) as scored:
        for product in (written, scored):
            assert tuple(product.transform) == tuple(scene.transform)
            assert product.crs == scene.crs
            assert product.shape == scene.shape
            assert product.tags().get("AREA_OR_POINT") == scene.tags().get("AREA_OR_POINT")
            assert [(p.row, p.col, p.x, p.y) for p in product.gcps[0]] == [
                (p.row, p.col, p.x, p.y) for p in scene.gcps[0]
            ]
        assert np.array_equal(written.read(1), labels.labels)
        assert np.array_equal(scored.read(), labels.scores)
        assert written.nodata == 255
        assert written.colormap(1)[1] == (255, 255, 255, 255)
        assert written.colormap(1)[2] == (9, 9, 99, 255)
        assert written.tags(1)["CLASS_2"] == "shadow"
    assert not list(tmp_path.glob("*plain*"))
    names = ElementTree.parse(sidecar).findall(".//Category")
    assert [name.text for name in names] == ["clear", "cloud", "shadow"]


def test_masks_are_cogs_with_mode_overviews(make: Callable[..., Path], tmp_path: Path) -> None:
    raster = raster_file(str(make(np.zeros((1, 1500, 1100), np.uint8))), "scene", wanted("a"))
    labels = np.zeros((1500, 1100), np.uint8)
    labels[::3] = 2  # two of three rows are class 0: `mode` keeps 0 and never makes a 1, as averaging would
    mask, _ = raster.frame.write_labels(tmp_path / "mask.tif", ArrayLabels(labels), LEGEND)
    valid, errors, warnings = cog_validate(mask, strict=True)
    assert valid, (errors, warnings)
    with rasterio.open(mask) as written:
        assert written.overviews(1) == [2, 4]
        small = written.read(1, out_shape=(375, 275))
    assert set(np.unique(small)) <= {0, 2}


def test_the_same_labels_make_the_same_bytes(make: Callable[..., Path], tmp_path: Path) -> None:
    raster = raster_file(str(make(np.zeros((1, 600, 700), np.uint8))), "scene", wanted("a"))
    labels = ArrayLabels(RNG.integers(0, 3, (600, 700)).astype(np.uint8))
    first, second = (raster.frame.write_labels(tmp_path / f"{n}.tif", labels, LEGEND)[0] for n in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("shape", [(2, 2), (6, 8), (7, 5), (1, 9)])
def test_overviews_keep_the_label_that_most_valid_pixels_bear(shape: tuple[int, int]) -> None:
    labels = RNG.choice(np.array([0, 1, 7, 255], np.uint8), shape)
    found = _mode_of_four(labels, 255)
    padded = np.pad(labels, [(0, n % 2) for n in shape], mode="edge")
    for row, col in np.ndindex(found.shape):
        four = padded[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].ravel().tolist()
        valid = [label for label in four if label != 255]
        assert found[row, col] == (min(valid, key=lambda label: (-valid.count(label), label)) if valid else 255)


def test_no_byte_depends_on_the_tiling(make: Callable[..., Path], tmp_path: Path) -> None:
    shape = (2500, 2300)
    raster = raster_file(str(make(np.zeros((1, *shape), np.uint8), sparse_ok=True)), "scene", wanted("a"))
    labels = (np.add.outer(np.arange(2500) // 7, np.arange(2300) // 5) % 3).astype(np.uint8)
    labels[1000:1100, 50:] = 255
    masks = []
    for core in ((700, 900), (2048, 333)):
        scratch = Scratch.create(tmp_path / f"s{core[0]}", raster.grid, core, 255, None)
        for index in np.ndindex(*(-(-n // c) for n, c in zip(shape, core, strict=True))):
            box = Box.cell(index, core, shape)
            scratch.write(index, box, labels[box.slices()])
        masks.append(raster.frame.write_labels(tmp_path / f"{core[0]}.tif", scratch, LEGEND)[0])
        raster.frame.verify(masks[-1], scratch)
    assert masks[0].read_bytes() == masks[1].read_bytes()
    assert cog_validate(masks[0], strict=True)[0]
    expected = labels
    for level in range(3):
        expected = _mode_of_four(expected, 255)
        with rasterio.open(masks[0], overview_level=level) as overview:
            assert np.array_equal(overview.read(1), expected)


STRIPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "by bands": {"interleave": "band"},
    "nodata": {"nodata": 7},
    "scaled": {"scales": (0.5, -3), "nodata": 7},
    "alpha": {"alpha": np.tile(np.array([255, 0, 255], np.uint8), (30, 800))},
    "mask": {"mask": np.tile(np.array([True, False, True]), (30, 800))},
}


@pytest.mark.parametrize("kind", STRIPS)
def test_strips_are_staged_into_tiles(make: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    for dtype in ("uint8", "int16", "float32", "float64"):
        values = RNG.integers(0, 100, (3, 30, 2400)).astype(dtype)
        path = make(values, f"{dtype}.tif", compress="deflate", names=["a", "b", "c"], **STRIPS[kind])
        raster = raster_file(str(path), "scene", wanted("c", "a"))
        staged = raster.stage(tmp_path / "staged" / dtype)
        (file,) = (tmp_path / "staged" / dtype).iterdir()
        assert 0 < file.stat().st_size < raster.staged_bytes + 10_000
        assert staged.identity() == raster.identity()
        assert staged.frame == raster.frame
        made = file.stat().st_mtime_ns
        for again in (pickle.loads(pickle.dumps(staged)), raster.stage(tmp_path / "staged" / dtype)):
            for box in (Box((0, 0), (30, 2400)), Box((3, 2000), (29, 2311))):
                assert np.array_equal(again.read(box), raster.read(box), equal_nan=True)
            assert np.array_equal(again.overview((10, 60)), raster.overview((10, 60)), equal_nan=True)
            assert np.array_equal(again.overview((10, 60), [1])[0], raster.overview((10, 60))[1], equal_nan=True)
        assert file.stat().st_mtime_ns == made


def test_what_is_not_read_in_rows_is_not_staged(make: Callable[..., Path], tmp_path: Path) -> None:
    values = RNG.integers(0, 99, (1, 30, 2400)).astype(np.uint8)
    for options in ({}, {"compress": "deflate", "tiled": True, "blockxsize": 128, "blockysize": 128}):
        raster = raster_file(str(make(values, **options)), "scene", wanted("a"))
        assert raster.stage(tmp_path / "staged") is raster
        assert raster.staged_bytes == 0


def test_staging_says_what_is_wrong(make: Callable[..., Path], tmp_path: Path) -> None:
    path = make(RNG.integers(0, 99, (1, 300, 2400)).astype(np.uint8), compress="deflate")
    raster = raster_file(str(path), "scene", wanted("a"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ProductError, match="free some space"):
        raster.stage(tmp_path / "file" / "staged")
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 4000)
    with pytest.raises(SceneError, match="damaged"):
        raster_file(str(path), "scene", wanted("a")).stage(tmp_path / "staged")
    assert not list((tmp_path / "staged").glob("*.tif"))


def test_areas_and_spacing(make: Callable[..., Path]) -> None:
    feet = make(np.zeros((1, 4, 4), np.uint8), "feet.tif", crs="EPSG:2263", transform=from_origin(0, 0, 10, 10))
    raster = raster_file(str(feet), "scene", wanted("a"))
    assert raster.spacing == pytest.approx((3.048006, 3.048006), rel=1e-6)
    assert raster.cell is not None
    assert raster.cell[0] == pytest.approx(9.29034, rel=1e-5)
    degrees = make(np.zeros((1, 4, 4), np.uint8), "degrees.tif", crs="EPSG:4326", transform=from_origin(5, 9, 1, 1))
    assert raster_file(str(degrees), "scene", wanted("a")).cell is None


def test_sources_pickle_and_may_be_read_by_many_threads(make: Callable[..., Path]) -> None:
    values = RNG.integers(0, 9999, (2, 300, 300)).astype(np.uint16)
    raster = raster_file(str(make(values, tiled=True, blockxsize=64, blockysize=64)), "scene", wanted("a", "b"))
    raster = pickle.loads(pickle.dumps(raster))
    boxes = [Box((r, c), (r + 50, c + 40)) for r in range(0, 250, 25) for c in range(0, 250, 25)]
    with ThreadPoolExecutor(8) as pool:
        for box, out in zip(boxes, pool.map(raster.read, boxes), strict=True):
            assert np.array_equal(out, values[(slice(None), *box.slices())])


def test_overviews_show_the_scene(make: Callable[..., Path]) -> None:
    values = np.arange(10000, dtype=np.float32).reshape(1, 100, 100)
    raster = raster_file(str(make(values)), "scene", wanted("a"))
    assert np.array_equal(raster.overview((10, 20))[0], values[0, 5::10, 2::5])
    values = RNG.integers(0, 9999, (2, 200, 333)).astype(np.uint16)
    for block in (16, 64):
        tiled = make(values, tiled=True, blockxsize=block, blockysize=block, compress="deflate")
        for shape in ((5, 7), (60, 333), (200, 100)):
            rows, cols = (sample_positions(n, m) for n, m in zip(values.shape[1:], shape, strict=True))
            found = raster_file(str(tiled), "scene", wanted("a", "b")).overview(shape)
            assert np.array_equal(found, values[:, rows][:, :, cols])
            some = raster_file(str(tiled), "scene", wanted("a", "b")).overview(shape, [1])
            assert np.array_equal(some, found[1:])


def test_overviews_take_few_reads(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of strips of a row or two there were as many reads as rows were shown, which took longer than to read it all."""
    values = RNG.integers(0, 9999, (1, 1900, 1930)).astype(np.uint16)
    asked = list[Box]()
    values_of = Raster._values

    def told(self: Raster, uri: str, bands: Sequence[Band], at: Box, *rest: Any) -> Any:
        asked.append(at)
        return values_of(self, uri, bands, at, *rest)

    monkeypatch.setattr(Raster, "_values", told)
    raster = raster_file(str(make(values)), "scene", wanted("a"))
    rows, cols = (sample_positions(n, 768) for n in values.shape[1:])
    assert np.array_equal(raster.overview((768, 768))[0], values[0][np.ix_(rows, cols)])
    assert len(asked) < 5
    asked.clear()
    raster.overview((4, 4))
    assert [box.shape[0] for box in asked] == [1] * 4, "far apart, they are passed over"


def test_complex_rasters_are_refused(make: Callable[..., Path]) -> None:
    with pytest.raises(SceneError, match="complex"):
        raster_file(str(make(np.zeros((1, 4, 4), np.complex64))), "scene", wanted("a"))


def test_the_identity_follows_sidecars_and_sources(make: Callable[..., Path], tmp_path: Path) -> None:
    values = np.ones((1, 8, 8), np.uint8)
    source = make(values, "source.tif")
    virtual = tmp_path / "virtual.vrt"
    virtual.write_text(
        '<VRTDataset rasterXSize="8" rasterYSize="8"><GeoTransform>0,1,0,9,0,-1</GeoTransform><VRTRasterBand '
        'dataType="Byte" band="1"><SimpleSource><SourceFilename relativeToVRT="1">source.tif</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    before = raster_file(str(virtual), "scene", wanted("a")).identity()
    make(values + 1, "source.tif")
    assert raster_file(str(virtual), "scene", wanted("a")).identity() != before
    placed = make(values, "placed.tif", crs=None, transform=None)
    placed.with_suffix(".tfw").write_text("10\n0\n0\n-10\n5\n95\n")
    before = raster_file(str(placed), "scene", wanted("a")).identity()
    placed.with_suffix(".tfw").write_text("20\n0\n0\n-20\n5\n95\n")
    assert raster_file(str(placed), "scene", wanted("a")).identity() != before
    assert source.exists()


def test_what_an_interrupted_run_left_is_overwritten(make: Callable[..., Path], tmp_path: Path) -> None:
    raster = raster_file(str(make(np.zeros((1, 60, 70), np.uint8))), "scene", wanted("a"))
    labels = ArrayLabels(RNG.integers(0, 3, (60, 70)).astype(np.uint8))
    mask, _ = raster.frame.write_labels(tmp_path / "mask.tif", labels, LEGEND)
    good = mask.read_bytes()
    for leftover in (b"", good[:100], good[: len(good) // 2]):
        (tmp_path / "mask.tif").write_bytes(leftover)
        (tmp_path / "mask.plain.tif").write_bytes(leftover)
        raster.frame.write_labels(tmp_path / "mask.tif", labels, LEGEND)
        raster.frame.verify(mask, labels)
        assert mask.read_bytes() == good


def test_a_damaged_mask_does_not_verify(make: Callable[..., Path], tmp_path: Path) -> None:
    raster = raster_file(str(make(np.zeros((1, 60, 70), np.uint8))), "scene", wanted("a"))
    labels = ArrayLabels(np.zeros((60, 70), np.uint8), np.zeros((3, 60, 70), np.float32))
    mask, _ = raster.frame.write_labels(tmp_path / "mask.tif", labels, LEGEND)
    other = ArrayLabels(np.eye(60, 70, dtype=np.uint8), np.ones((3, 60, 70), np.float32))
    with pytest.raises(ProductError, match="differs"):
        raster.frame.verify(mask, other)
    (scores,) = raster.frame.write_scores(tmp_path / "scores.tif", labels, LEGEND)
    with pytest.raises(ProductError, match="differs"):
        raster.frame.verify_scores(scores, other, LEGEND)
    mask.write_bytes(mask.read_bytes()[:300])
    with pytest.raises(ProductError, match="does not read back"):
        raster.frame.verify(mask, labels)


def test_a_fourth_byte_band_is_a_channel_for_whoever_names_it(make: Callable[..., Path]) -> None:
    values = RNG.integers(0, 255, (4, 9, 9)).astype(np.uint8)
    path = make(values, photometric="RGB")
    names = ["blue", "green", "red", "nir"]
    raster = raster_file(str(path), "scene", wanted(*names), names)
    assert np.array_equal(raster.read(raster.grid.box), values)


def test_outlines_that_cannot_be_drawn_are_left_out(make: Callable[..., Path]) -> None:
    moon = "+proj=longlat +a=1737400 +b=1737400 +no_defs"
    assert raster_file(str(make(np.zeros((1, 4, 4), np.uint8), crs=moon)), "m", wanted("a")).frame.footprint() is None


def test_transforms_without_area_are_refused(make: Callable[..., Path]) -> None:
    path = make(np.zeros((1, 4, 4), np.uint8), transform=Affine(0, 0, 5, 0, 0, 7))
    with pytest.raises(SceneError, match="no area"):
        raster_file(str(path), "scene", wanted("a"))


def test_the_block_cache_of_gdal_is_bounded_and_holds_blocks() -> None:
    with gdal_environment():
        assert get_gdal_config("GDAL_CACHEMAX") == GDAL_CACHE == 64 * 2**20
