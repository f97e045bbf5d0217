"""Windows in stages: the scores of one pass, wherever a network can be cut; and what stages cost.

Where channels are whole blocks the same bits come out; else ONNX Runtime may choose its kernel by the size of a chunk,
and the last bits differ.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import as_if_trained, save_local_unet
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.nets import BasicUNet
from test_graph import PooledUNet, SelfAttention, SqueezeExcite
from torch import nn

from segcore.box import Box
from segcore.errors import ModelError, PlanError
from segcore.grid import Grid
from segcore.model import load_segmenter
from segcore.model.card import load_card
from segcore.model.onnx import OnnxPart, OnnxSegmenter
from segcore.model.openvino import OpenVinoPart, OpenVinoSegmenter
from segcore.model.probe import noise
from segcore.model.staged import CroppedSegmenter, LoadPart, StagedSegmenter, find_crops
from segcore.model.stages import find_stages
from segcore.model.unet import UNet
from segcore.plan import make_plan
from segcore.spec import Cost, Sight, symmetric
from segcore.staging import ONE_PASS, Level, Part, Stages, Staging, chunks, reads, spans


class Residual(nn.Module):
    """Strided convolutions down, wide transposed ones and linear interpolation up, skips that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 5, 7, 2, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5), nn.SiLU())
        self.down = nn.Conv2d(5, 5, 3, 2, 1)
        self.deep = nn.Sequential(nn.ReLU(), nn.Conv2d(5, 5, 3, padding=2, dilation=2), nn.ReLU())
        self.up = nn.ConvTranspose2d(5, 5, 4, 2, 1)
        self.last = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), nn.Conv2d(5, 3, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.stem(x)
        skip = stem + self.block(stem)
        return self.last(skip + self.up(self.deep(self.down(skip))))


def export(module: nn.Module, path: Path, channels: int, ndim: int = 2) -> Path:
    """A module as ONNX, free in its spatial sizes, with some plumbing for shapes left."""
    named = {"x": {2 + axis: f"s{axis}" for axis in range(ndim)}}
    example = (torch.zeros(1, channels, *(64,) * ndim),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), example, path, dynamo=False, input_names=["x"], dynamic_axes=named)
    return path


def basic(dims: int, **changes: Any) -> nn.Module:
    arguments = {"features": (7, 8, 9, 10, 11, 7), "norm": "batch"} | changes
    return BasicUNet(spatial_dims=dims, in_channels=2, out_channels=3, **arguments)


def plain(dims: int, **changes: Any) -> nn.Module:
    return UNet(dims=dims, in_channels=2, classes=3, **changes)


def same(one: np.ndarray, two: np.ndarray, *, bits: bool = False) -> bool:
    return np.array_equal(one, two) if bits else bool(np.abs(one - two).max() <= 1e-5 * np.abs(two).max())


NETWORKS = {
    "blocks": (lambda: basic(2, features=(16, 16, 32, 32, 32, 16)), 2, 3),
    "basic 2-D": (lambda: basic(2), 2, 3),
    "basic 3-D": (lambda: basic(3), 3, 3),
    "transposed": (lambda: plain(2, widths=[7, 9, 11]), 2, 2),
    "upsampled": (lambda: plain(2, widths=[7, 9, 11, 9], decoder="upsample", kernel=5), 2, 3),
    "upsampled 3-D": (lambda: plain(3, widths=[7, 9, 8], decoder="upsample", norm=None), 3, 2),
    "VGG16": (lambda: plain(2, encoder="vgg16_bn", decoder_widths=[4, 4, 6, 6, 8]), 2, 3),
    "MobileNetV2": (lambda: plain(2, encoder="mobilenet_v2", decoder_widths=[4, 4, 6, 6, 8]), 2, 3),
    "residual": (Residual, 2, 2),
}


ENGINES = {"onnxruntime": (OnnxSegmenter, OnnxPart), "openvino": (OpenVinoSegmenter, OpenVinoPart)}


class Exported:
    """One of the networks in an engine, and what it says of noise in one pass."""

    def __init__(self, name: str, engine: str, folder: Path) -> None:
        make, self.dims, self.most = NETWORKS[name]
        self.path = export(as_if_trained(make()), folder / "net.onnx", 2, self.dims)
        load, self.load_part = ENGINES[engine]
        self.whole = load(self.path, 2)
        self.window = (160, 224) if self.dims == 2 else (48, 80, 64)
        self.image = noise((1, 2, *self.window))
        self.expected = self.whole(self.image)
        self.bits = name == "blocks"
        assert self.expected.std(axis=(0, *range(2, 2 + self.dims))).min() > 1e-3, "nothing comes through"

    def check(self, other: CroppedSegmenter | StagedSegmenter) -> None:
        """Another way to run it says the same of the whole, and of boxes of it."""
        assert same(other(self.image), self.expected, bits=self.bits)
        for wanted in (
            Box(tuple(n // 3 + 1 for n in self.window), tuple(n // 2 + 4 for n in self.window)),
            Box((0,) * self.dims, (1,) * self.dims),
            Box(tuple(n - 5 for n in self.window), self.window),
        ):
            at = (slice(None), slice(None), *wanted.slices())
            assert same(other(self.image, wanted)[at], self.expected[at], bits=self.bits), wanted


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_stages_say_what_one_pass_says(name: str, engine: str, tmp_path: Path) -> None:
    network = Exported(name, engine, tmp_path)
    chunk = (44 if network.dims == 2 else 28,) * network.dims
    for levels in range(1, network.most + 1):
        staging = Staging(levels, chunk)
        staged = StagedSegmenter(network.path, lambda: network.whole, network.load_part, 2, 2, staging)
        staged.prove(network.path)
        assert len(staged.stages.levels) == network.most
        network.check(staged)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_part_of_a_window_says_what_the_whole_says(name: str, engine: str, tmp_path: Path) -> None:
    network = Exported(name, engine, tmp_path)
    cropped = cropped_of(network.path, network.load_part)
    cropped.prove(network.path, network.whole)
    network.check(cropped)
    stages, window = cropped.cut.stages, network.window
    assert len(stages.levels) == network.most
    everything, nothing = Box.of(window), Box((0,) * network.dims, (1,) * network.dims)
    assert stages.work(window, everything, ONE_PASS) == stages.inner[0].work * math.prod(window)
    assert stages.work(window, nothing, ONE_PASS) < 0.99 * stages.work(window, everything, ONE_PASS)


def cropped_of(path: Path, load: LoadPart) -> CroppedSegmenter:
    cut, network = find_crops(path, 2, 2)
    return CroppedSegmenter(load(network, 2, False), cut)


def test_a_part_that_shows_too_little_is_found_out(tmp_path: Path) -> None:
    path = export(as_if_trained(plain(2, widths=[7, 9])), tmp_path / "net.onnx", 2)
    whole = OnnxSegmenter(path, 2)
    cropped = cropped_of(path, OnnxPart)
    cropped.prove(path, whole)
    stages = cropped.cut.stages
    short = replace(stages.levels[0], up_halo=((0, 0), (0, 0)))
    cropped.cut = replace(cropped.cut, stages=replace(stages, levels=(short,)))
    with pytest.raises(ModelError, match="other scores where only a part of a window rises"):
        cropped.prove(path, whole)


@pytest.mark.parametrize(("axes", "poolings", "convolutions"), [("yx", 1, 1), ("yx", 3, 2), ("zyx", 2, 1)])
def test_models_are_loaded_in_stages(axes: str, poolings: int, convolutions: int, tmp_path: Path) -> None:
    folder = save_local_unet(tmp_path / "model", axes, width=3, poolings=poolings, convolutions=convolutions)
    model = load_card(str(folder))
    staged = load_segmenter(model, 1, Staging(poolings, (40,) * len(axes)))
    image = noise((2, 1, *(56, 64, 48)[: len(axes)]))
    assert same(staged(image), load_segmenter(model, 1)(image))
    with pytest.raises(ModelError, match=f"has {poolings} that can be"):
        load_segmenter(model, 1, Staging(poolings + 1, (40,) * len(axes)))


@pytest.mark.parametrize("folder", ["land_unet", "tissue_unet"])
def test_packed_networks_have_stages(folder: str, request: pytest.FixtureRequest) -> None:
    model = load_card(str(request.getfixturevalue(folder)))
    channels, dims = len(model.card.channels), len(model.card.axes)
    staged = load_segmenter(model, 2, Staging(2, (32,) * dims))
    image = noise((1, channels, *(96, 80, 64)[:dims]))
    wanted = Box((30,) * dims, (50,) * dims)
    at = (slice(None), slice(None), *wanted.slices())
    assert same(staged(image, wanted)[at], load_segmenter(model, 2)(image)[at])


@pytest.mark.parametrize(
    "make",
    [
        lambda: plain(2, widths=[4, 4], norm="instance"),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), SqueezeExcite(), PooledUNet()),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), SelfAttention(), PooledUNet()),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()),
        lambda: basic(2, upsample="nontrainable"),
    ],
    ids=["instance norm", "squeeze-excite", "attention", "no pooling", "aligned corners"],
)
def test_what_cannot_be_cut_has_no_stages(make: Any, tmp_path: Path) -> None:
    assert find_stages(export(as_if_trained(make()), tmp_path / "net.onnx", 2), 2) is None


def test_all_parts_share_their_weights(tmp_path: Path) -> None:
    path = export(as_if_trained(plain(2, widths=[16, 64, 96])), tmp_path / "net.onnx", 2)
    cut = find_stages(path, 2)
    assert cut is not None
    assert cut.cropped is not None
    pieces = [*cut.down, *cut.up, *cut.inner, cut.cropped]
    assert len(pieces) == 8
    assert all(piece.weights is cut.cropped.weights for piece in pieces)
    assert all(len(piece.graph.SerializeToString()) < path.stat().st_size / 10 for piece in pieces)
    assert 0.9 * path.stat().st_size < len(cut.inner[0].file()) < 1.1 * path.stat().st_size
    assert cut.without_parts().stages == cut.stages


@pytest.mark.parametrize("side", ["down_halo", "up_halo"])
def test_a_halo_that_is_short_is_found_out(side: str, tmp_path: Path) -> None:
    path = export(as_if_trained(plain(2, widths=[7, 9])), tmp_path / "net.onnx", 2)
    staged = StagedSegmenter(path, lambda: OnnxSegmenter(path, 2), OnnxPart, 2, 2, Staging(1, (40, 40)))
    (level,) = staged.stages.levels
    assert getattr(level, side) == (({"down_halo": 2, "up_halo": 4}[side],) * 2,) * 2
    short = replace(level, **{side: tuple((before - 2, after) for before, after in getattr(level, side))})
    staged.stages = replace(staged.stages, levels=(short,))
    with pytest.raises(ModelError, match="other scores in chunks"):
        staged.prove(path)


@given(st.data())
def test_chunks_cover_what_is_wanted_once(data: st.DataObject) -> None:
    step = data.draw(st.integers(1, 3))
    length = step * data.draw(st.integers(1, 60))
    before, after = (step * data.draw(st.integers(0, 4)) for _ in range(2))
    size = before + after + step * data.draw(st.integers(1, 20)) + data.draw(st.integers(0, step - 1))
    start = step * data.draw(st.integers(0, length // step - 1))
    stop = step * data.draw(st.integers(start // step + 1, length // step))
    found = spans(length, start, stop, (before, after), size, step)
    assert len({b - a for a, b, _, _ in found}) == 1
    assert (found[0][2], found[-1][3]) == (start, stop)
    assert all(one[3] == two[2] for one, two in pairwise(found))
    assert reads((length,), Box((start,), (stop,)), ((before, after),), (step,), (size,)) == (
        found[0][1] - found[0][0],
        len(found),
    )
    for a, b, first, last in found:
        assert 0 <= a <= first < last <= b <= length
        assert b - a <= size
        assert a % step == b % step == 0
        assert a <= max(0, first - before)
        assert b >= min(length, last + after)


def test_chunks_of_nothing_but_halo_are_refused() -> None:
    with pytest.raises(PlanError, match="take larger ones"):
        chunks((64, 64), Box.of((64, 64)), ((4, 4), (4, 4)), (2, 2), (8, 8))


LEVEL = Level((2, 2), ((2, 2), (2, 2)), ((4, 4), (4, 4)), Part(10e3, 272), Part(39e3, 560), 32, 32)
STAGES = Stages((LEVEL, LEVEL), (Part(76e3, 528), Part(149e3, 640), Part(400e3, 1152)), 4, 3)


@given(st.integers(40, 400), st.integers(1, 40), st.sampled_from([64, 128, 256]), st.integers(0, 2))
def test_what_stages_cost_grows_with_what_is_done(n: int, more: int, chunk: int, levels: int) -> None:
    small, large = (4 * n, 4 * n), (4 * (n + more), 4 * n)
    staging = Staging(levels, (chunk, chunk))
    # Chunks are of one size, and so larger in an image that takes fewer of them.
    assert STAGES.memory(small, Box.of(small), staging) <= 1.4 * STAGES.memory(large, Box.of(large), staging)
    assert STAGES.work(small, Box.of(small), staging) <= STAGES.work(large, Box.of(large), staging)
    part = Box((n, n), (2 * n, 2 * n))
    assert STAGES.memory(small, part, staging) <= STAGES.memory(small, Box.of(small), staging)
    assert STAGES.work(small, part, staging) <= STAGES.work(small, Box.of(small), staging)


@pytest.mark.parametrize("memory", [700 * 2**20, 3 * 2**30])
def test_chunks_are_planned_only_where_they_can_be_run(memory: int) -> None:
    grid, sight = Grid("yx", (8000, 8000)), Sight((16, 16), symmetric((92, 92)))
    cost = Cost(4, 3, 640, "openvino")
    stages = replace(STAGES, levels=tuple(replace(level, rise=20e3) for level in STAGES.levels))
    free = make_plan(grid, grid.shape, sight, cost, memory, stages=stages)
    bound = make_plan(grid, grid.shape, sight, cost, memory, stages=stages, in_chunks=False)
    assert bound.staging == ONE_PASS
    assert free.memory <= memory
    assert bound.memory <= memory
    assert free.effort("openvino") <= bound.effort("openvino")


def test_choices_can_be_told_apart() -> None:
    window = (2048, 2048)
    wanted = Box.of(window).grow(((-96, -96),) * 2)
    found = list(STAGES.choices(window))
    assert found[0] == ONE_PASS
    assert {staging.levels for staging in found} == {0, 1, 2}
    memory = [STAGES.memory(window, wanted, staging) for staging in found]
    assert min(memory) < memory[0] / 3
    assert all(STAGES.work(window, wanted, s) < 2 * STAGES.work(window, wanted, found[0]) for s in found)
