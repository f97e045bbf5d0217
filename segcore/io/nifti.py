"""Volumes: NIfTI-1 and NIfTI-2 in, NIfTI out. The only home of nibabel.

A volume is handed on in the orientation and axis order that the model wants; its frame knows the way back, so a mask
lies voxel on voxel on its input, whatever way that was stored.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from segcore.box import Box
from segcore.errors import CardError, ProductError, SceneError, one_line
from segcore.files import file_identity, is_remote, local_path
from segcore.grid import Grid
from segcore.io.source import Floats, LabelReader, Labels, Legend, Source, Wanted, sample_positions

#: Millimetres of a unit of space, by its code; unknown ones are taken for millimetres, as everyone does.
_MM = {1: 1000.0, 2: 1.0, 3: 0.001}
_NIFTI_LABEL_INTENT = 1002


@dataclass(frozen=True, slots=True)
class Turn:
    """How axes of the file (i, j, k) become the model's: file axis n is array axis `axis[n]`, reversed if `flip[n]`."""

    axis: tuple[int, ...]
    flip: tuple[bool, ...]

    def to_file(self, box: Box, shape: Sequence[int]) -> Box:
        """A box of the array, as a box of the file; `shape` is the file's, in voxels."""
        start, stop = [], []
        for n, axis, flip in zip(shape, self.axis, self.flip, strict=True):
            a, b = box.start[axis], box.stop[axis]
            start.append(n - b if flip else a)
            stop.append(n - a if flip else b)
        return Box(tuple(start), tuple(stop))

    def to_array_box(self, box: Box, shape: Sequence[int]) -> Box:
        """A box of the file, as a box of the array; `shape` is the file's, in voxels."""
        start, stop = [0] * box.ndim, [0] * box.ndim
        for n, axis, flip, a, b in zip(shape, self.axis, self.flip, box.start, box.stop, strict=True):
            start[axis], stop[axis] = (n - b, n - a) if flip else (a, b)
        return Box(tuple(start), tuple(stop))

    def array(self, values: NDArray[Any]) -> NDArray[Any]:
        """A block of the file (last axes i, j, k) in the model's axes."""
        lead = values.ndim - len(self.axis)
        flipped = np.flip(values, tuple(lead + n for n, flip in enumerate(self.flip) if flip))
        order = sorted(range(len(self.axis)), key=self.axis.__getitem__)
        return flipped.transpose((*range(lead), *(lead + n for n in order)))

    def file(self, values: NDArray[Any]) -> NDArray[Any]:
        """A block in the model's axes, as the file stores it."""
        lead = values.ndim - len(self.axis)
        turned = values.transpose((*range(lead), *(lead + axis for axis in self.axis)))
        return np.flip(turned, tuple(lead + n for n, flip in enumerate(self.flip) if flip))

    def permute(self, per_file_axis: Sequence[float]) -> tuple[float, ...]:
        """Numbers per file axis, in the order of the model's axes."""
        out = [0.0] * len(self.axis)
        for value, axis in zip(per_file_axis, self.axis, strict=True):
            out[axis] = float(value)
        return tuple(out)


@dataclass(frozen=True, slots=True)
class NiftiFrame:
    """Header of the input, byte for byte, and the turn between its axes and the model's."""

    header: bytes
    version: int
    affine: tuple[tuple[float, ...], ...]
    turn: Turn
    shape: tuple[int, ...]
    """Spatial shape as stored (i, j, k)."""
    trailing: int = 0
    """Number of axes of length one behind the spatial ones."""
    suffix: str = ".nii.gz"

    def write_labels(self, path: Path, labels: LabelReader, legend: Legend) -> list[Path]:
        """A uint8 volume with the input's shape, affine, qform, sform, codes, units and zooms."""
        header = self._header(np.uint8, (*self.shape, *(1,) * self.trailing))
        header["intent_code"] = _NIFTI_LABEL_INTENT
        header["descrip"] = b"segflow labels"
        self._write(path, header, (self.turn.file(labels.read(box)) for box in self._file_order()))
        return [path]

    def write_scores(self, path: Path, labels: LabelReader, legend: Legend) -> list[Path]:
        """A float32 volume with one volume for each class along the fourth axis."""
        count = len(legend.classes)
        header = self._header(np.float32, (*self.shape, count))
        header["descrip"] = b"segflow scores"
        self._write(path, header, self._score_blocks(labels, legend), level=1)  # scores hardly become smaller
        return [path]

    def verify(self, path: Path, labels: LabelReader) -> None:
        self._compare(path, (self.turn.file(labels.read(box)) for box in self._file_order()))

    def verify_scores(self, path: Path, labels: LabelReader, legend: Legend) -> None:
        self._compare(path, self._score_blocks(labels, legend))

    def _score_blocks(self, labels: LabelReader, legend: Legend) -> Iterator[NDArray[Any]]:
        for index, _, _ in legend.classes:
            for box in self._file_order():
                yield self.turn.file(labels.read_scores(box, index))

    def _compare(self, path: Path, blocks: Iterator[NDArray[Any]]) -> None:
        """Raises ProductError unless the file has the input's geometry and these voxels."""
        try:
            with gzip.open(path, "rb") as file:
                written = self._kind().from_fileobj(file, check=False)
                mine, theirs = geometry(self._original()), geometry(written)
                differing = [field for field in mine if mine[field] != theirs[field]]
                if differing:
                    raise ProductError(
                        f"{path} does not lie on its scene: {', '.join(differing)} differ; report this bug"
                    )
                file.seek(int(written["vox_offset"]))
                for block in blocks:
                    expected = block.astype(written.get_data_dtype(), copy=False).tobytes(order="F")
                    if file.read(len(expected)) != expected:
                        raise ProductError(f"{path} differs from what was written to it; run again", retryable=True)
        except (OSError, EOFError, zlib.error, HeaderDataError) as error:
            raise ProductError(
                f"{path} does not read back ({one_line(error)}): is the disk full? Then free some space; run again"
            ) from error

    def read_labels(self, path: Path, box: Box) -> Labels:
        try:
            stored = nib.load(path).dataobj[(*self.turn.to_file(box, self.shape).slices(), *(0,) * self.trailing)]
        except (OSError, EOFError, zlib.error, HeaderDataError, ImageFileError) as error:
            raise ProductError(f"{path} does not read ({one_line(error)}); run again") from error
        return np.ascontiguousarray(self.turn.array(np.asarray(stored, np.uint8)))

    def footprint(self) -> dict[str, Any] | None:
        return None

    def properties(self) -> dict[str, Any]:
        return {"segflow:affine": [list(row) for row in self.affine]}

    def _kind(self) -> type[nib.Nifti1Header]:
        kind: type[nib.Nifti1Header] = nib.Nifti2Header if self.version == 2 else nib.Nifti1Header
        return kind

    def _original(self) -> nib.Nifti1Header:
        """The input's header as it was stored: nibabel repairs what it finds odd unless it is told not to."""
        return self._kind().from_fileobj(io.BytesIO(self.header), check=False)

    def _header(self, dtype: type[np.generic], shape: tuple[int, ...]) -> nib.Nifti1Header:
        """The input's header for other data. Only what describes the values is new; the geometry is copied."""
        header = self._original()
        zooms = np.array(header["pixdim"])
        header.set_data_dtype(dtype)
        header.set_data_shape(shape)
        header["pixdim"] = zooms
        header["magic"] = header.single_magic
        header["vox_offset"] = header.single_vox_offset
        header["scl_slope"], header["scl_inter"] = 1, 0
        for field in ("cal_max", "cal_min", "intent_p1", "intent_p2", "intent_p3"):
            header[field] = 0
        for field in ("intent_name", "aux_file", "descrip"):
            header[field] = b""
        header["intent_code"] = 0
        return header

    def _write(self, path: Path, header: nib.Nifti1Header, blocks: Iterator[NDArray[Any]], level: int = 6) -> None:
        """Header and voxels, gzipped without name or time: the same labels always make the same bytes."""
        try:
            with (
                path.open("wb") as file,
                gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=level, mtime=0) as packed,
            ):
                header.write_to(packed)
                packed.write(b"\0" * (int(header["vox_offset"]) - packed.tell()))
                for block in blocks:
                    packed.write(block.astype(header.get_data_dtype(), copy=False).tobytes(order="F"))
        except OSError as error:
            raise ProductError(f"cannot write {path}: {error.strerror or error}", retryable=True) from error

    def _file_order(self) -> Iterator[Box]:
        """Boxes of the array, 8 million voxels each, as they follow each other in the file."""
        *rest, slow = self.shape
        step = max(1, 2**23 // int(np.prod(rest)))
        for k in range(0, slow, step):
            yield self.turn.to_array_box(Box((*(0,) * len(rest), k), (*rest, min(k + step, slow))), self.shape)


class Nifti:
    """A volume scene, read through nibabel; physical values (`scl_slope`, `scl_inter`) are applied.

    Raises SceneError for files that are no NIfTI, are cut short, or have no real voxels in three dimensions.
    """

    def __init__(self, uri: str, name: str, wanted: Wanted, staged: str | None = None) -> None:
        self.uri, self.name, self.channels = uri, name, wanted.channels
        self._wanted, self._staged = wanted, staged
        if is_remote(uri):
            raise SceneError(f"{uri}: volumes are read from a local or mounted file system; copy it there first")
        if len(wanted.axes) != 3:
            raise CardError(f"{uri} is a volume, and the model is made for images with the axes {wanted.axes!r}")
        image = _load(staged or uri)
        self.warnings: tuple[str, ...] = ()
        self._image = image
        shape = tuple(int(n) for n in image.shape)
        self._volumes = _volumes(uri, shape, len(wanted.channels))
        turn = _turn(image.affine, wanted, uri)
        self.frame = NiftiFrame(
            header=_stored_header(image),
            version=2 if isinstance(image.header, nib.Nifti2Header) else 1,
            affine=tuple(tuple(float(v) for v in row) for row in image.affine),
            turn=turn,
            shape=shape[:3],
            trailing=len(shape) - 3 if self._volumes is None else 0,
        )
        self.grid = Grid(wanted.axes, tuple(int(n) for n in turn.permute(shape[:3])))
        # The three lowest bits name the unit of space (NIfTI-1 standard).
        unit = _MM.get(int(image.header["xyzt_units"]) & 7, 1.0)
        sizes = voxel_sizes(image.affine) * unit
        if not np.all(np.isfinite(sizes)) or np.any(sizes <= 0):
            raise SceneError(f"{uri} has voxels of {sizes} mm: its affine is singular; repair the header")
        self.spacing: tuple[float, ...] | None = turn.permute(sizes)
        volume_mm3 = abs(float(np.linalg.det(image.affine[:3, :3]))) * unit**3
        self.cell: tuple[float, str] | None = (volume_mm3 / 1000, "ml")
        self.datetime: str | None = None
        codes = int(image.header["qform_code"]), int(image.header["sform_code"])
        if codes == (0, 0):
            self.warnings += ("the header gives neither qform nor sform; its orientation is a guess",)

    def __reduce__(self) -> tuple[object, ...]:
        return Nifti, (self.uri, self.name, self._wanted, self._staged)

    def identity(self) -> Mapping[str, Any]:
        files = {str(holder.filename) for holder in self._image.file_map.values()} if not self._staged else set()
        return {"files": {uri: file_identity(uri) for uri in sorted(files | {self.uri})}}

    @property
    def staged_bytes(self) -> int:
        if self._staged or not local_path(self.uri).name.lower().endswith(".gz"):
            return 0
        return int(self._image.dataobj.offset) + int(np.prod(self._image.shape)) * self._image.get_data_dtype().itemsize

    def stage(self, folder: Path) -> Nifti:
        """Unpack a `.nii.gz` once: gzip cannot be sought, so every later read would start from its beginning."""
        source = local_path(self.uri)
        if not source.name.lower().endswith(".gz"):
            return self
        identity = repr((self.uri, file_identity(self.uri)))
        staged = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.nii"
        if not staged.exists():
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.partial"):  # of a run that was killed
                leftover.unlink(missing_ok=True)
            partial = staged.with_suffix(f".{uuid4().hex}.partial")
            try:
                with gzip.open(source, "rb") as packed, partial.open("wb") as plain:
                    _unpack(packed, plain, self.uri)
            except OSError as error:
                raise ProductError(f"cannot unpack into {folder}: {error.strerror or error}", retryable=True) from error
            os.replace(partial, staged)
        return Nifti(self.uri, self.name, self._wanted, str(staged))

    def read(self, box: Box) -> Floats:
        turn, shape = self.frame.turn, self.frame.shape
        index = turn.to_file(box, shape).slices()
        try:
            values = self._blocks(index)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise SceneError(
                f"{self.uri}: cannot read voxels {box} ({one_line(error)}); the file is truncated or damaged: copy it "
                f"again"
            ) from error
        out = np.ascontiguousarray(turn.array(values))
        np.copyto(out, np.nan, where=np.isinf(out))
        return out

    def overview(self, shape: Sequence[int], channels: Sequence[int] | None = None) -> Floats:
        # Whole slabs of the slowest axis of the file, thinned at once: no more than a slab is held.
        positions = [sample_positions(n, m) for n, m in zip(self.grid.shape, shape, strict=True)]
        turn, stored = self.frame.turn, self.frame.shape
        slow = turn.axis[-1]
        out = np.empty((len(self.channels), *shape), np.float32)
        for place, position in enumerate(positions[slow]):
            start = [0] * 3
            stop = list(self.grid.shape)
            start[slow], stop[slow] = int(position), int(position) + 1
            slab = self.read(Box(tuple(start), tuple(stop)))
            picks = [np.array([0]) if axis == slow else positions[axis] for axis in range(len(stored))]
            where: list[Any] = [slice(None)] * 4
            where[slow + 1] = slice(place, place + 1)
            out[tuple(where)] = np.stack([channel[np.ix_(*picks)] for channel in slab])
        return out if channels is None else out[list(channels)]

    def _blocks(self, index: tuple[slice, ...]) -> Floats:
        proxy = self._image.dataobj
        if self._volumes is None:
            extra = (0,) * (len(self._image.shape) - 3)
            return np.asanyarray(proxy[(*index, *extra)]).astype(np.float32)[None]
        return np.stack([np.asanyarray(proxy[(*index, k)]).astype(np.float32) for k in range(self._volumes)])


#: The header fields that say where a volume lies; products copy them bit for bit.
_GEOMETRY = (
    *("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def geometry(header: nib.Nifti1Header) -> dict[str, bytes]:
    """Every field of a header that says where a volume lies, as bytes in the machine's order.

    Zooms, both transforms, their codes, the units of space, and the spatial shape.
    """
    fields = {name: np.asarray(header[name]) for name in _GEOMETRY}
    fields["pixdim"] = fields["pixdim"][:4]
    fields["dim"] = np.asarray(header["dim"])[1:4]
    fields["space_unit"] = np.asarray(header["xyzt_units"]) & 7
    return {name: value.astype(value.dtype.newbyteorder("=")).tobytes() for name, value in fields.items()}


def _stored_header(image: nib.Nifti1Image) -> bytes:
    """The bytes of the header in its file."""
    holder = image.file_map.get("header") or image.file_map["image"]
    with holder.get_prepare_fileobj(mode="rb") as file:
        return bytes(file.read(image.header.sizeof_hdr))


def _load(path: str) -> nib.Nifti1Image:
    file = local_path(path)
    try:
        image = nib.load(file)
    except FileNotFoundError as error:
        raise SceneError(f"{path}: there is no such file; check the path") from error
    except (ImageFileError, OSError, EOFError, zlib.error, HeaderDataError, ValueError) as error:
        raise SceneError(f"{path} is no NIfTI volume that opens ({one_line(error)}); copy it again") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise SceneError(f"{path} is {type(image).__name__}, not NIfTI; convert it (nib-convert)")
    kind = image.get_data_dtype()
    if kind.fields or kind.kind not in "iuf":
        raise SceneError(f"{path} holds {kind} voxels; segflow labels real-valued volumes")
    stored = image.file_map["image"].filename
    if stored and not str(stored).lower().endswith((".gz", ".bz2", ".zst")):
        needed = int(image.dataobj.offset) + int(np.prod(image.shape)) * kind.itemsize
        size = os.stat(stored).st_size
        if size < needed:
            raise SceneError(
                f"{path} is truncated: {size} bytes of the {needed} that its header promises; copy it again"
            )
    return image


def _unpack(packed: gzip.GzipFile, plain: IO[bytes], uri: str) -> None:
    """Copy the whole stream. Raises SceneError where it ends early or its checksum is wrong."""
    try:
        shutil.copyfileobj(packed, plain, 2**20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SceneError(
            f"{uri} is truncated or damaged: {one_line(error)} after {plain.tell()} unpacked bytes; copy it again"
        ) from error
    plain.flush()
    os.fsync(plain.fileno())


def _volumes(uri: str, shape: tuple[int, ...], channels: int) -> int | None:
    """How many volumes along the fourth axis are channels; None for a plain volume. Raises SceneError."""
    if len(shape) < 3 or any(n < 1 for n in shape):
        raise SceneError(f"{uri} has the shape {shape}; segflow wants three spatial axes")
    extra = int(np.prod(shape[3:]))
    if extra == 1 and channels == 1:
        return None
    if len(shape) == 4 and extra == channels:
        return channels
    raise SceneError(
        f"{uri} holds {extra} volumes of {shape[:3]} voxels and the model wants {channels}; extract or merge them "
        f"first (for instance with fslsplit, fslmerge or nibabel)"
    )


def _turn(affine: NDArray[np.float64], wanted: Wanted, uri: str) -> Turn:
    """The turn from the file's axes to the wanted orientation (such as RAS) in the wanted order of axes."""
    places = ["xyz".index(letter) for letter in wanted.axes]
    if wanted.orientation is None:
        axis = tuple(places.index(n) for n in range(3))
        return Turn(axis, (False,) * 3)
    try:
        codes = [wanted.orientation[n] for n in places]
        way = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    except (ValueError, IndexError) as error:
        raise SceneError(f"{uri} cannot be turned to {wanted.orientation}: {one_line(error)}") from error
    if np.isnan(way).any():
        raise SceneError(f"{uri} has an affine without a direction for every axis; repair its header")
    return Turn(tuple(int(a) for a, _ in way), tuple(bool(f < 0) for _, f in way))


def _conforms(volume: Nifti) -> Source:
    return volume
