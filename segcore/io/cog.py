"""Products of rasters: cloud-optimised GeoTIFF (COG), and the frame that places them. Shares rasterio."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
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
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.windows import Window

from segcore.box import Box
from segcore.errors import ProductError, one_line
from segcore.io.source import Frame, LabelReader, Labels, Legend
from segcore.spec import GDAL_CACHE, usable_cores

#: All that rasterio raises; the second one is not among its public errors, and comes through all the same.
GDAL_ERRORS = (RasterioError, CPLE_BaseError)
_BLOCK = 512
#: Side of what is read, written or compared at once (pixels): of labels, and of scores, which take four bytes each.
_PIECE, _SCORES_PIECE = 4 * _BLOCK, 2 * _BLOCK
#: Of DEFLATE: the next one takes two and a half times as long to make masks smaller by a twentieth.
_LEVEL = 5
#: How what is only read again is stored: quickly.
_PLAIN: dict[str, Any] = {"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "BIGTIFF": "IF_SAFER"}
_PLAIN |= {"compress": "zstd", "zstd_level": 1, "interleave": "band"}
Halve = Callable[[Labels], Labels]
"""Makes pixels of half the resolution."""
#: The transform of a raster that has none.
_NOWHERE = tuple(Affine.identity())[:6]


@dataclass(frozen=True, slots=True)
class GeoFrame:
    """CRS, transform (six numbers of the affine, row by row), control points and pixel convention of a raster."""

    shape: tuple[int, int]
    crs: CRS | None
    transform: tuple[float, ...]
    gcps: tuple[tuple[float, ...], ...] = ()
    area_or_point: str = "Area"
    suffix: str = ".tif"

    def write_labels(self, path: Path, labels: LabelReader, legend: Legend) -> list[Path]:
        """A COG with palette, `mode` overviews and nodata; class names in its tags and in GDAL's sidecar file."""
        colours = {i: (*rgb, 255) for i, _, rgb in legend.classes} | {legend.nodata: (0, 0, 0, 0)}
        halve = partial(_mode_of_four, nodata=legend.nodata)
        with self._written(path, 1, "uint8", legend.nodata, halve=halve, predictor="NO") as to:
            for box in _file_order(self.shape):
                to.write(labels.read(box), 1, window=window_of(box))
            to.write_colormap(1, colours)
            to.set_band_description(1, "class")
            to.update_tags(1, **{f"CLASS_{i}": name for i, name, _ in legend.classes})
        sidecar = _sidecar_of(path)
        _describe_classes(sidecar, legend)
        return [path, sidecar]

    def write_scores(self, path: Path, labels: LabelReader, legend: Legend) -> list[Path]:
        count = len(legend.classes)
        with self._written(path, count, "float32", float("nan"), halve=None, predictor="YES") as to:
            for band, (index, name, _) in enumerate(legend.classes, start=1):
                for box in _file_order(self.shape, _SCORES_PIECE):
                    to.write(labels.read_scores(box, index), band, window=window_of(box))
                to.set_band_description(band, name)
        return [file for file in (path, _sidecar_of(path)) if file.exists()]

    def verify(self, path: Path, labels: LabelReader) -> None:
        self._compare(path, [(1, labels.read)], _PIECE)

    def verify_scores(self, path: Path, labels: LabelReader, legend: Legend) -> None:
        bands = enumerate((index for index, _, _ in legend.classes), start=1)
        self._compare(path, [(band, partial(labels.read_scores, index=index)) for band, index in bands], _SCORES_PIECE)

    def _compare(self, path: Path, bands: Sequence[tuple[int, Callable[[Box], NDArray[Any]]]], piece: int) -> None:
        try:
            with gdal_environment(), rasterio.open(path) as written:
                found = frame_of(written)
                if found != self:
                    raise ProductError(f"{path} does not lie on its scene: {found} should be {self}; report this bug")
                for box in _file_order(self.shape, piece):
                    for band, read in bands:
                        if not np.array_equal(written.read(band, window=window_of(box)), read(box), equal_nan=True):
                            raise ProductError(f"{path} differs from what was written to it in {box}; run again")
        except GDAL_ERRORS as error:
            raise ProductError(
                f"{path} does not read back ({one_line(error)}): is the disk full? Then free some space; run again"
            ) from error

    def read_labels(self, path: Path, box: Box) -> Labels:
        try:
            with gdal_environment(), rasterio.open(path) as written:
                return np.asarray(written.read(1, window=window_of(box)), np.uint8)
        except GDAL_ERRORS as error:
            raise ProductError(f"{path} does not read ({one_line(error)}); run again") from error

    def footprint(self) -> dict[str, Any] | None:
        if self.crs is None or self.transform == _NOWHERE:
            return None
        affine, (rows, cols) = Affine(*self.transform), self.shape
        corners = [affine * corner for corner in ((0, 0), (0, rows), (cols, rows), (cols, 0), (0, 0))]
        outline = {"type": "Polygon", "coordinates": [corners]}
        with contextlib.suppress(*GDAL_ERRORS), gdal_environment():  # not every CRS is of the Earth
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
        self, path: Path, count: int, dtype: str, nodata: float, *, halve: Halve | None, predictor: str
    ) -> Iterator[Any]:
        """A plain tiled file to be filled, which is then copied into a COG at `path`. Raises ProductError.

        `halve` makes the overviews of a single band; those of others are GDAL's, averages.
        """
        rows, cols = self.shape
        plain = path.with_name(f"{path.stem}.plain.tif")
        overviews = _overview_files(plain, self.shape) if halve else []
        leftovers = [file for made in (plain, *overviews) for file in (made, _sidecar_of(made))]
        for leftover in (*leftovers, path, _sidecar_of(path)):
            leftover.unlink(missing_ok=True)  # GDAL would look into what an interrupted run left
        profile = {"driver": "GTiff", "height": rows, "width": cols, "count": count, "dtype": dtype, "nodata": nodata}
        georeference: dict[str, Any] = {"crs": self.crs}
        if self.gcps:
            georeference["gcps"] = [GroundControlPoint(*point) for point in self.gcps]
        elif self.transform != _NOWHERE:
            georeference["transform"] = Affine(*self.transform)
        cog = {"compress": "DEFLATE", "level": _LEVEL, "blocksize": _BLOCK, "bigtiff": "IF_SAFER"}
        cog |= {"num_threads": usable_cores(), "overview_resampling": "average", "predictor": predictor}
        try:
            with gdal_environment():
                with rasterio.open(plain, "w", **profile, **_PLAIN, **georeference) as to:
                    to.update_tags(AREA_OR_POINT=self.area_or_point)
                    yield to
                if halve is not None:
                    _build_overviews([plain, *overviews], halve)
                rasterio.shutil.copy(plain, path, driver="COG", **cog)
        except GDAL_ERRORS as error:
            raise ProductError(
                f"cannot write {path}: {one_line(error.__cause__ or error)}; free some space, run again", retryable=True
            ) from error
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)


def frame_of(file: DatasetReader) -> GeoFrame:
    points, points_crs = file.gcps
    return GeoFrame(
        shape=file.shape,
        crs=file.crs or points_crs or None,
        transform=tuple(file.transform)[:6],
        gcps=tuple((point.row, point.col, point.x, point.y, point.z or 0.0) for point in points),
        area_or_point=file.tags().get("AREA_OR_POINT", "Area"),  # so GDAL reads a file that does not say
    )


def gdal_environment() -> rasterio.Env:
    # A number is one of bytes to rasterio, where to GDAL itself a small one is one of megabytes.
    return rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE, GDAL_PAM_ENABLED=True)


def window_of(box: Box) -> Window:
    (row, col), (rows, cols) = box.start, box.shape
    return Window(col, row, cols, rows)


def _file_order(shape: tuple[int, int], piece: int = _PIECE) -> Iterator[Box]:
    """Squares of whole blocks with sides of `piece` pixels: however wide a scene is, no more is held at once."""
    counts = [-(-n // piece) for n in shape]
    return (Box.cell(index, (piece, piece), shape) for index in product(*map(range, counts)))


def _overview_files(plain: Path, shape: tuple[int, int]) -> list[Path]:
    """Where GDAL looks for the overviews of a file, each half as large as the one before, down to a single block."""
    count = 0
    while max(shape) > _BLOCK << count:
        count += 1
    return [plain.with_name(plain.name + ".ovr" * (level + 1)) for level in range(count)]


def _build_overviews(levels: Sequence[Path], halve: Halve) -> None:
    """Make each of these files from the one before it, piece by piece, so that every pixel is read once."""
    for finer, coarser in pairwise(levels):
        with rasterio.open(finer) as read:
            shape = tuple(-(-n // 2) for n in read.shape)
            profile = {"driver": "GTiff", "height": shape[0], "width": shape[1], "count": 1, "dtype": read.dtypes[0]}
            with rasterio.open(coarser, "w", **profile, nodata=read.nodata, **_PLAIN) as to:
                for box in _file_order(read.shape):
                    half = Box(tuple(n // 2 for n in box.start), tuple(-(-n // 2) for n in box.stop))
                    to.write(halve(read.read(1, window=window_of(box))), 1, window=window_of(half))


def _mode_of_four(labels: Labels, nodata: int) -> Labels:
    """Every 2 x 2 pixels as one: the label that most of the valid ones bear, the lowest of those that tie.

    The result is nodata where all four are. At an odd edge the last pixels count twice.
    """
    rows, cols = labels.shape
    if rows % 2 or cols % 2:
        labels = np.pad(labels, ((0, rows % 2), (0, cols % 2)), mode="edge")
    # In four numbers in order, equals are neighbours; nodata is made the last one of all.
    shift = np.uint8(255 - nodata)
    pixels = [labels[i::2, j::2] + shift for i in (0, 1) for j in (0, 1)]
    for i, j in ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2)):
        pixels[i], pixels[j] = np.minimum(pixels[i], pixels[j]), np.maximum(pixels[i], pixels[j])
    first, second, third, fourth = pixels
    found = first.copy()
    np.copyto(found, third, where=(third == fourth) & (third != 255))
    np.copyto(found, second, where=(second == third) & (second != 255))
    np.copyto(found, first, where=first == second)
    return found - shift


def tiled_bytes(shape: tuple[int, int], count: int, dtype: str) -> int:
    """The size of what `write_tiled` writes, but for its header; at most, as its last blocks may be lower."""
    rows, cols = (-(-n // _BLOCK) * _BLOCK for n in shape)
    return rows * cols * count * np.dtype(dtype).itemsize


def write_tiled(
    path: Path,
    shape: tuple[int, int],
    count: int,
    dtype: str,
    nodata: float | None,
    read: Callable[..., NDArray[Any]],
) -> None:
    """Fill a plain tiled file, in one step, with what `read(at=box)` gives (count, *box.shape), rows by rows.

    No more is held than some 32 MiB, or 16 rows. Raises ProductError where it cannot be written.
    """
    rows, cols = shape
    bytes_per_row = cols * count * max(4, np.dtype(dtype).itemsize)
    height = next((h for h in (512, 256, 128, 64, 32) if h * bytes_per_row <= GDAL_CACHE // 2), 16)
    layout = {"tiled": True, "blockxsize": _BLOCK, "blockysize": height, "interleave": "band", "BIGTIFF": "IF_SAFER"}
    layout |= {"photometric": "MINISBLACK", "nodata": nodata}
    unfinished = path.with_suffix(".partial")
    profile = {"driver": "GTiff", "height": rows, "width": cols, "count": count, "dtype": dtype}
    anywhere = Affine.translation(1, 1)  # where it lies, the scene knows; GDAL warns of files without a transform
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        with rasterio.open(unfinished, "w", **profile, **layout, transform=anywhere) as to:
            for row in range(0, rows, height):
                box = Box((row, 0), (min(row + height, rows), cols))
                to.write(read(at=box), window=window_of(box))
        os.replace(unfinished, path)
    except (OSError, *GDAL_ERRORS) as error:
        raise ProductError(
            f"cannot copy into {path}: {one_line(error.__cause__ or error)}; free some space, run again", retryable=True
        ) from error


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


def _conforms(frame: GeoFrame) -> Frame:
    return frame
