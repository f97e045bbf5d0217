"""Where an ONNX graph can be cut into stages, and what each of them sees and costs.

A level is peeled off where one tensor goes down and one comes up: nothing else of what lies between the two is fed from
outside, or feeds what is outside (`segcore.staging` has the picture). What a chunk must show is read off the part's
marking graph (`segcore.model.marking`), that bounds what may depend on a cell whatever the weights. Anything that is
not understood means that there are no stages. Shares onnx with `segcore.model.graph`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from segcore.errors import ModelError, SegcoreError, one_line
from segcore.model.cut import Crop, Cut, Piece
from segcore.model.graph import OnnxGraph, flow_of, multiplications, needed, reads
from segcore.model.marking import (
    GLOBAL_POOLINGS,
    LOCAL_PRODUCTS,
    OPAQUE,
    POOLINGS,
    REDUCTIONS,
    SHAPE_ONLY,
    STANDARD,
    Marking,
    attributes_of,
    named,
)
from segcore.model.onnx import session_options
from segcore.spec import Sides
from segcore.staging import Level, Part, Stages

#: Sides at which shapes are inferred: multiples of any usual stride, and all different.
_SIDES = (1024, 1280, 1536)
#: Cells along the side of the image in which what a part sees is looked at, by number of axes; more if it sees ends.
_CELLS = {2: (12, 24, 48, 96), 3: (8, 12, 24)}
#: Levels that are peeled at most: of a window 8 levels deep hardly anything is left.
_MOST = 3
#: Values that a constant may have which says how others are shaped, or where they are cut; of more, it is a weight.
_SETTING = 64
#: Kinds that may see everything; none of them is let in, wherever it lies.
_FLOODING = (
    GLOBAL_POOLINGS
    | REDUCTIONS
    | OPAQUE
    | named(
        """ArgMax ArgMin CumSum Einsum Gemm GroupNormalization InstanceNormalization LRN LayerNormalization
        LogSoftmax LpNormalization MatMul MeanVarianceNormalization QLinearMatMul RMSNormalization Softmax Hardmax"""
    )
)
#: Kinds that have no neighbours and may overwrite what they read.
_IN_PLACE = named(
    """Add BatchNormalization Celu Clip Div Elu HardSigmoid HardSwish Identity LeakyRelu Mish Mul PRelu Relu Selu
    Sigmoid Softplus Sub Sum Swish Tanh"""
)
Shapes = dict[str, tuple[int, ...]]


def find_stages(path: Path, channels: int, threads: int = 2) -> Cut | None:
    """The stages of the network in an ONNX file, as many as there are; None where there are none.

    None as well for what is not local or not understood: layers that see everything, operators without a rule, several
    inputs or outputs, sizes that are fixed. Raises ModelError where the file is not ONNX.
    """
    try:
        return _Cutter(path, channels, threads).cut()
    except SegcoreError:
        return None


class _Cutter:
    """A graph while it is cut."""

    def __init__(self, path: Path, channels: int, threads: int) -> None:
        self._path, self._ndim, self._threads = path, _free_axes(path, channels, threads), threads
        self._model = _simplified(path, threads)
        if len(self._model.graph.output) != 1:
            raise ModelError(f"{path} has several outputs")
        self._initial = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._weights = {name: tensor for name, tensor in self._initial.items() if math.prod(tensor.dims) > _SETTING}
        inputs = [declared for declared in self._model.graph.input if declared.name not in self._initial]
        self._x, self._y = inputs[0].name, self._model.graph.output[0].name
        self._nodes = needed(self._model.graph.node, {self._y})
        self._data, _ = flow_of(self._nodes, self._x)
        given = {self._x: (1, channels, *_SIDES[: self._ndim])}
        given |= {name: tuple(tensor.dims) for name, tensor in self._weights.items()}
        self._shapes = _shapes(self._model, given)
        if unknown := [name for name in self._data if name not in self._shapes]:
            raise ModelError(f"{path}: the shape of {unknown[0]} cannot be told")
        self._refuse()

    def cut(self) -> Cut | None:
        """Peel one level after the other, from outside."""
        levels, down, up, takes = list[Level](), list[Piece](), list[Piece](), list[tuple[bool, bool]]()
        x, y, ways, inner = self._x, self._y, list[tuple[str, str]](), [self._piece([self._x], self._y)]
        while len(levels) < _MOST and (found := self._level(x, y)) is not None:
            level, pooled, risen = found
            sources = self._sources(x, risen, y)
            levels.append(level)
            down.append(self._piece([x], pooled))
            up.append(self._piece(sources, y))
            takes.append((x in sources, risen in sources))
            inner.append(self._piece([pooled], risen))
            ways.append((risen, y))
            x, y = pooled, risen
        if not levels:
            return None
        insides = tuple(self._cost(part.graph, self._shapes[part.graph.graph.input[0].name]) for part in inner)
        cropped, crops = None, list[Crop]()
        try:
            graph, crops = self._cropped(ways)
            cropped = Piece(graph, self._weights)
        except ModelError:
            levels = [replace(level, rise=0.0) for level in levels]
        stages = Stages(tuple(levels), insides, self._shapes[self._x][1], self._shapes[self._y][1])
        return Cut(stages, tuple(down), tuple(up), tuple(takes), tuple(inner), cropped, tuple(crops))

    def _refuse(self) -> None:
        for node in self._nodes:
            if self._data.isdisjoint(reads(node)) or node.op_type in SHAPE_ONLY:
                continue
            if node.domain not in STANDARD or node.op_type in _FLOODING:
                raise ModelError(f"{self._path}: {node.op_type} may see everything")
            attributes = attributes_of(node)
            if attributes.get("training_mode") or attributes.get("coordinate_transformation_mode") in (
                b"align_corners",
                b"tf_crop_and_resize",
                b"half_pixel_symmetric",
            ):
                raise ModelError(f"{self._path}: {node.op_type} depends on the size of the image")

    # Cutting.

    def _level(self, x: str, y: str) -> tuple[Level, str, str] | None:
        """The outermost level between two tensors of one grid, and what goes down and comes up; None for none."""
        nodes = self._between(x, y)
        size = self._shapes[x][2:]
        names = [name for node in nodes for name in node.output if name in self._data]
        smaller = [name for name in names if self._is_coarser(self._shapes[name], size)]
        for pooled in smaller:
            same = [name for name in smaller if self._shapes[name][2:] == self._shapes[pooled][2:]]
            # The last first: what has risen is cut before it is upsampled.
            for risen in reversed(same):
                if risen != pooled and self._encloses(nodes, pooled, risen):
                    pooled = self._settled(nodes, pooled, risen)
                    level = self._measured(x, y, pooled, risen)
                    if level is not None:
                        return level, pooled, risen
        return None

    def _is_coarser(self, shape: tuple[int, ...], size: tuple[int, ...]) -> bool:
        sides = shape[2:]
        if len(shape) != self._ndim + 2 or sides == size:
            return False
        return all(s > 0 and n % s == 0 for n, s in zip(size, sides, strict=True))

    def _between(self, x: str, y: str) -> list[NodeProto]:
        """The nodes that a tensor goes through on its way to another."""
        reached = {x}
        for node in self._nodes:
            if not reached.isdisjoint(reads(node)) and node.op_type not in SHAPE_ONLY:
                reached.update(name for name in node.output if name in self._data)
        return [
            node
            for node in needed(self._nodes, {y}, {x})
            if not reached.isdisjoint(node.output) and node.op_type not in SHAPE_ONLY
        ]

    def _encloses(self, nodes: Sequence[NodeProto], pooled: str, risen: str) -> bool:
        """Whether all that lies between two tensors is fed by the one, and feeds nothing but the other."""
        inner = self._between(pooled, risen)
        if not inner:
            return False
        made = {name for node in inner for name in node.output} | {pooled}
        if any((reads(node) & self._data) - made for node in inner):
            return False
        outside = {id(node) for node in nodes} - {id(node) for node in inner}
        taken = {name for node in nodes if id(node) in outside for name in reads(node)}
        return taken.isdisjoint(made - {risen})

    def _settled(self, nodes: Sequence[NodeProto], pooled: str, risen: str) -> str:
        """What is pooled, or what is made of it pixel by pixel, where that has no more channels.

        Engines run an activation and a norm together with the convolution before them.
        """
        best = pooled
        while True:
            users = [node for node in nodes if pooled in reads(node)]
            if len(users) != 1 or not _is_pointwise(users[0]) or len(reads(users[0]) & self._data) != 1:
                return best
            pooled = users[0].output[0]
            if pooled == risen or not self._encloses(nodes, pooled, risen):
                return best
            if self._shapes[pooled][1] <= self._shapes[best][1]:
                best = pooled

    def _sources(self, x: str, risen: str, y: str) -> list[str]:
        """Which of the image and what has risen the way up starts from."""
        taken = {name for node in needed(self._nodes, {y}, {x, risen}) for name in reads(node)}
        return [name for name in (x, risen) if name in taken or name == y]

    def _piece(self, sources: list[str], result: str) -> Piece:
        return Piece(self._part(sources, result), self._weights)

    def _part(self, sources: list[str], result: str) -> ModelProto:
        """The nodes from some tensors to another as a model, but for its weights.

        Raises ModelError where they need anything else.
        """
        nodes = needed(self._nodes, {result}, set(sources))
        made = {name for node in nodes for name in node.output}
        taken = {name for node in nodes for name in reads(node)}
        if missing := taken - made - set(sources) - set(self._initial):
            raise ModelError(f"{self._path}: what lies between {sources} and {result} also needs {sorted(missing)}")
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, self._shapes[name][1], *[None] * self._ndim])
            for name in sources
        ]
        outputs = [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)]
        initial = [self._initial[name] for name in sorted(taken & (self._initial.keys() - self._weights.keys()))]
        graph = helper.make_graph(nodes, "segflow", inputs, outputs, initial)
        return self._model_of(graph)

    def _model_of(self, graph: GraphProto) -> ModelProto:
        return helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=max(4, self._model.ir_version)
        )

    def _entering(self, way: Sequence[NodeProto]) -> list[str]:
        """What a way up starts from: what has risen, and what skips the levels inside.

        Raises ModelError where it also starts from a size, which would be that of the whole window.
        """
        taken = {name for node in way for name in reads(node)} - {name for node in way for name in node.output}
        settings = needed(self._nodes, taken - self._data - set(self._initial))
        if any(not self._data.isdisjoint(reads(node)) for node in settings):
            raise ModelError(f"{self._path}: what rises depends on a size")
        return sorted(taken & self._data)

    def _cropped(self, ways: Sequence[tuple[str, str]]) -> tuple[ModelProto, list[Crop]]:
        """See `Cut`; `ways`: where the way up of every level begins and ends. Raises ModelError where it cannot be."""
        if next(imported.version for imported in self._model.opset_import if imported.domain in STANDARD) < 10:
            raise ModelError(f"{self._path}: its Slice takes no inputs")
        axes = _unused("crop_axes", self._shapes)
        crops, inputs = list[Crop](), list[ValueInfoProto]()
        names, slices = dict[int, dict[str, str]](), dict[str, list[NodeProto]]()
        for level, (risen, y) in enumerate(ways):
            cells, way = self._shapes[risen][2:], self._between(risen, y)
            new = {name: _unused(f"crop_{level}_{i}", self._shapes) for i, name in enumerate(self._entering(way))}
            names |= {id(node): new for node in way}
            for name, cut in new.items():
                sides = self._shapes[name][2:]
                if len(sides) != len(cells) or any(n % c for n, c in zip(sides, cells, strict=True)):
                    raise ModelError(f"{self._path}: {name} has other axes than what rises beside it")
                ends = [f"{cut}_first", f"{cut}_stop"]
                inputs += [helper.make_tensor_value_info(end, TensorProto.INT64, [self._ndim]) for end in ends]
                slices.setdefault(name, []).append(helper.make_node("Slice", [name, *ends, axes], [cut]))
                ratio = tuple(n // c for n, c in zip(sides, cells, strict=True))
                crops.append(Crop(level, ratio, name == risen))
        nodes = [*slices.get(self._x, [])]
        for node in self._nodes:
            changed = NodeProto()
            changed.CopyFrom(node)
            new = names.get(id(node), {})
            changed.input[:] = [new.get(name, name) for name in node.input]
            nodes.append(changed)
            nodes += chain.from_iterable(slices.get(name, []) for name in node.output)
        image = self._part([self._x], self._y).graph
        graph = helper.make_graph(
            nodes,
            "segflow",
            [*image.input, *inputs],
            image.output,
            [*image.initializer, numpy_helper.from_array(np.arange(2, 2 + self._ndim, dtype=np.int64), axes)],
        )
        return self._model_of(graph), crops

    # Measuring.

    def _measured(self, x: str, y: str, pooled: str, risen: str) -> Level | None:
        size, coarse = self._shapes[x][2:], self._shapes[pooled][2:]
        factor = tuple(n // s for n, s in zip(size, coarse, strict=True))
        try:
            down, up = self._part([x], pooled), self._part(self._sources(x, risen, y), y)
            self._part([pooled], risen)
            sides = self._halo(down, x, factor), self._halo(up, x, factor)
        except ModelError:
            return None
        if sides[0] is None or sides[1] is None:
            return None
        costs = self._cost(down, self._shapes[x]), self._cost(up, self._shapes[x])
        rise = sum(self._products(self._between(risen, y))) / math.prod(size)
        return Level(factor, sides[0], sides[1], *costs, self._shapes[pooled][1], self._shapes[risen][1], rise)

    def _halo(self, part: ModelProto, x: str, factor: tuple[int, ...]) -> Sides | None:
        """What a part must be shown around a cell of `factor` pixels to be right in it; None if it sees too far."""
        jump = max(map(_jump, part.graph.node), default=0)
        for cells in _CELLS[self._ndim]:
            # What leaps from the middle over an end would not be seen.
            if jump * 4 <= cells and (found := self._seen(part, x, factor, cells)) is not None:
                return found
        return None

    def _seen(self, part: ModelProto, x: str, factor: tuple[int, ...], cells: int) -> Sides | None:
        """The halo as it shows in an image of so many cells; None where it reaches the ends."""
        middle = cells // 2
        marks = []
        for declared in part.graph.input:
            scale = factor if declared.name == x else (1,) * self._ndim
            image = np.zeros((1, self._shapes[declared.name][1], *(cells * s for s in scale)), np.float32)
            image[(slice(None), slice(None), *(slice(middle * s, (middle + 1) * s) for s in scale))] = 1
            marks.append(image)
        seen = self._footprint(part, marks)
        found = []
        for axis, f in enumerate(factor):
            n = seen.shape[axis]
            if n not in (cells, cells * f):
                return None
            unit = n // cells
            hit = np.flatnonzero(seen.any(axis=tuple(a for a in range(self._ndim) if a != axis)))
            if not hit.size or hit[0] == 0 or hit[-1] == n - 1:
                return None
            # Outputs behind the marked cell see what lies before them, and the other way round.
            before, after = int(hit[-1]) // unit - middle, middle - int(hit[0]) // unit
            found.append((max(0, before) * f, max(0, after) * f))
        return tuple(found)

    def _footprint(self, part: ModelProto, marks: list[NDArray[np.float32]]) -> NDArray[np.bool_]:
        """Which outputs of a part, (*spatial), may depend on what is marked in its inputs."""
        nodes, result = list(part.graph.node), part.graph.output[0].name
        sources = [declared.name for declared in part.graph.input]
        data, _ = flow_of(nodes, *sources)
        used = {name for node in nodes for name in reads(node)} | {result}
        sizes = {name: tensor.dims for name, tensor in self._initial.items()}
        opset = next(imported.version for imported in part.opset_import if imported.domain in STANDARD)
        marking = Marking(self._path, opset, data, used, sizes, judge=False)
        for node in nodes:
            if data.isdisjoint(reads(node)) or node.op_type in SHAPE_ONLY:
                marking.nodes.append(node)
            else:
                marking.rewrite(node)
        marked = needed(marking.nodes, {result})
        taken = {name for node in marked for name in reads(node)}
        initial = [self._initial[name] for name in sorted(taken & self._initial.keys())]
        graph = helper.make_graph(marked, "segflow", part.graph.input, part.graph.output, initial)
        model = helper.make_model(graph, opset_imports=part.opset_import, ir_version=part.ir_version)
        options = session_options(self._threads)
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            out = session.run(None, dict(zip(sources, marks, strict=True)))[0]
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise ModelError(f"{self._path} cannot be marked: {one_line(error)}") from error
        return np.asarray((out > 0).any(axis=(0, 1)))

    def _cost(self, part: ModelProto, shape: tuple[int, ...]) -> Part:
        """Multiply-adds and bytes held at the peak, for each pixel of an input of this shape."""
        pixels = math.prod(shape[2:])
        return Part(sum(self._products(part.graph.node)) / pixels, self._held(part) / pixels)

    def _products(self, nodes: Iterable[NodeProto]) -> Iterator[int]:
        """Multiply-adds of every node that has any."""
        shapes = self._shapes | {name: tuple(tensor.dims) for name, tensor in self._initial.items()}
        return (multiplications(node, shapes) for node in nodes if node.op_type in LOCAL_PRODUCTS)

    def _held(self, part: ModelProto) -> int:
        """Bytes at the peak of a run: what is still needed, node by node, and the working buffers of each."""
        nodes = [node for node in part.graph.node if not self._data.isdisjoint(node.output)]
        result = part.graph.output[0].name
        size = {name: 4 * math.prod(self._shapes[name]) for name in self._shapes if name in self._data}
        last = {name: i for i, node in enumerate(nodes) for name in reads(node)}
        inputs = [declared.name for declared in part.graph.input]
        last |= dict.fromkeys([*inputs, result], len(nodes))
        held = sum(size[name] for name in inputs)
        peak = held
        for i, node in enumerate(nodes):
            dying = {name for name in reads(node) & self._data if last[name] == i}
            outputs = [name for name in node.output if name in size and (name in last)]
            made = sum(size[name] for name in outputs)
            freed = sum(size[name] for name in dying)
            if node.op_type in _IN_PLACE and dying and freed >= made:
                held += made - freed
                peak = max(peak, held)
                continue
            peak = max(peak, held + made + _buffer(node, self._shapes))
            held += made - freed
        return peak


def _buffer(node: NodeProto, shapes: Shapes) -> int:
    """Bytes that an operator works in, beside what it reads and writes."""
    if node.op_type == "ConvTranspose" and node.input[1]:
        # The products of every pixel with the kernel, before they are added up.
        kernel = math.prod(attributes_of(node).get("kernel_shape", (1,)))
        steps = math.prod(attributes_of(node).get("strides", (1,)))
        return 4 * math.prod(shapes[node.output[0]]) * kernel // max(1, steps)
    return 0


def _unused(name: str, taken: Container[str]) -> str:
    """A name like this one that no tensor has."""
    while name in taken:
        name += "_"
    return name


def _is_pointwise(node: NodeProto) -> bool:
    """Whether an output pixel is made of the input pixel of the same place alone."""
    if node.op_type == "Conv":
        attributes = attributes_of(node)
        return set(attributes.get("kernel_shape", (0,))) == {1} and set(attributes.get("strides", (1,))) == {1}
    return node.op_type in _IN_PLACE


def _jump(node: NodeProto) -> int:
    """How far a convolution or a pooling sees across, in pixels of its input."""
    attributes = attributes_of(node)
    if node.op_type not in LOCAL_PRODUCTS | POOLINGS:
        return 0
    kernel = attributes.get("kernel_shape", ())
    dilations = attributes.get("dilations", (1,) * len(kernel))
    return max(((k - 1) * d for k, d in zip(kernel, dilations, strict=True)), default=0)


def _simplified(path: Path, threads: int) -> ModelProto:
    """The model after the first pass of ONNX Runtime: constants folded, batch norms merged into convolutions.

    What is cut afterwards is computed by the same steps as the whole.
    """
    options = session_options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory(prefix="segflow-") as folder:
        written = Path(folder) / "model.onnx"
        options.optimized_model_filepath = str(written)
        try:
            onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
            return onnx.load(written)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise ModelError(f"{path} cannot be simplified by ONNX Runtime: {one_line(error)}") from error


def _free_axes(path: Path, channels: int, threads: int) -> int:
    """How many axes an image has, all of which must be free. Raises ModelError where they are not."""
    graph = OnnxGraph(path, threads)
    if graph.spatial is None or any(graph.spatial) or graph.channels not in (None, channels):
        raise ModelError(f"{path} has fixed sizes: {graph.spatial}")
    return len(graph.spatial)


def _shapes(model: ModelProto, given: Shapes) -> Shapes:
    """Shapes of all tensors where some are given; those of weights are, as their values make no shape.

    Raises ModelError where they cannot be told.
    """
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    graph = helper.make_graph(
        model.graph.node,
        "segflow",
        [
            helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)
            for name, shape in given.items()
        ],
        [helper.make_tensor_value_info(output.name, TensorProto.FLOAT, None) for output in model.graph.output],
        [tensor for tensor in model.graph.initializer if tensor.name not in given],
    )
    free = helper.make_model(graph, opset_imports=model.opset_import, ir_version=max(4, model.ir_version))
    try:
        inferred = onnx.shape_inference.infer_shapes(free, data_prop=True).graph
    except Exception as error:  # of the checker, which shares no base but Exception
        raise ModelError(f"shapes cannot be inferred: {one_line(error)}") from error
    found = dict(given)
    for value in (*inferred.value_info, *inferred.output):
        sizes = value.type.tensor_type.shape.dim
        if all(size.HasField("dim_value") for size in sizes):
            found[value.name] = tuple(size.dim_value for size in sizes)
    return found
