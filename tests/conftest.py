"""What the tests share: real scenes from installed packages, small real networks, and small scenes that are arrays."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from segcore import demo
from segcore.execute import Workers
from segcore.files import sha256_of
from segcore.lock import locked
from segcore.model.card import Card
from segcore.model.pack import pack
from segcore.model.unet import UNet

# What a test learns about this machine goes with it.
os.environ["SEGFLOW_CACHE"] = tempfile.mkdtemp(prefix="segflow-cache-")
atexit.register(shutil.rmtree, os.environ["SEGFLOW_CACHE"], ignore_errors=True)

settings.register_profile(
    "segflow",
    deadline=None,
    max_examples=60,
    derandomize=bool(os.environ.get("CI")),  # a change lands or not by its own merits; people explore
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("segflow")

#: Modules that take minutes, the longest first.
_LONGEST = ["pack", "real", "flow", "prefect_server", "command", "seams", "stages", "isolation", "scene", "probe"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long is begun first: else one of the workers is alone with it in the end."""
    order = {f"test_{name}": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def card(**changes: Any) -> Card:
    """A card for arrays: one channel, three classes, local, stride 1, reach 3; `changes` replace fields."""
    axes = changes.pop("axes", "yx")
    fields = {
        "name": "toy",
        "version": "1",
        "license": "Apache-2.0",
        "citation": "none",
        "artifacts": [{"format": "onnx", "path": "toy.onnx", "sha256": "0" * 64}],
        "axes": axes,
        "channels": [{"name": "value"}],
        "stride": [1] * len(axes),
        "local": True,
        "reach": [3] * len(axes),
        "classes": [{"index": i, "name": f"class {i}", "color": [80 * i, 40, 200]} for i in range(3)],
    }
    return Card.model_validate(fields | changes)


@pytest.fixture
def unproved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, which is not there yet: nothing was proved of any network."""
    monkeypatch.setenv("SEGFLOW_CACHE", str(tmp_path / "nothing-noted"))
    return tmp_path / "nothing-noted"


@pytest.fixture(scope="session")
def landsat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A STAC Item of the real, cloudy Landsat 8 chip, 603 x 627 pixels."""
    return demo.landsat_item(tmp_path_factory.mktemp("landsat"))


@pytest.fixture(scope="session")
def sentinel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A STAC 1.1 Item of the real Sentinel-2 chip, 1947 x 1933 pixels at 10 m, its short-wave infrared at 20 m."""
    return demo.sentinel_item(tmp_path_factory.mktemp("sentinel"))


@pytest.fixture(scope="session")
def head() -> Path:
    """A real T1-weighted MRI of a whole head, 176 x 256 x 256 voxels."""
    return demo.head_mri()


@pytest.fixture(scope="session")
def mni() -> Path:
    """The MNI152 T1 template, 197 x 233 x 189 voxels of 1 mm, sform only."""
    return demo.installed("nilearn", "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    with Workers() as workers:
        yield workers


@pytest.fixture
def run_segflow(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The installed command, in a process of its own, without a server."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        environment |= {"PREFECT_HOME": str(tmp_path / "prefect")} | options.pop("env", {})
        command = [segflow_command(), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=300, check=False, **options
        )

    return run


def segflow_command() -> str:
    """Path of the installed `segflow`."""
    return str(Path(sys.executable).with_name("segflow"))


def save_local_unet(
    folder: Path,
    axes: str,
    channels: tuple[str, ...] = ("value",),
    width: int = 4,
    *,
    poolings: int = 1,
    convolutions: int = 1,
    reach: int | None = None,
    deepest: int | None = None,
) -> Path:
    """A model folder with a real, small, local U-Net in ONNX, of any size of input: weights are random but fixed.

    Its convolutions see 2 x (1 + 2 + 4 + ...) pixels on the way down and up, and 2^poolings at the bottom, each time
    their number; pooling and upsampling add at most the stride minus one. `reach` overrides that sum in the card, and
    `deepest` the channels at the bottom.
    """
    dims, rng = len(axes), np.random.default_rng(7)
    weights: list[onnx.TensorProto] = [numpy_helper.from_array(np.array([1, 1] + [2] * dims, np.float32), "scales")]
    nodes: list[onnx.NodeProto] = []

    def node(kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"n{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def convolve(source: str, inputs: int, outputs: int = width, name: str = "") -> str:
        kernel = rng.standard_normal((outputs, inputs, *(3,) * dims)) * np.sqrt(2 / (inputs * 3**dims))
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"w{len(nodes)}"))
        return node("Conv", source, weights[-1].name, name=name, pads=[1] * (2 * dims))

    def level(source: str, inputs: int, outputs: int = width) -> str:
        for i in range(convolutions):
            source = node("Relu", convolve(source, outputs if i else inputs, outputs))
        return source

    skips, last = [], level("x", len(channels))
    bottom = deepest or width
    for depth in range(1, poolings + 1):
        skips.append(last)
        pooled = node("MaxPool", last, kernel_shape=[2] * dims, strides=[2] * dims)
        last = level(pooled, width, bottom if depth == poolings else width)
    for depth, skip in reversed(list(enumerate(skips))):
        risen = node("Resize", last, "", "scales", mode="nearest", coordinate_transformation_mode="asymmetric",
                     nearest_mode="floor")  # fmt: skip
        last = node("Concat", skip, risen, axis=1)
        inputs = width + (bottom if depth == poolings - 1 else width)
        for i in range(convolutions):
            final = depth == 0 and i == convolutions - 1
            last = convolve(last, inputs, 3 if final else width, "y" if final else "")
            last, inputs = (last if final else node("Relu", last)), width
    stride = 2**poolings
    seen = convolutions * (2 * (stride - 1) + stride) + stride - 1 if reach is None else reach
    free = [f"s{i}" for i in range(dims)]
    graph = helper.make_graph(
        nodes,
        "unet",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", len(channels), *free])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, *free])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "unet.onnx")
    described = card(
        axes=axes,
        name=folder.name,
        artifacts=[{"format": "onnx", "path": "unet.onnx", "sha256": sha256_of(folder / "unet.onnx")}],
        channels=[{"name": name} for name in channels],
        stride=[stride] * dims,
        reach=[seen] * dims,
        activation="softmax",
        scaling=[{"step": "standardise"}],
        bytes_per_pixel=200,
    )
    (folder / "card.json").write_text(described.model_dump_json(indent=2))
    return folder


def as_if_trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """A network with fixed random weights, the statistics of its batch norms among them, in evaluation mode."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.3, 1)
    return module.eval()


def decisive(module: UNet) -> nn.Module:
    """The same, with scores that are far apart and classes that all occur."""
    as_if_trained(module)
    with torch.no_grad():
        scores = module(torch.randn(1, module.in_channels, *(4 * n for n in module.stride)))
        spread = 2 / scores.std(dim=tuple(range(2, scores.ndim))).flatten()
        module.head.weight.mul_(spread.view(-1, *(1,) * (module.head.weight.ndim - 1)))
        module.head.bias.mul_(spread)
        module.head.bias.sub_(module(torch.randn(1, module.in_channels, *(4 * n for n in module.stride))).mean(
            dim=(0, *range(2, scores.ndim))))  # fmt: skip
    return module


def draft(
    axes: str = "yx", channels: Sequence[str] = ("c0", "c1"), classes: int = 3, **changes: object
) -> dict[str, Any]:
    """What a card says that cannot be measured."""
    fields = {
        "name": "packed",
        "version": "1",
        "license": "Apache-2.0",
        "citation": "none",
        "axes": axes,
        "channels": [{"name": name} for name in channels],
        "classes": [{"index": i, "name": f"class {i}", "color": [60 * i, 120, 255 - 60 * i]} for i in range(classes)],
        "activation": "softmax",
    }
    return fields | changes


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A model folder that one of the processes that run tests makes for all of them."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "models" / name
    with locked(shared / f"{name}.lock", 600):
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def land_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed U-Net of four poolings for three bands of Sentinel-2: local, reach 94."""
    about = draft(channels=("green", "red", "nir"), scaling=[{"step": "standardise"}])

    def make(folder: Path) -> None:
        pack(decisive(UNet(dims=2, in_channels=3, classes=3, widths=[6, 8, 8, 8, 8])), about, folder)

    return _made_once(tmp_path_factory, "land", make)


@pytest.fixture(scope="session")
def tissue_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed 3-D U-Net of three poolings for a T1 volume: local, reach 46."""
    about = draft("zyx", ("T1w",), scaling=[{"step": "standardise"}])

    def make(folder: Path) -> None:
        pack(decisive(UNet(dims=3, in_channels=1, classes=3, widths=[4, 4, 6, 6])), about, folder)

    return _made_once(tmp_path_factory, "tissue", make)
