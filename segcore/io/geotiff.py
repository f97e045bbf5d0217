"""Rasters: any file that GDAL reads in, cloud-optimised GeoTIFF (COG) out. The only home of rasterio.

A scene may be one file with all its bands, or one file a band, of different resolutions: a `Band` says where each
channel comes from, and bands on a coarser lattice are interpolated onto the finest one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime as datetime_type
from functools import partial
from itertools import groupby
from math import hypot
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
import rasterio.shutil
import rasterio.warp
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.windows import Window

from segcore.box import Box
from segcore.errors import ProductError, SceneError, one_line
from segcore.grid import Grid, Rescale
from segcore.io.files import file_identity, is_remote
from segcore.io.source import Floats, LabelReader, Legend, Source, Wanted
from segcore.resample import interpolate

#: GDAL's own block cache takes a share of all memory unless it is bounded (bytes).
GDAL_CACHE = 128 * 2**20
_BLOCK = 512
_GDAL_ERRORS = (RasterioError, CPLE_BaseError)
#: The transform of a raster that has none.
_NOWHERE = tuple(Affine.identity())[:6]


@dataclass(frozen=True, slots=True)
class Band:
    """One channel of a scene: `index` counts from 1, as GDAL does; physical value = stored x `scale` + `offset`.

    Scale, offset and nodata that are None are taken from the file.
    """

    uri: str
    index: int
    scale: float | None = None
    offset: float | None = None
    nodata: float | None = None


@dataclass(frozen=True, slots=True)
class GeoFrame:
    """CRS, transform (six numbers of the affine, row by row), control points and pixel convention of a raster."""

    shape: tuple[int, int]
    crs: CRS | None
    transform: tuple[float, ...]
    gcps: tuple[tuple[float, ...], ...] = ()
    area_or_point: str | None = None
    suffix: str = ".tif"

    def write_labels(self, path: Path, labels: LabelReader, legend: Legend) -> list[Path]:
        """A COG with palette, `mode` overviews and nodata; class names in its tags and in GDAL's sidecar file."""
        colours = {i: (*rgb, 255) for i, _, rgb in legend.classes} | {legend.nodata: (0, 0, 0, 0)}
        with self._written(path, 1, "uint8", legend.nodata, overviews="mode", predictor="NO") as to:
            for box in _file_order(self.shape):
                to.write(labels.read(box), 1, window=_window(box))
            to.write_colormap(1, colours)
            to.set_band_description(1, "class")
            to.update_tags(1, **{f"CLASS_{i}": name for i, name, _ in legend.classes})
        sidecar = _sidecar_of(path)
        _describe_classes(sidecar, legend)
        return [path, sidecar]

    def write_scores(self, path: Path, labels: LabelReader, legend: Legend) -> list[Path]:
        count = len(legend.classes)
        with self._written(path, count, "float32", float("nan"), overviews="average", predictor="YES") as to:
            for band, (index, name, _) in enumerate(legend.classes, start=1):
                for box in _file_order(self.shape):
                    to.write(labels.read_scores(box, index), band, window=_window(box))
                to.set_band_description(band, name)
        return [file for file in (path, _sidecar_of(path)) if file.exists()]

    def verify(self, path: Path, labels: LabelReader) -> None:
        self._compare(path, [(1, labels.read)])

    def verify_scores(self, path: Path, labels: LabelReader, legend: Legend) -> None:
        bands = enumerate((index for index, _, _ in legend.classes), start=1)
        self._compare(path, [(band, partial(labels.read_scores, index=index)) for band, index in bands])

    def _compare(self, path: Path, bands: Sequence[tuple[int, Callable[[Box], NDArray[Any]]]]) -> None:
        try:
            with _environment(), rasterio.open(path) as written:
                found = _frame_of(written)
                if found != self:
                    raise ProductError(f"{path} does not lie on its scene: {found} should be {self}; report this bug")
                for band, read in bands:
                    for box in _file_order(self.shape):
                        if not np.array_equal(written.read(band, window=_window(box)), read(box), equal_nan=True):
                            raise ProductError(f"{path} differs from what was written to it in {box}; run again")
        except _GDAL_ERRORS as error:
            raise ProductError(f"{path} does not read back ({one_line(error)}): is the disk full? Run again") from error

    def footprint(self) -> dict[str, Any] | None:
        if self.crs is None or self.transform == _NOWHERE:
            return None
        affine, (rows, cols) = Affine(*self.transform), self.shape
        corners = [affine * corner for corner in ((0, 0), (0, rows), (cols, rows), (cols, 0), (0, 0))]
        outline = {"type": "Polygon", "coordinates": [corners]}
        with contextlib.suppress(*_GDAL_ERRORS), _environment():  # not every CRS is of the Earth
            return dict(rasterio.warp.transform_geom(self.crs, "EPSG:4326", outline, precision=7))
        return None

    def properties(self) -> dict[str, Any]:
        if self.crs is None:
            return {}
        authority = self.crs.to_authority()
        found: dict[str, Any] = {"proj:code": ":".join(authority) if authority else None}
        if authority is None:
            found["proj:wkt2"] = self.crs.to_wkt(version="WKT2_2019")
        if self.transform != _NOWHERE:
            found["proj:transform"] = list(self.transform)
        return found | {"proj:shape": list(self.shape)}

    @contextlib.contextmanager
    def _written(
        self, path: Path, count: int, dtype: str, nodata: float, *, overviews: str, predictor: str
    ) -> Iterator[Any]:
        """A plain tiled file to be filled, which is then copied into a COG at `path`. Raises ProductError."""
        rows, cols = self.shape
        plain = path.with_name(f"{path.stem}.plain.tif")
        for leftover in (plain, path, _sidecar_of(plain), _sidecar_of(path)):
            leftover.unlink(missing_ok=True)  # GDAL would look into what an interrupted run left
        profile = {"driver": "GTiff", "height": rows, "width": cols, "count": count, "dtype": dtype, "nodata": nodata}
        layout = {"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "compress": "zstd", "zstd_level": 1}
        georeference: dict[str, Any] = {"crs": self.crs}
        if self.gcps:
            georeference["gcps"] = [GroundControlPoint(*point) for point in self.gcps]
        elif self.transform != _NOWHERE:
            georeference["transform"] = Affine(*self.transform)
        cog = {"compress": "DEFLATE", "level": 6, "blocksize": _BLOCK, "bigtiff": "IF_SAFER", "num_threads": 2}
        cog |= {"overview_resampling": overviews, "predictor": predictor}
        try:
            with _environment():
                with rasterio.open(plain, "w", **profile, **layout, **georeference, BIGTIFF="IF_SAFER") as to:
                    if self.area_or_point:
                        to.update_tags(AREA_OR_POINT=self.area_or_point)
                    yield to
                rasterio.shutil.copy(plain, path, driver="COG", **cog)
        except _GDAL_ERRORS as error:
            raise ProductError(
                f"cannot write {path}: {one_line(error)}; free some space, run again", retryable=True
            ) from error
        for leftover in (plain, _sidecar_of(plain)):
            leftover.unlink(missing_ok=True)


class Raster:
    """A raster scene: bands of one or several files, on the lattice of the finest one.

    Raises SceneError for files that do not open, bands that are missing, and files that do not lie on each other.
    """

    def __init__(
        self,
        uri: str,
        name: str,
        bands: Sequence[Band],
        channels: Sequence[str],
        *,
        datetime: str | None = None,
        warnings: Sequence[str] = (),
        described_by: Mapping[str, Any] | None = None,
    ) -> None:
        self.uri, self.name, self.channels, self.datetime = uri, name, tuple(channels), datetime
        self.warnings = tuple(warnings)
        self._bands = tuple(bands)
        self._described_by = described_by
        self._local = threading.local()
        with _environment():
            files = {band.uri: self._dataset(band.uri) for band in self._bands}
            finest = min(files.values(), key=lambda file: abs(file.transform.determinant))
            self.grid = Grid("yx", finest.shape)
            self.frame = _frame_of(finest)
            self._placements = {uri: _placement(file, finest) for uri, file in files.items()}
            unit = finest.crs.linear_units_factor[1] if finest.crs and finest.crs.is_projected else None
            t = finest.transform
            self.spacing: tuple[float, ...] | None = (hypot(t.b, t.e) * unit, hypot(t.a, t.d) * unit) if unit else None
            self.cell: tuple[float, str] | None = (abs(t.determinant) * unit**2, "m2") if unit else None
            self.datetime = datetime or _acquisition_time(finest)
        if self.frame.crs is None:
            self.warnings += ("the scene has no coordinate reference system; its mask has none either",)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (
            self.uri,
            self.name,
            self._bands,
            self.channels,
            self.datetime,
            self.warnings,
            self._described_by,
        )

    def identity(self) -> Mapping[str, Any]:
        files = {uri: file_identity(uri) for uri in sorted({band.uri for band in self._bands})}
        bands = [[band.uri, band.index, band.scale, band.offset, str(band.nodata)] for band in self._bands]
        return {"files": files, "bands": bands, **({"item": self._described_by} if self._described_by else {})}

    def stage(self, folder: Path) -> Raster:
        return self

    def read(self, box: Box) -> Floats:
        out = np.empty((len(self._bands), *box.shape), np.float32)
        with _environment():
            for uri, positions in self._by_file():
                placement, bands = self._placements[uri], [self._bands[i] for i in positions]
                at = placement.inside(box)
                if at.size == 0:
                    out[positions] = np.nan
                    continue
                values = self._values(uri, bands, at)
                out[positions] = placement.onto(values, at, box)
        return out

    def overview(self, shape: Sequence[int]) -> Floats:
        out = np.empty((len(self._bands), *shape), np.float32)
        with _environment():
            for uri, positions in self._by_file():
                whole = Box.of(self._dataset(uri).shape)
                out[positions] = self._values(uri, [self._bands[i] for i in positions], whole, tuple(shape))
        return out

    def _by_file(self) -> Iterator[tuple[str, list[int]]]:
        """The files, and which channels each of them holds: a file is read once for all its bands."""
        order = sorted(range(len(self._bands)), key=lambda i: self._bands[i].uri)
        for uri, group in groupby(order, key=lambda i: self._bands[i].uri):
            yield uri, list(group)

    def _dataset(self, uri: str) -> DatasetReader:
        """The handle of this thread: GDAL's are not to be shared."""
        handles: dict[str, DatasetReader] = self._local.__dict__.setdefault("handles", {})
        if uri not in handles:
            handles[uri] = open_raster(uri)
        return handles[uri]

    def _values(self, uri: str, bands: Sequence[Band], at: Box, shape: tuple[int, ...] | None = None) -> Floats:
        """Physical values of a box of one file, (len(bands), *shape), NaN where invalid."""
        file, indexes = self._dataset(uri), [band.index for band in bands]
        options: dict[str, Any] = {"window": _window(at)}
        if shape is not None:
            options |= {"resampling": Resampling.nearest}
        single = options | ({"out_shape": shape} if shape is not None else {})
        several = options | ({"out_shape": (len(bands), *shape)} if shape is not None else {})
        try:
            stored = file.read(indexes, **several)
            out = stored.astype(np.float32)
            for i, band in enumerate(bands):
                scale = file.scales[band.index - 1] if band.scale is None else band.scale
                offset = file.offsets[band.index - 1] if band.offset is None else band.offset
                if (scale, offset) != (1, 0):
                    wide = stored[i].astype(np.float64) if stored.dtype.itemsize > 2 else out[i]
                    out[i] = wide * scale + offset
                if band.nodata is not None:
                    out[i][stored[i] == band.nodata] = np.nan
                if MaskFlags.all_valid not in file.mask_flag_enums[band.index - 1]:
                    out[i][file.read_masks(band.index, **single) == 0] = np.nan
            # GDAL lets an alpha band mask the others only where it makes RGBA or grey + alpha; here it always does.
            if ColorInterp.alpha in file.colorinterp:
                alpha = file.read(file.colorinterp.index(ColorInterp.alpha) + 1, **single)
                out[:, alpha == 0] = np.nan
        except RasterioIOError as error:
            raise SceneError(
                f"{uri}: cannot read {at} ({one_line(error.__cause__ or error)}); the file is truncated or damaged, "
                f"or its storage was away: copy it again",
                retryable=is_remote(uri),
            ) from error
        np.copyto(out, np.nan, where=np.isinf(out))
        return out


def open_raster(uri: str) -> DatasetReader:
    """The dataset. Raises SceneError for what GDAL does not read as a georeferenced image with a real data type."""
    try:
        file = rasterio.open(uri)
    except RasterioIOError as error:
        raise SceneError(
            f"{uri} is no raster that GDAL can open ({one_line(error)}); check the file with `rio info`"
        ) from error
    if file.count == 0:
        raise SceneError(f"{uri} holds {len(file.subdatasets)} subdatasets and no band of its own; name one of them")
    if any(kind.startswith("complex") for kind in file.dtypes):
        raise SceneError(f"{uri} is complex-valued ({file.dtypes[0]}); give its amplitude or intensity instead")
    return file


def raster_file(
    uri: str,
    name: str,
    wanted: Wanted,
    bands: Sequence[str] | None = None,
    scale: float | None = None,
    offset: float | None = None,
) -> Raster:
    """A scene of one file. Its bands are found by name: `bands`, or the file's descriptions, or its colours.

    A file that names no band must have exactly as many as the model has channels; they are then taken in order, with
    a warning.
    """
    with _environment(), open_raster(uri) as file:
        data = [i for i, colour in enumerate(file.colorinterp, start=1) if colour != ColorInterp.alpha]
        if bands is not None and len(bands) != len(data):
            raise SceneError(f"{uri} has {len(data)} bands, and --bands names {len(bands)}: {', '.join(bands)}")
        colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        names: dict[str, int] = {}
        for position, index in enumerate(data):
            colour = file.colorinterp[index - 1]
            found = bands[position] if bands is not None else file.descriptions[index - 1]
            found = found or (colour.name if colour in colours else None)
            if found:
                names.setdefault(found.strip().lower(), index)
    warnings = []
    missing = [channel for channel in wanted.channels if channel.lower() not in names]
    if not missing:
        indexes = [names[channel.lower()] for channel in wanted.channels]
    elif not names and len(data) == len(wanted.channels):
        indexes = data
        if len(data) > 1:
            warnings.append(f"the bands have no names; taken in order as {', '.join(wanted.channels)}")
    else:
        has = f"{len(data)} bands ({', '.join(names) if names else 'without names'})"
        raise SceneError(
            f"{uri} has {has} and lacks {', '.join(missing)}, which the model wants; name the bands in file order "
            f"with --bands, or take a model that needs fewer"
        )
    chosen = [Band(uri, index, scale, offset) for index in indexes]
    return Raster(uri, name, chosen, wanted.channels, warnings=warnings)


@dataclass(frozen=True, slots=True)
class _Placement:
    """How the lattice of one file lies on the scene's: `covered` is the part of the scene that it shows whole."""

    covered: Box
    part: Box
    rescale: Rescale

    def inside(self, box: Box) -> Box:
        """The pixels of the file that a box of the scene is made of; empty where the file does not reach."""
        seen = self._relative(box)
        if seen.size == 0:
            return Box(self.part.start, self.part.start)
        at = self.rescale.support(seen)
        return Box(
            tuple(a + o for a, o in zip(at.start, self.part.start, strict=True)),
            tuple(b + o for b, o in zip(at.stop, self.part.start, strict=True)),
        )

    def onto(self, values: Floats, at: Box, box: Box) -> Floats:
        """Values of `at` of the file, laid onto `box` of the scene; NaN where the file does not reach."""
        seen = self._relative(box)
        source = Box(
            tuple(a - o for a, o in zip(at.start, self.part.start, strict=True)),
            tuple(b - o for b, o in zip(at.stop, self.part.start, strict=True)),
        )
        inner = interpolate(values, source, self.rescale, seen)
        if seen.shape == box.shape:
            return inner
        out = np.full((len(values), *box.shape), np.nan, np.float32)
        where = seen.slices(tuple(a - o for a, o in zip(box.start, self.covered.start, strict=True)))
        out[(slice(None), *where)] = inner
        return out

    def _relative(self, box: Box) -> Box:
        seen = box & self.covered
        return Box(
            tuple(a - o for a, o in zip(seen.start, self.covered.start, strict=True)),
            tuple(b - o for b, o in zip(seen.stop, self.covered.start, strict=True)),
        )


def _placement(file: DatasetReader, finest: DatasetReader) -> _Placement:
    """Where a file lies on the finest one. Raises SceneError unless its lattice is a whole multiple, edge on edge."""
    if file.crs != finest.crs:
        raise SceneError(
            f"{file.name} is in {file.crs} and {finest.name} in {finest.crs}; bring the bands into one CRS (gdalwarp)"
        )
    to_scene = ~finest.transform * file.transform
    factors = (round(to_scene.e), round(to_scene.a))
    origin = (round(to_scene.f), round(to_scene.c))
    # Both ends must lie where whole factors say, within a tenth of a pixel of the scene.
    far = to_scene * (file.width, file.height)
    found = (to_scene.f, to_scene.c, far[1], far[0], to_scene.b * file.height, to_scene.d * file.width)
    whole = (*origin, origin[0] + factors[0] * file.height, origin[1] + factors[1] * file.width, 0, 0)
    if min(factors) < 1 or any(abs(a - b) > 0.1 for a, b in zip(found, whole, strict=True)):
        raise SceneError(
            f"{file.name} does not lie on the grid of {finest.name}: one of its pixels is {to_scene.a:.3f} x "
            f"{to_scene.e:.3f} of them, at {to_scene.c:.3f}, {to_scene.f:.3f}; bring the bands onto one grid (gdalwarp)"
        )
    start, stop, first, last = [], [], [], []
    for n, m, f, o in zip(finest.shape, file.shape, factors, origin, strict=True):
        # Whole pixels of the file that touch the scene, and the pixels of the scene under them.
        first.append(max(0, -o // f))
        last.append(min(m, -(-(n - o) // f)))
        start.append(first[-1] * f + o)
        stop.append(last[-1] * f + o)
    part = Box(tuple(first), tuple(max(a, b) for a, b in zip(first, last, strict=True)))
    covered = Box(tuple(start), tuple(max(a, b) for a, b in zip(start, stop, strict=True)))
    if part.size == 0:
        raise SceneError(f"{file.name} and {finest.name} do not overlap; they are no bands of one scene")
    return _Placement(covered, part, Rescale(part.shape, covered.shape))


def _frame_of(file: DatasetReader) -> GeoFrame:
    points, points_crs = file.gcps
    return GeoFrame(
        shape=file.shape,
        crs=file.crs or points_crs or None,
        transform=tuple(file.transform)[:6],
        gcps=tuple((point.row, point.col, point.x, point.y, point.z or 0.0) for point in points),
        area_or_point=file.tags().get("AREA_OR_POINT"),
    )


def _reopen(
    uri: str,
    name: str,
    bands: Sequence[Band],
    channels: Sequence[str],
    datetime: str | None,
    warnings: Sequence[str],
    described_by: Mapping[str, Any] | None,
) -> Raster:
    raster = Raster(uri, name, bands, channels, datetime=datetime, described_by=described_by)
    raster.warnings = tuple(warnings)
    return raster


def _acquisition_time(file: DatasetReader) -> str | None:
    """When the image was taken, as GDAL finds it in the files of a satellite product, ISO 8601 in UTC."""
    stamp = file.tags(ns="IMAGERY").get("ACQUISITIONDATETIME", "")
    with contextlib.suppress(ValueError):
        return datetime_type.fromisoformat(stamp.replace(" ", "T")).strftime("%Y-%m-%dT%H:%M:%SZ")
    return None


def _environment() -> rasterio.Env:
    return rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE // 2**20, GDAL_PAM_ENABLED=True)


def _window(box: Box) -> Window:
    (row, col), (rows, cols) = box.start, box.shape
    return Window(col, row, cols, rows)


def _file_order(shape: tuple[int, int]) -> Iterator[Box]:
    """Full-width slabs that begin on a row of blocks."""
    rows, cols = shape
    step = max(1, 2**23 // (cols * _BLOCK)) * _BLOCK
    for start in range(0, rows, step):
        yield Box((start, 0), (min(start + step, rows), cols))


def _sidecar_of(path: Path) -> Path:
    """GDAL's own sidecar file (PAM), which holds what a format cannot."""
    return path.with_name(f"{path.name}.aux.xml")


def _describe_classes(sidecar: Path, legend: Legend) -> None:
    """Category names and an attribute table, which QGIS and ArcGIS show as a legend; what GDAL has put there stays."""
    root = ElementTree.parse(sidecar).getroot() if sidecar.exists() else ElementTree.Element("PAMDataset")
    band = root.find("PAMRasterBand")
    band = ElementTree.SubElement(root, "PAMRasterBand", band="1") if band is None else band
    names = ElementTree.SubElement(band, "CategoryNames")
    by_index = {index: name for index, name, _ in legend.classes}
    for index in range(max(by_index) + 1):
        ElementTree.SubElement(names, "Category").text = by_index.get(index, "")
    table = ElementTree.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    # Types and usages by GDAL's numbers: 0 integer, 2 string; 5 value, 2 name, 6 to 8 red, green, blue.
    columns = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8))
    for position, (name, kind, usage) in enumerate(columns):
        field = ElementTree.SubElement(table, "FieldDefn", index=str(position))
        for key, value in (("Name", name), ("Type", str(kind)), ("Usage", str(usage))):
            ElementTree.SubElement(field, key).text = value
    for position, (index, name, rgb) in enumerate(legend.classes):
        row = ElementTree.SubElement(table, "Row", index=str(position))
        for cell in (index, name, *rgb):
            ElementTree.SubElement(row, "F").text = str(cell)
    ElementTree.indent(root)
    sidecar.write_bytes(ElementTree.tostring(root, encoding="utf-8") + b"\n")


def _conforms(raster: Raster) -> Source:
    return raster
