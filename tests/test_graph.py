"""The reach that is read from an ONNX graph: no less than what the network shows, and no more where it is exact."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from segcore.errors import ModelError
from segcore.model.graph import OnnxGraph
from segcore.model.marking import RULES

Marks = NDArray[np.bool_]
F = TensorProto.FLOAT


def export(module: nn.Module, path: Path, channels: int, ndim: int = 2, *, dynamo: bool = False) -> Path:
    """A module as ONNX, free in its spatial sizes. Both exporters warn of each other."""
    module.eval()
    example = (torch.zeros(1, channels, *(48,) * ndim),)
    axes = range(2, 2 + ndim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            free = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),)
            torch.onnx.export(module, example, path, dynamo=True, dynamic_shapes=free, verbose=False)
        else:
            named = {"x": {axis: f"s{axis}" for axis in axes}}
            torch.onnx.export(module, example, path, dynamo=False, input_names=["x"], dynamic_axes=named)
    return path


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Any] | None = None,
    *,
    opset: int = 17,
    shape: Sequence[int | str | None] = (1, 4, "h", "w"),
    **more: Any,
) -> Path:
    """Nodes from "x" to "y" as an ONNX file."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", more.pop("kind", F), shape), *more.pop("inputs", [])],
        [helper.make_tensor_value_info("y", more.pop("result", F), None), *more.pop("outputs", [])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    domains = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in more.pop("domains", []))]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10, **more), path)
    return path


def scattered(shape: tuple[int, ...], margin: int = 0, seed: int = 1) -> Marks:
    """A few marked pixels."""
    marked = np.zeros(shape, bool)
    inner = tuple(slice(margin, n - margin) for n in shape)
    marked[inner] = np.random.default_rng(seed).random(marked[inner].shape) < 5 / marked[inner].size
    assert marked.any()
    return marked


def cell(shape: tuple[int, ...], start: int, size: int) -> Marks:
    marked = np.zeros(shape, bool)
    marked[tuple(slice(start, start + size) for _ in shape)] = True
    return marked


def poisoned(module: nn.Module, marked: Marks, channels: int) -> Marks:
    """Outputs that a NaN in the marked pixels reaches in torch."""
    image = torch.rand(1, channels, *marked.shape, generator=torch.Generator().manual_seed(0))
    image[..., torch.from_numpy(marked)] = torch.nan
    with torch.inference_mode():
        return np.isnan(module.eval()(image).numpy()).any(axis=(0, 1))


def changed(path: Path, marked: Marks, channels: int = 4) -> Marks:
    """Outputs that change with the marked pixels in ONNX Runtime, in any of a few trials."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(3)
    seen = None
    for _ in range(6):
        one, two = (rng.random((1, channels, *marked.shape), np.float32) * 2 - 1 for _ in range(2))
        two = np.where(marked, two, one)
        outs = [session.run(None, {"x": image})[0].astype(np.float64) for image in (one, two)]
        differs = (outs[0] != outs[1]).any(axis=(0, 1))
        seen = differs if seen is None else seen | differs
    assert seen is not None
    return seen


class Skip(nn.Module):
    """A U-Net of one level whose skip is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.up = nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(7, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([x, self.up(self.down(x))], 1))


class ChannelsLast(nn.Module):
    """A layer norm and a linear layer over the channels of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Conv2d(4, 4, 3, padding=1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.local(x)
        return y * torch.sigmoid(self.gate(y))


class SelfAttention(nn.Module):
    """Each pixel attends to each."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.local(x).flatten(2)
        weights = torch.softmax(y.transpose(1, 2) @ y / 2, -1)
        return x + (y @ weights.transpose(1, 2)).reshape(x.shape)


class PooledUNet(nn.Module):
    """A U-Net of three poolings with interpolation."""

    def __init__(self, pool: type[nn.Module] = nn.MaxPool2d) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.Sequential(pool(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(3))
        self.rise = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = [self.first(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        y = levels.pop()
        for up in self.up:
            y = up(torch.cat([levels.pop(), self.rise(y)], 1))
        return y


LOCAL = {
    "conv 3": lambda: nn.Conv2d(4, 3, 3, padding=1),
    "conv 2": lambda: nn.Conv2d(4, 3, 2),
    "conv 4, stride 2": lambda: nn.Conv2d(4, 3, 4, stride=2, padding=1),
    "conv 2, same": lambda: nn.Conv2d(4, 3, 2, padding="same"),
    "conv 3, dilated": lambda: nn.Conv2d(4, 3, 3, dilation=3, padding=3),
    "conv 5 x 1": lambda: nn.Conv2d(4, 3, (5, 1), stride=(1, 3)),
    "conv, grouped": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.GELU(), nn.Conv2d(8, 2, 1, groups=2)),
    "conv, padded on one side": lambda: nn.Sequential(nn.ZeroPad2d((2, 0, 0, 3)), nn.Conv2d(4, 3, 3)),
    "conv, reflecting": lambda: nn.Conv2d(4, 3, 5, padding=2, padding_mode="reflect"),
    "conv, replicating": lambda: nn.Conv2d(4, 3, 5, padding=2, padding_mode="replicate"),
    "max pool 2": lambda: nn.MaxPool2d(2),
    "max pool 3, ceiling": lambda: nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    "average pool 2": lambda: nn.AvgPool2d(2),
    "average pool 3": lambda: nn.AvgPool2d(3, stride=2, padding=1),
    "transposed conv 2": lambda: nn.ConvTranspose2d(4, 3, 2, stride=2),
    "transposed conv 3": lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
    "nearest": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
    "pixel shuffle": lambda: nn.PixelShuffle(2),
    "pixel unshuffle": lambda: nn.PixelUnshuffle(2),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.PReLU(4), nn.Hardswish(), nn.Dropout(0.5)),
    "skip": Skip,
    "channels last": ChannelsLast,
    "channel softmax": lambda: nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Softmax(1)),
    "instance norm": lambda: nn.InstanceNorm2d(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "squeeze-excite": SqueezeExcite,
    "self-attention": SelfAttention,
}


@pytest.mark.parametrize("name", LOCAL)
def test_footprints_are_those_of_nan_in_torch(name: str, tmp_path: Path) -> None:
    module = LOCAL[name]()
    graph = OnnxGraph(export(module, tmp_path / "net.onnx", 4))
    for marked in (scattered((24, 28)), cell((24, 28), 9, 2), cell((24, 28), 0, 1), np.zeros((24, 28), bool)):
        np.testing.assert_array_equal(graph.footprint(marked), poisoned(module, marked, 4))


def test_footprint_of_linear_interpolation(tmp_path: Path) -> None:
    # At the border torch multiplies NaN by a weight of zero, on which nothing depends.
    module = PooledUNet(nn.AvgPool2d)
    graph = OnnxGraph(export(module, tmp_path / "net.onnx", 4))
    marked = cell((112, 120), 48, 8)
    np.testing.assert_array_equal(graph.footprint(marked), poisoned(module, marked, 4))
    rise = OnnxGraph(export(module.rise, tmp_path / "rise.onnx", 4))
    assert np.array_equal(rise.footprint(cell((4, 4), 0, 1)), cell((8, 8), 0, 3))


@pytest.mark.parametrize("ndim", [1, 3])
def test_any_number_of_axes(ndim: int, tmp_path: Path) -> None:
    conv, pool, norm = (getattr(nn, f"{name}{ndim}d") for name in ("Conv", "MaxPool", "InstanceNorm"))
    local = nn.Sequential(conv(1, 2, 3, padding=1), pool(2), conv(2, 1, 3, padding=1))
    shape = (16,) * ndim
    marked = cell(shape, 7, 1)
    graph = OnnxGraph(export(local, tmp_path / "net.onnx", 1, ndim))
    assert (graph.channels, graph.spatial) == (1, (None,) * ndim)
    assert np.array_equal(graph.footprint(marked), poisoned(local, marked, 1))
    assert graph.flooding(marked) == ()
    graph = OnnxGraph(export(nn.Sequential(local, norm(1)), tmp_path / "norm.onnx", 1, ndim))
    assert graph.footprint(marked).all()
    assert [line.split()[0] for line in graph.flooding(marked)] == ["InstanceNormalization:"]


def node(kind: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs or ("x",)), ["y"], f"the {kind}", **attributes)


def conv(source: str, result: str, weights: str = "w") -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weights], [result], f"conv {result}", pads=[1, 1, 1, 1])


W33 = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32)
W11 = W33[:, :, :1, :1]
TWICE = np.array([1, 1, 2, 2], np.float32)
ONES = np.ones(4, np.float32)
UP = {"mode": "cubic", "coordinate_transformation_mode": "half_pixel"}
#: Opset, a node, constants, and whether the bound is known to be exact.
OPERATORS: dict[str, tuple[int, onnx.NodeProto, dict[str, Any], bool]] = {
    "conv, padded to the same size": (
        9,
        node("Conv", "x", "w", auto_pad="SAME_UPPER", strides=[2, 2]),
        {"w": W33[..., :2, :2]},
        True,
    ),
    "conv, padded on one side": (17, node("Conv", "x", "w", "b", pads=[2, 0, 0, 1]), {"w": W33, "b": ONES}, True),
    "resize, nearest": (13, node("Resize", "x", "", "s", mode="nearest"), {"s": TWICE}, True),
    "resize, opset 10": (10, node("Resize", "x", "s", mode="linear"), {"s": TWICE}, True),
    "resize, smaller": (
        18,
        node("Resize", "x", "", "s", mode="linear", antialias=1),
        {"s": TWICE / np.float32([1, 1, 6, 5])},
        True,
    ),
    "resize, cubic": (17, node("Resize", "x", "", "s", **UP), {"s": TWICE}, False),
    "resize, cubic, sizes": (
        18,
        node("Resize", "x", "", "", "n", **UP, exclude_outside=1),
        {"n": [1, 4, 9, 40]},
        False,
    ),
    "upsample": (9, node("Upsample", "x", "s", mode="nearest"), {"s": TWICE}, True),
    "pad with a value": (9, node("Pad", "x", pads=[0, 0, 1, 2, 0, 0, 3, 0], value=5.0), {}, True),
    "pad with an operand": (13, node("Pad", "x", "p", "v"), {"p": [0, 0, 1, 2, 0, 0, -3, 0], "v": np.float32(5)}, True),
    "pad by mirroring": (18, node("Pad", "x", "p", "", "a", mode="reflect"), {"p": [1, 2, 3, 4], "a": [2, 3]}, True),
    "larger constant": (17, node("Mul", "x", "c"), {"c": np.ones((1, 4, 18, 20), np.float32)}, True),
    "clip": (13, node("Clip", "x", "", "m"), {"m": np.float32(0.9)}, False),
    "choice": (17, node("Where", "c", "x", "z"), {"c": np.ones((18, 20), bool), "z": np.float32(0)}, True),
    "split": (13, node("Slice", "x", "b", "e", "a"), {"b": [1], "e": [9], "a": [2]}, True),
    "gather": (13, node("Gather", "x", "i", axis=3), {"i": np.arange(19, -1, -1)}, True),
    "tile": (13, node("Tile", "x", "r"), {"r": [1, 1, 2, 1]}, True),
    "depth to space": (13, node("DepthToSpace", "x", blocksize=2, mode="CRD"), {}, True),
    "cumulative sum": (14, node("CumSum", "x", "a", reverse=1), {"a": 3}, True),
    "transposed": (9, node("Transpose", "x", perm=[0, 1, 3, 2]), {}, True),
    "mean, attribute": (13, node("ReduceMean", axes=[1]), {}, True),
    "mean, operand": (18, node("ReduceMean", "x", "a"), {"a": [1, 3]}, True),
    "sum, attribute": (11, node("ReduceSum", axes=[3]), {}, True),
    "sum, operand": (13, node("ReduceSum", "x", "a"), {"a": [3]}, True),
    "norm": (18, node("ReduceL2", "x", "a"), {"a": [2]}, True),
    "softmax of all before opset 13": (11, node("Softmax"), {}, True),
    "softmax of rows": (13, node("Softmax"), {}, True),
    "log-softmax of channels": (13, node("LogSoftmax", axis=1), {}, True),
    "instance norm": (9, node("InstanceNormalization", "x", "s", "s"), {"s": ONES}, True),
    "layer norm of rows": (17, node("LayerNormalization", "x", "s", axis=-1), {"s": np.ones(20, np.float32)}, True),
    "layer norm of all": (17, node("LayerNormalization", "x", "s", axis=1), {"s": np.float32([[[1]]])}, True),
    "group norm": (21, node("GroupNormalization", "x", "s", "s", num_groups=2), {"s": ONES}, True),
    "batch norm in training": (
        15,
        helper.make_node("BatchNormalization", ["x", *"ssss"], ["y", "m", "v"], training_mode=1),
        {"s": ONES},
        True,
    ),
    "mean-variance norm": (13, node("MeanVarianceNormalization"), {}, True),
    "Lp norm": (9, node("LpNormalization", axis=2), {}, True),
    "local response norm": (13, node("LRN", size=3), {}, True),
    "Lp pooling": (17, node("LpPool", kernel_shape=[3, 3], strides=[2, 2], p=3), {}, True),
    "average pooling, dilated": (
        19,
        node("AveragePool", kernel_shape=[2, 2], dilations=[3, 2], count_include_pad=1, pads=[1, 1, 0, 0]),
        {},
        True,
    ),
    "global pooling": (9, node("GlobalAveragePool"), {}, True),
    "product with a constant": (9, node("MatMul", "x", "w"), {"w": np.eye(20, dtype=np.float32)}, False),
    "product with itself": (13, node("Einsum", "x", "x", equation="nchw,ncHw->nchH"), {}, True),
    "product from the left": (13, node("Einsum", "w", "x", equation="kc,nchw->nkhw"), {"w": W11[..., 0, 0]}, True),
    "scatter": (16, node("ScatterND", "c", "i", "x"), {"c": np.zeros((3, 4, 18, 20), np.float32), "i": [[2]]}, True),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_changes_outside_of_the_footprint(name: str, tmp_path: Path) -> None:
    opset, kind, constants, exact = OPERATORS[name]
    path = save(tmp_path / "net.onnx", [kind], constants, opset=opset)
    graph = OnnxGraph(path)
    for seed in range(4):
        marked = scattered((18, 20), seed=seed)
        seen, bound = changed(path, marked), graph.footprint(marked)
        assert not (seen & ~bound).any()
        assert not exact or np.array_equal(seen, bound)


STACK = st.lists(
    st.one_of(
        st.tuples(st.just("conv"), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.integers(0, 3)),
        st.tuples(st.just("pool"), st.integers(2, 4), st.integers(1, 3)),
        st.tuples(st.just("mean"), st.integers(2, 4), st.integers(1, 3)),
        st.tuples(st.just("rise"), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1)),
    ),
    min_size=1,
    max_size=5,
)
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "conv": lambda size, stride, dilation, pad: nn.Conv1d(2, 2, size, stride, pad, dilation),
    "pool": lambda size, stride: nn.MaxPool1d(size, stride, size // 2),
    "mean": lambda size, stride: nn.AvgPool1d(size, stride, size // 2, ceil_mode=True),
    "rise": lambda size, stride, pad: nn.ConvTranspose1d(2, 2, size + pad, stride, pad),
}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=STACK, start=st.integers(0, 60), size=st.integers(1, 4))
def test_footprints_of_any_stack(layers: list[Any], start: int, size: int, tmp_path: Path) -> None:
    module = nn.Sequential(*(LAYERS[kind](*arguments) for kind, *arguments in layers))
    marked = cell((64,), start, size)
    graph = OnnxGraph(export(module, tmp_path / "net.onnx", 2, 1))
    try:
        expected = poisoned(module, marked, 2)
    except RuntimeError:  # nothing is left of so small an image
        reject()
    np.testing.assert_array_equal(graph.footprint(marked), expected)


def test_marks_neither_vanish_nor_grow(tmp_path: Path) -> None:
    nodes = [conv(f"t{i}" if i else "x", f"t{i + 1}" if i < 39 else "y") for i in range(40)]
    for scale in (1e-30, 0, 1e30):
        graph = OnnxGraph(save(tmp_path / "net.onnx", nodes, {"w": W33 * np.float32(scale)}))
        assert np.array_equal(graph.footprint(cell((100, 100), 50, 1)), cell((100, 100), 10, 81))


def test_every_kind_that_is_marked_exists() -> None:
    assert [kind for kind in RULES if not onnx.defs.has(kind)] == []


def test_matrix_products_of_all_pixels_see_all(tmp_path: Path) -> None:
    sizes = {"m": [1, 1, 6, 6], "w": np.full((36, 144), 1e-30, np.float32), "b": np.ones(36, np.float32)}
    nodes = [
        helper.make_node("Flatten", ["x"], ["t"]),
        helper.make_node("Gemm", ["t", "w", "b"], ["u"], "dense", transB=1, alpha=-1e-30),
        helper.make_node("Reshape", ["u", "m"], ["y"]),
    ]
    for opset in (9, 13):
        graph = OnnxGraph(save(tmp_path / "net.onnx", nodes, sizes, opset=opset, shape=(1, 4, 6, 6)))
        assert graph.footprint(cell((6, 6), 2, 1)).all()
        assert graph.flooding(cell((6, 6), 2, 1)) == ("Gemm: 1 node, dense",)


def test_quantised_networks_are_bounded(tmp_path: Path) -> None:
    small, zero = np.float32(0.1), np.int8(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        conv("xd", "c", "wd"),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"]),
        helper.make_node("QLinearConv", ["cq", "s", "z", "w", "s", "z", "s", "z"], ["q"], pads=[1, 1, 1, 1]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    for width in (4, 24):
        weights = np.ones((width, width, 3, 3), np.int8)
        path = save(tmp_path / "net.onnx", nodes, {"w": weights, "s": small, "z": zero}, shape=(1, width, "h", "w"))
        graph = OnnxGraph(path)
        assert np.array_equal(graph.footprint(cell((20, 20), 9, 1)), cell((20, 20), 7, 5))
        assert graph.parameters == weights.size


def test_half_precision_inside_is_bounded(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(4, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 2, 3, padding=1)).half()

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.half()).float()

    graph = OnnxGraph(export(Cast(), tmp_path / "net.onnx", 4))
    assert np.array_equal(graph.footprint(cell((20, 20), 9, 1)), cell((20, 20), 7, 5))
    assert graph.parameters == sum(p.numel() for p in module.parameters())


def test_what_cannot_be_told_apart_counts_as_everything(tmp_path: Path) -> None:
    flat = [helper.make_node("Reshape", ["x", "n"], ["t"]), helper.make_node("Reshape", ["u", "m"], ["y"])]
    sizes = {"n": [1, 4, -1], "m": [1, 4, 6, 6]}
    attention = helper.make_node("Attention", ["t", "t", "t"], ["u"], "heads", q_num_heads=6, kv_num_heads=6)
    marked = cell((6, 6), 2, 1)
    path = save(tmp_path / "a.onnx", [flat[0], attention, flat[1]], sizes, opset=23, shape=(1, 4, 6, 6))
    assert OnnxGraph(path).footprint(marked).all()
    assert OnnxGraph(path).flooding(marked) == ("Attention: 1 node, heads",)
    gates = {"w": np.ones((1, 144, 36), np.float32), "r": np.ones((1, 144, 36), np.float32)}
    nodes = [
        flat[0],
        helper.make_node("LSTM", ["t", "w", "r"], ["u"], "lstm", hidden_size=36),
        flat[1],
    ]
    path = save(tmp_path / "r.onnx", nodes, sizes | gates, shape=(1, 4, 6, 6))
    assert OnnxGraph(path).footprint(marked).all()
    assert OnnxGraph(path).flooding(marked) == ("LSTM: 1 node, lstm",)


UNBOUNDED: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], str]] = {
    "NonZero": (
        [helper.make_node("NonZero", ["x"], ["i"], "n"), node("Cast", "i", to=F)],
        {},
        "operator NonZero .node n",
    ),
    "TopK": ([helper.make_node("TopK", ["x", "k"], ["y", "i"], "best")], {"k": [2]}, "operator TopK .node best"),
    "indices of max pooling": (
        [helper.make_node("MaxPool", ["x"], ["p", "i"], "m", kernel_shape=[2, 2]), node("Cast", "i", to=F)],
        {},
        "operator MaxPool .node m.* more than its first output",
    ),
    "size from values": (
        [
            helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
            helper.make_node("Cast", ["s"], ["k"], to=TensorProto.INT64),
            helper.make_node("Unsqueeze", ["k", "z"], ["n"]),
            node("Expand", "one", "n"),
        ],
        {"z": [0], "one": np.float32(1)},
        "operator Expand .* operand 1 depends",
    ),
    "cropping": (
        [node("Resize", "x", "r", "s", mode="linear", coordinate_transformation_mode="tf_crop_and_resize")],
        {"r": np.float32([0, 0, 0, 0, 1, 1, 0.5, 0.5]), "s": TWICE},
        "operator Resize .*crops",
    ),
    "contrib": (
        [helper.make_node("Gelu", ["x"], ["y"], "g", domain="com.microsoft")],
        {},
        "com.microsoft.Gelu .node g",
    ),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_the_reach_of_these_is_refused(name: str, tmp_path: Path) -> None:
    nodes, constants, message = UNBOUNDED[name]
    graph = OnnxGraph(save(tmp_path / "net.onnx", nodes, constants, domains=["com.microsoft"]))
    for ask in (graph.footprint, graph.flooding):
        with pytest.raises(ModelError, match=message):
            ask(cell((8, 8), 3, 1))


def test_branches_on_the_image_are_refused_and_those_on_constants_are_not(tmp_path: Path) -> None:
    def branch(source: str, result: str) -> onnx.GraphProto:
        info = helper.make_tensor_value_info(result, F, None)
        return helper.make_graph([helper.make_node("Identity", [source], [result])], result, [], [info])

    def choose(source: str) -> onnx.NodeProto:
        branches = {"then_branch": branch(source, "then"), "else_branch": branch("c", "else")}
        return helper.make_node("If", ["yes"], ["v"], "if", **branches)

    constants = {"yes": True, "c": np.float32(1)}
    graph = OnnxGraph(save(tmp_path / "c.onnx", [choose("c"), node("Add", "x", "v")], constants))
    assert np.array_equal(graph.footprint(cell((8, 8), 3, 1)), cell((8, 8), 3, 1))
    graph = OnnxGraph(save(tmp_path / "x.onnx", [choose("x"), node("Add", "v", "c")], constants))
    with pytest.raises(ModelError, match=r"operator If .node if"):
        graph.footprint(cell((8, 8), 3, 1))


@pytest.mark.parametrize("dynamo", [False, True])
def test_monai_with_batch_norm_is_local_and_with_instance_norm_is_not(dynamo: bool, tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    basic = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": (4,) * 6}
    net = nets.BasicUNet(**basic, norm="batch")
    graph = OnnxGraph(export(net, tmp_path / "net.onnx", 1, dynamo=dynamo))
    marked = cell((256, 256), 112, 16)
    seen = graph.footprint(marked)
    np.testing.assert_array_equal(seen, poisoned(net, marked, 1))
    rows = np.flatnonzero(seen.any(axis=1))
    assert (112 - rows[0], rows[-1] - 127) == (94, 94)
    assert graph.flooding(marked) == ()
    assert graph.trace((64, 96)).downsampling == (16, 16)
    if dynamo:
        return  # both exporters write the same nodes for the norm
    net = nets.BasicUNet(**basic, norm=("instance", {"affine": True}))
    graph = OnnxGraph(export(net, tmp_path / "net.onnx", 1))
    assert graph.footprint(marked).all()
    (line,) = graph.flooding(marked)
    assert line.startswith("InstanceNormalization: 18 nodes, first /conv_0/conv_0/adn/N/InstanceNormalization")


@pytest.mark.parametrize("dynamo", [False, True])
def test_squeeze_excite_is_named(dynamo: bool, tmp_path: Path) -> None:
    blocks = nn.Sequential(SqueezeExcite(), nn.Softmax(1), SqueezeExcite())
    graph = OnnxGraph(export(blocks, tmp_path / "net.onnx", 4, dynamo=dynamo))
    marked = cell((20, 24), 10, 1)
    assert graph.footprint(marked).all()
    (line,) = graph.flooding(marked)
    assert line.startswith("ReduceMean: 2 nodes, first " if dynamo else "GlobalAveragePool: 2 nodes, first /0/gate/")
    # Features of the context are no features of the image.
    assert graph.trace((20, 24)).downsampling == (1, 1)


def test_a_softmax_of_channels_is_not_named_and_one_of_pixels_is(tmp_path: Path) -> None:
    marked = cell((6, 8), 3, 1)
    channels = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Softmax(1))
    assert OnnxGraph(export(channels, tmp_path / "net.onnx", 4)).flooding(marked) == ()
    pixels = OnnxGraph(export(SelfAttention(), tmp_path / "net.onnx", 4))
    assert [line.split(":")[0] for line in pixels.flooding(marked)] == ["Softmax", "MatMul"]
    assert pixels.flooding(np.ones((6, 8), bool)) == pixels.flooding(np.zeros((6, 8), bool)) == ()


def test_installed_networks_flood_through_squeeze_excite() -> None:
    path = Path(str(distribution("ukis-csmask").locate_file("ukis_csmask/model_4b_l1c.onnx")))
    graph = OnnxGraph(path)
    assert (graph.channels, graph.spatial) == (4, (256, 256))
    assert 19e6 < graph.parameters < 21e6
    marked = cell((256, 256), 128, 1)
    assert graph.footprint(marked).all()
    (line,) = graph.flooding(marked)
    # Of 32. Deeper in, the features are so coarse that convolutions alone see everything.
    assert line == "GlobalAveragePool: 13 nodes, first /model/encoder/_blocks.0/GlobalAveragePool"
    trace = graph.trace((256, 256))
    assert trace.downsampling == (32, 32)
    assert 1e9 < trace.flops < 1e11
    with pytest.raises(ModelError, match=r"input of shape \(1, 4, 128, 128\)"):
        graph.footprint(marked[:128, :128])


def test_trace_counts_multiply_adds_twice(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(1, 2), groups=2),
        nn.ConvTranspose2d(6, 2, (1, 2), stride=(1, 2)),
    )
    trace = OnnxGraph(export(module, tmp_path / "net.onnx", 4)).trace((8, 12))
    assert trace.flops == 2 * (8 * 6 * 6 * (2 * 3 * 5) + 8 * 6 * 6 * 2 * 2)
    assert trace.downsampling == (1, 2)
    gemm = [
        node("Flatten"),
        helper.make_node("Gemm", ["y", "w"], ["z"], transA=1),
        helper.make_node("MatMul", ["z", "v"], ["u"]),
    ]
    constants = {"w": np.ones((1, 5), np.float32), "v": np.ones((5, 3), np.float32)}
    outputs = [helper.make_tensor_value_info("u", F, None)]
    path = save(tmp_path / "dense.onnx", gemm, constants, outputs=outputs)
    model = onnx.load(path)
    model.graph.output.reverse()
    onnx.save(model, path)
    assert OnnxGraph(path).trace((2, 3)).flops == 2 * (24 * 5 * 1 + 24 * 3 * 5)


@pytest.mark.parametrize("dynamo", [False, True])
def test_three_poolings_make_a_downsampling_of_eight(dynamo: bool, tmp_path: Path) -> None:
    graph = OnnxGraph(export(PooledUNet(), tmp_path / "net.onnx", 4, dynamo=dynamo))
    assert graph.trace((48, 64)).downsampling == (8, 8)
    assert graph.parameters == sum(p.numel() for p in PooledUNet().parameters())
    assert graph.spatial == (None, None)


def test_one_graph_in_another_is_read_too(tmp_path: Path) -> None:
    body = [helper.make_node("Conv", ["a", "k"], ["b"], pads=[1] * 4), helper.make_node("Relu", ["b"], ["c"])]
    block = helper.make_function("mine", "block", ["a", "k"], ["c"], body, [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("block", ["x", "w"], ["y"], "first", domain="mine")]
    graph = OnnxGraph(save(tmp_path / "net.onnx", nodes, {"w": W33}, domains=["mine"], functions=[block]))
    assert np.array_equal(graph.footprint(cell((9, 9), 4, 1)), cell((9, 9), 3, 3))


def test_only_what_the_first_output_needs_counts(tmp_path: Path) -> None:
    nodes = [conv("x", "y"), helper.make_node("NonZero", ["x"], ["z"])]
    outputs = [helper.make_tensor_value_info("z", TensorProto.INT64, None)]
    graph = OnnxGraph(save(tmp_path / "net.onnx", nodes, {"w": W33}, outputs=outputs))
    assert np.array_equal(graph.footprint(cell((9, 9), 4, 1)), cell((9, 9), 3, 3))


def test_weights_may_lie_beside_the_file(tmp_path: Path) -> None:
    nodes = [conv("x", "t"), helper.make_node("Gather", ["t", "i"], ["y"], axis=1)]
    path = save(tmp_path / "net.onnx", nodes, {"w": np.ones((40, 4, 3, 3), np.float32), "i": np.arange(39, -1, -1)})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="net.data", size_threshold=0)
    graph = OnnxGraph(path)
    assert graph.parameters == 40 * 4 * 9
    assert np.array_equal(graph.footprint(cell((9, 9), 4, 1)), cell((9, 9), 3, 3))
    assert graph.trace((9, 9)).flops == 2 * 81 * 40 * 36
    (tmp_path / "net.data").write_bytes(b"short")
    with pytest.raises(ModelError, match=r"net.onnx does not load as ONNX"):
        OnnxGraph(path)
    (tmp_path / "net.data").unlink()
    with pytest.raises(ModelError, match=r"net.onnx does not load as ONNX: .*net\.data.* copy it again"):
        OnnxGraph(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "net.onnx", [conv("x", "y")], {"w": W33}).read_bytes()
    path = tmp_path / "broken.onnx"
    for content in (*(whole[:n] for n in range(0, len(whole), 37)), b"not a network\n", b"PK\x03\x04" + whole):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"broken\.onnx"):
            OnnxGraph(path)
    with pytest.raises(ModelError, match="No such file"):
        OnnxGraph(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match=r"opset 9 or newer, but opset 7"):
        OnnxGraph(save(path, [node("Relu")], opset=7))


def test_operators_of_unknown_domains_are_refused(tmp_path: Path) -> None:
    path = save(
        tmp_path / "net.onnx", [helper.make_node("Warp", ["x"], ["y"], "w1", domain="my.ops")], domains=["my.ops"]
    )
    with pytest.raises(ModelError, match=r"node w1 is Warp of the domain my\.ops.*standard operators"):
        OnnxGraph(path)


def test_inputs_other_than_one_image_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    other = helper.make_tensor_value_info("z", F, [1])
    with pytest.raises(ModelError, match="inputs x: float, z: float; segflow wants one"):
        OnnxGraph(save(path, [node("Add", "x", "z")], inputs=[other]))
    with pytest.raises(ModelError, match="inputs x: double"):
        OnnxGraph(save(path, [node("Relu")], kind=TensorProto.DOUBLE, result=TensorProto.DOUBLE))
    with pytest.raises(ModelError, match="x declares 2 axes"):
        OnnxGraph(save(path, [node("Relu")], shape=(1, 4)))
    graph = OnnxGraph(save(path, [conv("x", "y")], {"w": W33}, shape=(None, None, "h", "w")))
    assert graph.channels is None
    graph.channels = 4
    assert np.array_equal(graph.footprint(cell((9, 9), 4, 1)), cell((9, 9), 3, 3))
    # Older files list initializers among the inputs.
    weights = helper.make_tensor_value_info("w", F, W33.shape)
    graph = OnnxGraph(save(path, [conv("x", "y")], {"w": W33}, inputs=[weights], shape=(-1, 4, -1, 7)))
    assert (graph.channels, graph.spatial) == (4, (None, 7))
    assert np.array_equal(graph.footprint(cell((9, 7), 4, 1)), cell((9, 7), 3, 3))


def test_outputs_without_channels_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("ArgMax", ["x"], ["i"], axis=1, keepdims=0), node("Cast", "i", to=F)]
    with pytest.raises(ModelError, match=r"output of shape \(1, 9, 9\)"):
        OnnxGraph(save(tmp_path / "net.onnx", nodes)).footprint(cell((9, 9), 4, 1))
    kept = [helper.make_node("ArgMax", ["x"], ["i"], axis=1), node("Cast", "i", to=F)]
    graph = OnnxGraph(save(tmp_path / "kept.onnx", kept))
    assert np.array_equal(graph.footprint(cell((9, 9), 4, 1)), cell((9, 9), 4, 1))
