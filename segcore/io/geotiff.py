"""Rasters: any file that GDAL reads. With `cog`, which writes their products, the only home of rasterio.

A scene may be one file with all its bands, or one file a band, of different resolutions: a `Band` says where each
channel comes from, and bands on a coarser lattice are interpolated onto the finest one.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime as datetime_type
from functools import partial
from itertools import groupby, pairwise, product
from math import hypot, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import RasterioIOError
from rasterio.io import DatasetReader

from segcore.box import Box, strips
from segcore.errors import SceneError, one_line
from segcore.files import is_remote
from segcore.grid import Grid, Rescale
from segcore.io.cog import GDAL_ERRORS, frame_of, gdal_environment, tiled_bytes, window_of, write_tiled
from segcore.io.identity import identities
from segcore.io.source import Floats, Source, Wanted, sample_positions
from segcore.resample import interpolate

#: Longest side (pixels) of a block that is read as it is: of a longer one, a tile shows but a part.
WIDEST_BLOCK = 2048
#: Values that are unpacked in the time that a read takes by itself (measured), and that are read at once.
_A_READ, _AT_ONCE = 2**16, 2**21
#: Files of a scene that are read side by side: a band in a bucket is a wait, and one on a disk is unpacked.
_READERS = 3


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
        self._copies: Mapping[str, tuple[Band, ...]] = {}  # in the order of the channels that each file holds
        self._local = threading.local()
        self._readers = ThreadPoolExecutor(_READERS, "segflow-read")  # no thread is started before it is wanted
        with gdal_environment():
            files = {band.uri: self._dataset(band.uri) for band in self._bands}
            finest = min(files.values(), key=lambda file: abs(file.transform.determinant))
            self.grid = Grid("yx", finest.shape)
            self.frame = frame_of(finest)
            for band in self._bands:
                if band.index > files[band.uri].count:
                    raise SceneError(f"{band.uri} has {files[band.uri].count} bands, and band {band.index} is wanted")
            self._placements = {uri: _placement(file, finest) for uri, file in files.items()}
            unit = finest.crs.linear_units_factor[1] if finest.crs and finest.crs.is_projected else None
            t = finest.transform
            self.spacing: tuple[float, ...] | None = (hypot(t.b, t.e) * unit, hypot(t.a, t.d) * unit) if unit else None
            self.cell: tuple[float, str] | None = (abs(t.determinant) * unit**2, "m2") if unit else None
            self.datetime = datetime or _acquisition_time(finest)
        if self.frame.crs is None:
            self.warnings += ("the scene has no coordinate reference system; its mask has none either",)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._copies, *self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        described = (self.datetime, self.warnings, self._described_by)
        return self.uri, self.name, self._bands, self.channels, *described

    def identity(self) -> Mapping[str, Any]:
        with gdal_environment():
            behind = set().union(*(_files_behind(uri) for uri in {band.uri for band in self._bands}))
        files, warnings = identities(behind)
        self.warnings += tuple(warning for warning in warnings if warning not in self.warnings)
        bands = [[band.uri, band.index, band.scale, band.offset, str(band.nodata)] for band in self._bands]
        return {"files": files, "bands": bands, **({"item": self._described_by} if self._described_by else {})}

    @property
    def staged_bytes(self) -> int:
        with gdal_environment():
            return sum(
                tiled_bytes(self._dataset(uri).shape, len(positions), self._stored_type(uri) or "float32")
                for uri, positions in self._by_file()
                if _lies_in_rows(self._dataset(uri))
            )

    def stage(self, folder: Path) -> Raster:
        """Copy files in compressed strips into tiles, once: what lies beside a tile is unpacked with it, every time."""
        with gdal_environment():
            uris = [uri for uri, _ in self._by_file() if _lies_in_rows(self._dataset(uri))]
            copies = {uri: self._copied(uri, folder) for uri in uris}
        return _reopen(copies, *self._arguments()) if copies else self

    def _stored_type(self, uri: str) -> str | None:
        """The type in which a copy can hold what a file holds; None where only physical values say what is valid."""
        file = self._dataset(uri)
        indexes = [band.index - 1 for band in self._bands if band.uri == uri]
        types = {str(file.dtypes[i]) for i in indexes}
        values = {str(file.nodatavals[i]) for i in indexes}
        flags = {flag for i in indexes for flag in file.mask_flag_enums[i]}
        alike = len(types) == len(values) == 1 and flags <= {MaskFlags.all_valid, MaskFlags.nodata}
        return types.pop() if alike and not self._alpha(uri, file) else None

    def _copied(self, uri: str, folder: Path) -> tuple[Band, ...]:
        """The bands of a tiled copy, which is made unless it is there. Raises SceneError, ProductError."""
        file, bands, kind = (
            self._dataset(uri),
            [band for band in self._bands if band.uri == uri],
            self._stored_type(uri),
        )
        identity = repr((uri, identities(_files_behind(uri))[0], bands))
        path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.tif"
        if not path.exists():
            read = partial(self._values, bands=bands) if kind is None else partial(self._stored, bands=bands)
            nodata = file.nodatavals[bands[0].index - 1] if kind else None
            write_tiled(path, file.shape, len(bands), kind or "float32", nodata, partial(read, uri))
        if kind is None:
            return tuple(Band(str(path), i, 1, 0) for i in range(1, len(bands) + 1))
        scales = [file.scales[band.index - 1] if band.scale is None else band.scale for band in bands]
        offsets = [file.offsets[band.index - 1] if band.offset is None else band.offset for band in bands]
        return tuple(
            Band(str(path), i, scale, offset, band.nodata)
            for i, (band, scale, offset) in enumerate(zip(bands, scales, offsets, strict=True), start=1)
        )

    def read(self, box: Box) -> Floats:
        return self._gathered(
            range(len(self._bands)), box.shape, lambda uri, positions: self._read_file(uri, positions, box)
        )

    def overview(self, shape: Sequence[int], channels: Sequence[int] | None = None) -> Floats:
        wanted = range(len(self._bands)) if channels is None else channels
        return self._gathered(wanted, shape, lambda uri, positions: self._thinned(uri, positions, shape))

    def _gathered(
        self, channels: Sequence[int], shape: Sequence[int], read: Callable[[str, Sequence[int]], Floats]
    ) -> Floats:
        """Channels at these positions, (len(channels), *shape), out of one file or, side by side, of several.

        `read` is given a file and the positions of the channels that it has.
        """
        places: dict[str, list[int]] = {}
        for place, channel in enumerate(channels):
            places.setdefault(self._bands[channel].uri, []).append(place)
        if len(places) == 1:  # by this thread, which has it open
            return read(next(iter(places)), channels)
        out = np.empty((len(channels), *shape), np.float32)

        def read_file(uri: str, where: list[int]) -> None:
            out[where] = read(uri, [channels[place] for place in where])

        under_way = [self._readers.submit(read_file, *file) for file in places.items()]
        wait(under_way)  # all of them, before any error: who is told that this has ended may remove the files
        for file in under_way:
            file.result()
        return out

    def _thinned(self, uri: str, positions: Sequence[int], shape: Sequence[int]) -> Floats:
        """What one file shows of the whole scene, thinned: its channels, (len(positions), *shape)."""
        with gdal_environment():
            file = self._dataset(uri)
            if file.overviews(1):
                return self._values(uri, [self._bands[i] for i in positions], Box.of(file.shape), tuple(shape))
            # Asked for an image of fewer pixels, GDAL unpacks a row of blocks again for every row of that image.
            source = self._dataset(self._copies[uri][0].uri) if uri in self._copies else file
            out = np.empty((len(positions), *shape), np.float32)
            rows, cols = (sample_positions(n, m) for n, m in zip(file.shape, shape, strict=True))
            height, width = source.block_shapes[0]
            wide = min(file.width, max(width, WIDEST_BLOCK))
            count = len(positions)
            for here, across in product(_runs(rows, height, wide * count), _runs(cols, width, height * count)):
                box = Box((rows[here][0], cols[across][0]), (rows[here][-1] + 1, cols[across][-1] + 1))
                values = self._read_bands(uri, positions, box)
                picks = np.ix_(rows[here] - box.start[0], cols[across] - box.start[1])
                for thin, channel in zip(out, values, strict=True):
                    thin[here, across] = channel[picks]
            return out

    def _read_file(self, uri: str, positions: Sequence[int], box: Box) -> Floats:
        """What one file shows of a box of the scene: its channels, (len(positions), *box.shape)."""
        placement = self._placements[uri]
        at = placement.inside(box)
        if at.size == 0:
            return np.full((len(positions), *box.shape), np.nan, np.float32)
        with gdal_environment():
            return placement.onto(self._read_bands(uri, positions, at), at, box)

    def _read_bands(self, uri: str, positions: Sequence[int], at: Box) -> Floats:
        """Physical values of a box of one file, or of its copy."""
        if (copies := self._copies.get(uri)) is None:
            return self._values(uri, [self._bands[i] for i in positions], at)
        copied = dict(zip((i for i, band in enumerate(self._bands) if band.uri == uri), copies, strict=True))
        return self._values(copies[0].uri, [copied[i] for i in positions], at)

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

    def _alpha(self, uri: str, file: DatasetReader) -> int | None:
        """Index of the band that masks the others, unless it is one of the channels."""
        indexes = [i for i, colour in enumerate(file.colorinterp, start=1) if colour == ColorInterp.alpha]
        used = {band.index for band in self._bands if band.uri == uri}
        return next((i for i in indexes if i not in used), None)

    def _values(self, uri: str, bands: Sequence[Band], at: Box, shape: tuple[int, ...] | None = None) -> Floats:
        """Physical values of a box of one file, (len(bands), *shape), NaN where invalid."""
        file, indexes = self._dataset(uri), [band.index for band in bands]
        single: dict[str, Any] = {"window": window_of(at)}
        several = dict(single)
        if shape is not None:
            single |= {"resampling": Resampling.nearest, "out_shape": shape}
            several |= {"resampling": Resampling.nearest, "out_shape": (len(bands), *shape)}
        try:
            stored: NDArray[Any] = file.read(indexes, **several)
            out = np.empty(stored.shape, np.float32)
            for i, band in enumerate(bands):
                scale = file.scales[band.index - 1] if band.scale is None else band.scale
                offset = file.offsets[band.index - 1] if band.offset is None else band.offset
                nodata, mask, declared = [band.nodata], None, file.nodatavals[band.index - 1]
                flags = set(file.mask_flag_enums[band.index - 1])
                if flags == {MaskFlags.nodata} and _is_plain(stored.dtype, declared):
                    nodata.append(declared)
                elif not flags & {MaskFlags.all_valid, MaskFlags.alpha}:
                    mask = file.read_masks(band.index, **single)
                for rows in strips(stored.shape[1:]):
                    out[i, rows] = _physical(stored[i, rows], scale, offset, nodata)
                    if mask is not None:
                        out[i, rows][mask[rows] == 0] = np.nan
            # GDAL lets an alpha band mask the others only where it makes RGBA or grey + alpha; here it always does.
            if alpha := self._alpha(uri, file):
                out[:, file.read(alpha, **single) == 0] = np.nan
        except RasterioIOError as error:
            raise _unreadable(uri, at, error) from error
        return out

    def _stored(self, uri: str, bands: Sequence[Band], at: Box) -> NDArray[Any]:
        """What a file holds in a box, (len(bands), *at.shape)."""
        try:
            return self._dataset(uri).read([band.index for band in bands], window=window_of(at))
        except RasterioIOError as error:
            raise _unreadable(uri, at, error) from error


def _physical(stored: NDArray[Any], scale: float, offset: float, nodata: Iterable[float | None]) -> NDArray[Any]:
    """Values in physical units, NaN where what is stored is one of `nodata`, or beyond float32."""
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and so invalid
        values = stored.astype(np.float32)
        if (scale, offset) != (1, 0):
            wide = stored.astype(np.float64) if stored.dtype.itemsize > 2 else values
            values = (wide * scale + offset).astype(np.float32, copy=False)
    for value in nodata:
        if value is not None:
            values[stored == value] = np.nan
    values[np.isinf(values)] = np.nan
    return values


def _is_plain(stored: np.dtype[Any], nodata: float | None) -> bool:
    """Whether a nodata value says by itself which pixels are not valid: it need not be rounded to what is stored.

    None: rasterio does not tell it.
    """
    return nodata is not None and stored.kind in "iu" and stored.itemsize <= 4 and float(nodata).is_integer()


def _unreadable(uri: str, at: Box, error: RasterioIOError) -> SceneError:
    return SceneError(
        f"{uri}: cannot read {at} ({one_line(error.__cause__ or error)}); the file is truncated or damaged, or its "
        f"storage was away: copy it again",
        retryable=is_remote(uri),
    )


def _lies_in_rows(file: DatasetReader) -> bool:
    """Whether a tile of this file is read by unpacking far more than the tile."""
    packed = file.compression is not None or file.driver == "PNG"
    return packed and max(file.block_shapes[0]) > WIDEST_BLOCK


def _runs(positions: NDArray[np.intp], block: int, across: int) -> list[slice]:
    """The positions along an axis, in runs that are read at once: from one block or, where little is passed over, from
    several.

    `across`: how many values are read for each pixel of the axis.
    """
    passed_over = (np.diff(positions).max(initial=0) - block) * across
    side = min(WIDEST_BLOCK, _AT_ONCE // across)
    piece = positions // (block if passed_over > _A_READ else max(1, side // block) * block)
    ends = [0, *(np.flatnonzero(np.diff(piece)) + 1), len(positions)]
    return [slice(int(a), int(b)) for a, b in pairwise(ends)]


def open_raster(uri: str) -> DatasetReader:
    """The dataset. Raises SceneError for what GDAL does not read as a georeferenced image with a real data type."""
    try:
        file = rasterio.open(uri)
    except (*GDAL_ERRORS, UnicodeError) as error:
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
    with gdal_environment(), open_raster(uri) as file:
        data = [i for i, colour in enumerate(file.colorinterp, start=1) if colour != ColorInterp.alpha]
        if bands is not None and len(bands) == file.count:
            data = list(file.indexes)  # GDAL takes the last of four bytes for alpha; whoever names it knows better
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
    indexes, missing = wanted.pick(names)
    if missing and not names and len(data) == len(wanted.channels):
        indexes = data
        if len(data) > 1:
            warnings.append(f"the bands have no names; taken in order as {', '.join(wanted.channels)}")
    elif missing:
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
        return self.rescale.support(seen).shift(self.part.start)

    def onto(self, values: Floats, at: Box, box: Box) -> Floats:
        """Values of `at` of the file, laid onto `box` of the scene; NaN where the file does not reach."""
        seen = self._relative(box)
        inner = interpolate(values, at.shift([-o for o in self.part.start]), self.rescale, seen)
        if seen.shape == box.shape:
            return inner
        out = np.full((len(values), *box.shape), np.nan, np.float32)
        out[(slice(None), *(box & self.covered).slices(box.start))] = inner
        return out

    def _relative(self, box: Box) -> Box:
        return (box & self.covered).shift([-o for o in self.covered.start])


def _placement(file: DatasetReader, finest: DatasetReader) -> _Placement:
    """Where a file lies on the finest one. Raises SceneError unless its pixels are whole multiples of that one's."""
    if not finest.transform.determinant or not isfinite(finest.transform.determinant):
        raise SceneError(f"{finest.name} has the transform {tuple(finest.transform)[:6]}, which has no area; repair it")
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


def _files_behind(uri: str) -> set[str]:
    """The files that a dataset is made of: itself, its sidecars and, if it is virtual, what it is made from."""
    found: set[str] = set()
    waiting = [uri]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        with contextlib.suppress(SceneError), open_raster(name) as file:
            more = [other for other in file.files if other not in found]
            found.update(other for other in more if not other.lower().endswith(".vrt"))
            waiting += [other for other in more if other.lower().endswith(".vrt")]
    return found


def _reopen(
    copies: Mapping[str, tuple[Band, ...]],
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
    raster._copies = copies
    return raster


def _acquisition_time(file: DatasetReader) -> str | None:
    """When the image was taken, as GDAL finds it in the files of a satellite product, ISO 8601 in UTC."""
    stamp = file.tags(ns="IMAGERY").get("ACQUISITIONDATETIME", "")
    with contextlib.suppress(ValueError):
        return datetime_type.fromisoformat(stamp.replace(" ", "T")).strftime("%Y-%m-%dT%H:%M:%SZ")
    return None


def _conforms(raster: Raster) -> Source:
    return raster
