"""Scratch: the chunked store of finished tiles. A chunk present is a tile done. The only home of zarr.

One tile is one chunk is one file with one writer, so tiles never wait for each other, and a store that was left by a
killed run says exactly what is still to do. zarr moves a chunk into place in one step, and a checksum in every chunk
finds those that a crash of the whole machine has cut short.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.array import Array

from segcore.box import Box
from segcore.errors import ProductError, one_line
from segcore.grid import Grid
from segcore.io.source import Floats, LabelReader, Labels
from segcore.spec import format_bytes

Index = tuple[int, ...]
#: A crash of the machine can damage what was written so long before it (seconds): kernels write to disk far sooner.
UNSAFE_SECONDS = 600.0


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
                f"cannot store tile {index} in {self.root}: {error.strerror or error}{self._room(error)}; free some "
                f"space, run again",
                retryable=True,
            ) from error

    def _room(self, error: OSError) -> str:
        """Of a disk that is full: what is free there, and what all tiles take at most."""
        with contextlib.suppress(OSError):
            free, whole = shutil.disk_usage(self.root).free, self._labels.nbytes
            whole += self._scores.nbytes if self._scores is not None else 0
            if error.errno == errno.ENOSPC and free < whole:
                return f" ({format_bytes(free)} are free there, and the scene takes up to {format_bytes(whole)})"
        return ""

    def present(self) -> set[Index]:
        """The tiles whose labels, and scores, have been written. What a writer left that was killed is removed."""
        found: set[Index] = set()
        for index, entries in self._rows():
            found.update((*index, int(entry.name)) for entry in entries)
        return found

    def done(self) -> set[Index]:
        """The tiles that are finished. Chunks that a crash of the machine has damaged are removed, to be made again.

        Only the last of them can be: the kernel has long put the others on the disk. So that a million tiles
        are told in seconds, those alone are compared with their checksums; the others are when they are read.
        """
        found: dict[Index, float] = {}
        for index, entries in self._rows():
            for entry in entries:
                status = entry.stat()
                if status.st_size:
                    found[(*index, int(entry.name))] = status.st_mtime
                else:
                    Path(entry).unlink(missing_ok=True)
        unsafe = max(found.values(), default=0.0) - UNSAFE_SECONDS
        for tile in [tile for tile, written in found.items() if written > unsafe]:
            if self._damaged(tile):
                self._chunk(tile).unlink(missing_ok=True)
                del found[tile]
        return set(found)

    def _rows(self) -> Iterator[tuple[Index, list[os.DirEntry[str]]]]:
        """Chunks of labels, folder by folder, with what their index begins with; other files are removed."""
        chunks = str(self.root / "labels" / "c")
        scores = self._score_folders()
        for folder, folders, _ in os.walk(chunks):
            folders.sort()
            inside = os.path.relpath(folder, chunks).split(os.sep) if folder != chunks else []
            with os.scandir(folder) as listed:
                files = [entry for entry in listed if not entry.is_dir(follow_symlinks=False)]
            entries = [entry for entry in files if entry.name.isdigit() and len(inside) == len(self.core) - 1]
            for leftover in set(files).difference(entries):
                Path(leftover).unlink(missing_ok=True)
            for other in scores:
                there = other.joinpath(*inside)
                names = set(os.listdir(there)) if there.is_dir() else set()
                entries = [entry for entry in entries if entry.name in names]
            if entries:
                yield tuple(map(int, inside)), entries

    def _score_folders(self) -> list[Path]:
        count = self._scores.shape[0] if self._scores is not None else 0
        return [self.root / "scores" / "c" / str(index) for index in range(count)]

    def _chunk(self, tile: Index) -> Path:
        """Where the labels of a tile lie."""
        return self.root.joinpath("labels", "c", *map(str, tile))

    def _damaged(self, tile: Index) -> bool:
        """Whether a chunk of this tile differs from the checksum at its end, or is not there."""
        place = [str(i) for i in tile]
        folders = [self.root / "labels" / "c", *self._score_folders()]
        return not all(_is_whole(os.path.join(folder, *place)) for folder in folders)  # noqa: PTH118 (far faster)

    def pieces(self, pixels: int = 2**22) -> Iterator[Box]:
        """The grid in whole tiles, as many of a row of them at a time as have `pixels` pixels; one at the least."""
        *core, last = self.core
        size = (*core, last * max(1, pixels // (prod(core) * last)))
        shape = self._labels.shape
        counts = [range(-(-n // s)) for n, s in zip(shape, size, strict=True)]
        return (Box.cell(index, size, shape) for index in product(*counts))

    def read(self, box: Box) -> Labels:
        """Labels of a box. Raises ProductError where a chunk is damaged; its tile is then made again by a rerun."""
        return np.asarray(self._get(self._labels, box.slices(), box), np.uint8)

    def read_scores(self, box: Box, index: int) -> Floats:
        if self._scores is None:
            raise ProductError(f"{self.root} keeps no scores; run with --scores")
        return np.asarray(self._get(self._scores, (slice(index, index + 1), *box.slices()), box)[0], np.float32)

    def pick(self, positions: Sequence[NDArray[np.intp]]) -> Labels:
        """Labels at the crossings of these positions, one array of them for each axis."""
        return np.asarray(self._labels.oindex[tuple(positions)], np.uint8)

    def _get(self, array: Array[Any], index: tuple[slice, ...], box: Box) -> Any:
        try:
            return array[index]
        except (OSError, ValueError, RuntimeError) as error:
            ranges = zip(box.start, box.stop, self.core, strict=True)
            tiles = product(*(range(a // c, -(-b // c)) for a, b, c in ranges))
            damaged = [tile for tile in tiles if self._chunk(tile).exists() and self._damaged(tile)]
            for tile in damaged:
                self._chunk(tile).unlink(missing_ok=True)
            raise ProductError(
                f"{self.root} holds {len(damaged)} damaged tiles in {box} ({one_line(error)}); run again to make them "
                f"anew",
                retryable=True,
            ) from error


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


def _is_whole(chunk: str) -> bool:
    """Whether a chunk ends in the CRC-32C of what is before, as zarr writes it. What else it holds zarr knows."""
    try:
        with open(chunk, "rb") as file:  # noqa: PTH123 (far faster)
            stored = file.read()
    except OSError:
        return False
    return len(stored) > 4 and google_crc32c.value(stored[:-4]) == int.from_bytes(stored[-4:], "little")


def _conforms(scratch: Scratch) -> LabelReader:
    return scratch
