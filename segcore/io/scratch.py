"""Scratch: the chunked store of finished tiles. A chunk present is a tile done. The only home of zarr.

One tile is one chunk is one file with one writer, so tiles never wait for each other, and a store that was left by a
killed run says exactly what is still to do. zarr moves a chunk into place in one step, and a checksum in every chunk
finds those that a crash of the whole machine has cut short.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.array import Array

from segcore.box import Box
from segcore.errors import ProductError, one_line
from segcore.grid import Grid
from segcore.io.source import Floats, LabelReader, Labels

Index = tuple[int, ...]


class Scratch:
    """Labels, and scores where they are asked for, of one scene under one plan, in the folder `root`.

    Scores are written before labels: a tile whose labels are there is done. Pickles as its path.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._labels = _open(root / "labels")
        self._scores = _open(root / "scores") if (root / "scores").exists() else None

    @classmethod
    def create(cls, root: Path, grid: Grid, core: tuple[int, ...], nodata: int, classes: int | None) -> Scratch:
        """A new store or, where it was begun before, that one with what is done. `classes`: scores to keep, or None.

        Raises ProductError where the folder cannot be written.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
            if classes is not None and not _opens(root / "scores"):
                _create(root / "scores", (classes, *grid.shape), (1, *core), "float32", float("nan"))
            if not _opens(root / "labels"):
                _create(root / "labels", grid.shape, core, "uint8", nodata)
        except OSError as error:
            raise ProductError(
                f"cannot write to {root}: {error.strerror or error}; free some space, run again", retryable=True
            ) from error
        return cls(root)

    def __reduce__(self) -> tuple[object, ...]:
        return Scratch, (self.root,)

    @property
    def core(self) -> tuple[int, ...]:
        """Shape of a tile's core, in pixels."""
        return tuple(self._labels.chunks)

    def write(self, index: Index, core: Box, labels: Labels, scores: Floats | None = None) -> None:
        """Store one finished tile. Raises ProductError."""
        try:
            if self._scores is not None and scores is not None:
                self._scores[(slice(None), *core.slices())] = scores
            self._labels[core.slices()] = labels
        except OSError as error:
            raise ProductError(
                f"cannot store tile {index} in {self.root}: {error.strerror or error}; free some space, run again",
                retryable=True,
            ) from error

    def present(self) -> set[Index]:
        """The tiles whose labels have been written. What a writer left that was killed is removed."""
        chunks = self.root / "labels" / "c"
        ndim = len(self._labels.shape)
        found: set[Index] = set()
        for folder, _, files in os.walk(chunks):
            for file in files:
                parts = Path(folder, file).relative_to(chunks).parts
                if len(parts) == ndim and all(part.isdigit() for part in parts):
                    found.add(tuple(int(part) for part in parts))
                else:
                    Path(folder, file).unlink(missing_ok=True)
        return found

    def done(self) -> set[Index]:
        """The tiles that are finished and whole. Chunks that do not decode are removed, to be made again."""
        present = self.present()
        damaged = {tile for tile in present if not self._is_whole(tile)}
        for tile in damaged:
            self.root.joinpath("labels", "c", *map(str, tile)).unlink(missing_ok=True)  # to be made again
        return present - damaged

    def _is_whole(self, tile: Index) -> bool:
        core = Box.cell(tile, self.core, self._labels.shape)
        try:
            self.read(core)
            for index in range(self._scores.shape[0] if self._scores is not None else 0):
                self.read_scores(core, index)
                if not self.root.joinpath("scores", "c", str(index), *map(str, tile)).is_file():
                    return False
        except ProductError:
            return False
        return True

    def read(self, box: Box) -> Labels:
        return np.asarray(_get(self._labels, box.slices(), self.root), np.uint8)

    def read_scores(self, box: Box, index: int) -> Floats:
        if self._scores is None:
            raise ProductError(f"{self.root} keeps no scores; run with --scores")
        return np.asarray(_get(self._scores, (slice(index, index + 1), *box.slices()), self.root)[0], np.float32)

    def pick(self, positions: Sequence[NDArray[np.intp]]) -> Labels:
        """Labels at the crossings of these positions, one array of them for each axis."""
        return np.asarray(self._labels.oindex[tuple(positions)], np.uint8)


def _opens(path: Path) -> bool:
    """Whether there is an array, and not what a crash left of one."""
    try:
        _open(path)
    except ProductError:
        return False
    return True


def _open(path: Path) -> Array[Any]:
    try:
        # A chunk that holds nothing but the fill value must be written, too: its presence says that the tile is done.
        array = zarr.open_array(path, mode="r+").with_config({"write_empty_chunks": True})
    except (OSError, ValueError) as error:
        raise ProductError(f"{path} is no readable scratch store ({one_line(error)}); remove it, run again") from error
    return array


def _create(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, fill: float) -> None:
    """Write the metadata of an array, in a folder of its own that is then moved into place."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    zarr.create_array(
        partial,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=fill,
        serializer=BytesCodec(endian="little" if dtype != "uint8" else None),
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
    )
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


def _get(array: Array[Any], index: tuple[slice, ...], root: Path) -> Any:
    try:
        return array[index]
    except (OSError, ValueError, RuntimeError) as error:
        raise ProductError(f"{root} holds a damaged chunk ({one_line(error)}); run again to make it anew") from error


def _conforms(scratch: Scratch) -> LabelReader:
    return scratch
