"""Volumes: any orientation and type in, and masks that lie voxel on voxel on them."""

from __future__ import annotations

import gzip
import itertools
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import aff2axcodes

from segcore.box import Box
from segcore.errors import CardError, ProductError, SceneError
from segcore.io.memory import ArrayLabels
from segcore.io.nifti import Nifti, geometry
from segcore.io.source import Legend, Wanted

LEGEND = Legend(((0, "background", (0, 0, 0)), (1, "brain", (255, 0, 0))))
RNG = np.random.default_rng(11)
SHAPE = (5, 6, 7)
# Any permutation and flip of the axes, a little oblique, with voxels of three sizes.
ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def affine_of(order: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (place, sign) in enumerate(zip(order, signs, strict=True)):
        affine[place, axis] = sign * (1.0 + 0.25 * axis)
    tilt = 0.1
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = (-20.5, 11.25, 3)
    return affine


def save(path: Path, values: np.ndarray, affine: np.ndarray | None = None, **header: object) -> Path:
    kind = nib.Nifti2Image if header.pop("version", 1) == 2 else nib.Nifti1Image
    image = kind(values, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


@pytest.mark.parametrize("axes", ["xyz", "zyx"])
@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_every_orientation_comes_in_and_goes_back(
    tmp_path: Path, order: tuple[int, ...], signs: tuple[int, ...], axes: str
) -> None:
    values, affine = RNG.random(SHAPE).astype(np.float32), affine_of(order, signs)
    path = save(tmp_path / "scene.nii.gz", values, affine)
    volume = Nifti(str(path), "scene", Wanted(("T1w",), axes, "RAS")).stage(tmp_path / "staged")
    canonical = nib.as_closest_canonical(nib.load(path))
    assert aff2axcodes(canonical.affine) == ("R", "A", "S")
    expected = canonical.get_fdata(dtype=np.float32)
    expected = expected if axes == "xyz" else expected.transpose(2, 1, 0)
    whole = volume.read(volume.grid.box)
    assert np.array_equal(whole[0], expected)
    zooms = canonical.header.get_zooms()
    assert volume.spacing == pytest.approx(zooms if axes == "xyz" else zooms[::-1])
    box = Box((1, 2, 0), tuple(n - 1 for n in volume.grid.shape))
    assert np.array_equal(volume.read(box), whole[(slice(None), *box.slices())])
    # A mask that marks what is bright must mark the same voxels of the file, whatever way they were turned.
    labels = ArrayLabels((whole[0] > 0.5).astype(np.uint8), np.stack([1 - whole[0], whole[0]]))
    (mask,) = volume.frame.write_labels(tmp_path / "mask.nii.gz", labels, LEGEND)
    volume.frame.verify(mask, labels)
    written = nib.load(mask)
    assert np.array_equal(np.asarray(written.dataobj), values > 0.5)
    assert written.get_data_dtype() == np.uint8
    assert geometry(written.header) == geometry(nib.load(path).header)
    assert np.array_equal(written.affine, nib.load(path).affine)
    (scores,) = volume.frame.write_scores(tmp_path / "scores.nii.gz", labels, LEGEND)
    assert np.array_equal(nib.load(scores).get_fdata(dtype=np.float32)[..., 1], values)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".img"])
def test_every_type_and_container(tmp_path: Path, dtype: str, suffix: str) -> None:
    values = RNG.integers(0, 100, SHAPE).astype(dtype)
    image = nib.Nifti1Image(values, np.diag([2, 2, 2, 1]))
    if dtype == "int16":
        image.header.set_slope_inter(0.5, -10)
    path = tmp_path / f"scene{suffix}"
    if suffix == ".img":
        pair = nib.Nifti1Pair(values, image.affine, image.header)
        nib.save(pair, path)
        path = tmp_path / "scene.hdr"
    else:
        nib.save(image, path)
    volume = Nifti(str(path), "scene", Wanted(("T1w",), "xyz")).stage(tmp_path / "staged")
    assert np.allclose(volume.read(volume.grid.box)[0], nib.load(path).get_fdata(), atol=1e-3)
    labels = ArrayLabels((values > 50).astype(np.uint8))
    (mask,) = volume.frame.write_labels(tmp_path / "mask.nii.gz", labels, LEGEND)
    written = nib.load(mask)
    assert np.array_equal(written.get_fdata(), values > 50)  # no scaling of the input is left in the mask
    assert geometry(written.header) == geometry(nib.load(path).header)


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 2), (1, 4), (4, 2)])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("unit", ["mm", "micron", "meter"])
def test_header_fields_are_copied_bit_for_bit(tmp_path: Path, codes: tuple[int, int], version: int, unit: str) -> None:
    values = RNG.integers(0, 9, SHAPE).astype(np.int16)
    kind = nib.Nifti2Image if version == 2 else nib.Nifti1Image
    image = kind(values, affine_of((1, 0, 2), (1, -1, 1)))
    qform = affine_of((1, 0, 2), (1, -1, 1))
    qform[:3, 3] += 0.7
    image.set_qform(qform, codes[0])
    image.set_sform(affine_of((1, 0, 2), (1, -1, 1)), codes[1])
    image.header.set_xyzt_units(unit, "sec")
    path = tmp_path / "scene.nii"
    nib.save(image, path)
    volume = Nifti(str(path), "scene", Wanted(("T1w",), "xyz", "LPS"))
    values = volume.read(volume.grid.box)[0]
    (mask,) = volume.frame.write_labels(tmp_path / "mask.nii.gz", ArrayLabels((values > 4).astype(np.uint8)), LEGEND)
    one, two = nib.load(path).header, nib.load(mask).header
    assert type(one) is type(two)
    for field in ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
                  "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units", "dim"):  # fmt: skip
        assert np.array_equal(one[field], two[field]), field
    factor = {"mm": 1, "micron": 1e-3, "meter": 1e3}[unit]
    assert volume.cell is not None
    assert volume.cell[0] == pytest.approx(abs(np.linalg.det(nib.load(path).affine[:3, :3])) * factor**3 / 1000)


def test_big_endian_volumes(tmp_path: Path) -> None:
    values = RNG.integers(0, 999, SHAPE).astype(np.int16)
    header = nib.Nifti1Header(endianness=">")
    image = nib.Nifti1Image(values, affine_of((2, 0, 1), (1, 1, -1)), header)
    path = tmp_path / "scene.nii.gz"
    nib.save(image, path)
    volume = Nifti(str(path), "scene", Wanted(("T1w",), "xyz", "RAS"))
    canonical = nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32)
    assert np.array_equal(volume.read(volume.grid.box)[0], canonical)
    (mask,) = volume.frame.write_labels(tmp_path / "m.nii.gz", ArrayLabels((canonical > 500).astype(np.uint8)), LEGEND)
    assert np.array_equal(nib.load(mask).get_fdata(), values > 500)
    assert geometry(nib.load(mask).header) == geometry(nib.load(path).header)


def test_four_dimensions(tmp_path: Path) -> None:
    one = save(tmp_path / "one.nii", RNG.random((*SHAPE, 1)).astype(np.float32))
    volume = Nifti(str(one), "one", Wanted(("T1w",), "xyz"))
    (mask,) = volume.frame.write_labels(tmp_path / "m.nii.gz", ArrayLabels(np.zeros(SHAPE, np.uint8)), LEGEND)
    assert nib.load(mask).shape == (*SHAPE, 1)
    many = save(tmp_path / "many.nii", RNG.random((*SHAPE, 3)).astype(np.float32))
    volume = Nifti(str(many), "many", Wanted(("a", "b", "c"), "xyz", "RAS"))
    assert np.array_equal(volume.read(volume.grid.box), np.moveaxis(nib.load(many).get_fdata(dtype=np.float32), -1, 0))
    with pytest.raises(SceneError, match="3 volumes"):
        Nifti(str(many), "many", Wanted(("a",), "xyz"))


def test_nan_and_infinity_are_invalid(tmp_path: Path) -> None:
    values = RNG.random(SHAPE).astype(np.float32)
    values[0, 0, 0], values[1, 1, 1] = np.nan, np.inf
    volume = Nifti(str(save(tmp_path / "scene.nii", values)), "scene", Wanted(("T1w",), "xyz"))
    assert np.argwhere(np.isnan(volume.read(volume.grid.box)[0])).tolist() == [[0, 0, 0], [1, 1, 1]]


@given(st.tuples(*[st.integers(1, 12)] * 3), st.sampled_from(ORIENTATIONS), st.integers(1, 9))
def test_overviews_are_the_same_voxels_in_every_orientation(
    tmp_path: Path, shape: tuple[int, ...], turned: tuple, side: int
) -> None:
    values = RNG.random(shape).astype(np.float32)
    path = save(tmp_path / "scene.nii", values, affine_of(*turned))
    volume = Nifti(str(path), "scene", Wanted(("T1w",), "zyx", "RAS"))
    small = tuple(min(n, side) for n in volume.grid.shape)
    picks = [((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(volume.grid.shape, small, strict=True)]
    assert np.array_equal(volume.overview(small)[0], volume.read(volume.grid.box)[0][np.ix_(*picks)])


def test_staging_unpacks_once_and_pickles(tmp_path: Path) -> None:
    path = save(tmp_path / "scene.nii.gz", RNG.random(SHAPE).astype(np.float32))
    volume = Nifti(str(path), "scene", Wanted(("T1w",), "xyz"))
    staged = volume.stage(tmp_path / "staged")
    assert [file.stat().st_size for file in (tmp_path / "staged").iterdir()] == [volume.staged_bytes]
    assert staged.staged_bytes == 0
    (file,) = (tmp_path / "staged").iterdir()
    changed = file.stat().st_mtime_ns
    again = pickle.loads(pickle.dumps(volume.stage(tmp_path / "staged")))
    assert file.stat().st_mtime_ns == changed
    assert np.array_equal(again.read(again.grid.box), volume.read(volume.grid.box))
    assert staged.uri == str(path)
    plain = save(tmp_path / "plain.nii", RNG.random(SHAPE).astype(np.float32))
    source = Nifti(str(plain), "plain", Wanted(("T1w",), "xyz"))
    assert source.stage(tmp_path / "staged") is source


def test_damaged_volumes_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "scene.nii.gz", RNG.random((30, 30, 30)).astype(np.float32))
    whole = path.read_bytes()
    wanted = Wanted(("T1w",), "xyz")
    for cut in (10, 200, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:cut])
        with pytest.raises(SceneError):
            Nifti(str(path), "scene", wanted).stage(tmp_path / "staged")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(SceneError, match="damaged"):
        Nifti(str(path), "scene", wanted).stage(tmp_path / "staged")
    plain = tmp_path / "scene.nii"
    plain.write_bytes(gzip.decompress(whole)[:50_000])
    with pytest.raises(SceneError, match="50000 bytes of the 108352"):
        Nifti(str(plain), "scene", wanted)


def test_volumes_that_cannot_be_labelled_are_refused(tmp_path: Path) -> None:
    wanted = Wanted(("T1w",), "xyz", "RAS")
    for name, values, words in (
        ("complex", np.zeros(SHAPE, np.complex64), "complex64"),
        ("flat", np.zeros((5, 6), np.float32), "three spatial axes"),
        ("rgb", np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "voxels"),
    ):
        path = save(tmp_path / f"{name}.nii", values)
        with pytest.raises(SceneError, match=words):
            Nifti(str(path), name, wanted)
    with pytest.raises(CardError, match="'yx'"):
        Nifti(str(path), name, Wanted(("T1w",), "yx"))


def test_odd_headers_come_through_untouched(tmp_path: Path) -> None:
    """nibabel repairs what it reads; a mask must not: qfac 0, NaN in a transform not in use, a unit that is none."""
    values = RNG.random(SHAPE).astype(np.float32)
    path = save(tmp_path / "scene.nii", values, np.diag([2.0, 2, 2, 1]))
    raw = bytearray(path.read_bytes())
    header = np.frombuffer(raw, nib.nifti1.header_dtype, 1)[0]
    assert int(header["sform_code"]) > 0
    assert int(header["qform_code"]) == 0
    edited = nib.Nifti1Header(bytes(raw[:348]), check=False)
    edited["pixdim"][0], edited["quatern_b"], edited["xyzt_units"] = 0, np.nan, 7
    path.write_bytes(edited.binaryblock + raw[348:])
    volume = Nifti(str(path), "scene", Wanted(("T1w",), "xyz", "RAS"))
    labels = ArrayLabels((volume.read(volume.grid.box)[0] > 0.5).astype(np.uint8))
    (mask,) = volume.frame.write_labels(tmp_path / "mask.nii.gz", labels, LEGEND)
    volume.frame.verify(mask, labels)
    written = gzip.decompress(mask.read_bytes())[:348]
    for field in ("pixdim", "quatern_b", "xyzt_units", "srow_x"):
        one, two = (nib.Nifti1Header(block, check=False)[field] for block in (edited.binaryblock, written))
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes(), field
    with pytest.raises(ProductError, match="differs"):
        volume.frame.verify(mask, ArrayLabels(1 - labels.labels))
