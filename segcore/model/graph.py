"""What an ONNX file tells without being trusted: how far an output sees, what sees everything, what it costs.

The reach is bounded by a graph that carries marks (`segcore.model.marking`). The only home of onnx but for that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.inliner import inline_local_functions

from segcore.errors import ModelError, one_line
from segcore.model.marking import (
    GLOBAL_POOLINGS,
    LOCAL_PRODUCTS,
    POOLINGS,
    PRODUCTS,
    REDUCTIONS,
    SHAPE_ONLY,
    STANDARD,
    Marking,
    attributes_of,
    factors_of,
    name_of,
)
from segcore.model.onnx import session_options
from segcore.model.probe import Trace

#: Domains of the operators that ONNX Runtime brings along.
_RUNNABLE = STANDARD | {"ai.onnx.ml", "com.microsoft"}
#: The first with Sign, Where and ConstantOfShape, which the marking graph is made of (2019).
_OLDEST_OPSET = 9
_WEIGHTS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT8, TensorProto.UINT8})
#: Operators whose constants are settings.
_SETTINGS = frozenset({"Resize", "Upsample", "Pad", "Clip"})


class OnnxGraph:
    """An ONNX file, opened to be understood rather than run, from its input to its first output.

    `channels` and `spatial` are the sizes that the input (N, C, *spatial) declares, None where it is free; whoever
    knows the channels may set them. `parameters` is the number of values in weights, running statistics of batch norms
    among them. Raises ModelError where the file or one beside it is missing, damaged or not ONNX, where it holds
    operators that ONNX Runtime does not have, and where it has other inputs than one of float32.
    """

    def __init__(self, path: Path, threads: int = 2) -> None:
        self._path, self._threads = path, threads
        try:
            model = onnx.load(path, format="protobuf")
        except Exception as error:  # of the file system, the parser or the checker, which share no base but Exception
            raise ModelError(
                f"{path} does not load as ONNX: {one_line(error)}; copy it again, with the files of weights beside it"
            ) from error
        self._opset = next((imported.version for imported in model.opset_import if imported.domain in STANDARD), 0)
        if self._opset < _OLDEST_OPSET or not (model.graph.node and model.graph.output):
            raise ModelError(
                f"{path} holds no graph of opset {_OLDEST_OPSET} or newer, but opset {self._opset} and "
                f"{len(model.graph.node)} nodes; export the network again"
            )
        self._refuse_custom_operators(model)
        self._model = model = inline_local_functions(model) if model.functions else model
        self._input, sizes = self._declared_input()
        self._batch, self.channels, self.spatial = sizes[0] or 1, sizes[1], tuple(sizes[2:])
        self._constants = _constants(model.graph)
        self.parameters = _parameters(model.graph.node, self._constants)
        self._output = model.graph.output[0].name
        self._nodes = needed(model.graph.node, {self._output})
        self._data, self._context = flow_of(self._nodes, self._input.name)
        self._marked: dict[bool, tuple[onnxruntime.InferenceSession, list[NodeProto]]] = {}

    def footprint(self, marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which output pixels may depend on the marked input pixels, in any class, all channels marked.

        (*spatial) -> (*spatial of the output). An upper bound: no other pixel changes, whatever the weights. Raises
        ModelError where an operator cannot be bounded, or the network does not take an input of this size.
        """
        session, _ = self._marking(judge=False)
        marks = self._run(session, marked)[0]
        if marks.ndim != marked.ndim + 2:
            raise ModelError(f"{self._path} has an output of shape {marks.shape}; segflow wants (N, K, *spatial)")
        return np.asarray((marks > 0).any(axis=(0, 1)))

    def flooding(self, marked: NDArray[np.bool_]) -> tuple[str, ...]:
        """The operators that see everything, a line for each kind: "Softmax: 3 nodes, first /attention/Softmax".

        They are the norms, global poolings, reductions, matrix products and softmaxes whose output is marked everywhere
        though none of their operands is. What one floods is kept from the next, so each is judged by itself. Takes and
        raises what `footprint` does.
        """
        session, judged = self._marking(judge=True)
        found = defaultdict[str, list[str]](list)
        for node, floods in zip(judged, self._run(session, marked)[1:], strict=True):
            if floods:
                found[node.op_type].append(name_of(node))
        return tuple(
            f"{kind}: {len(names)} nodes, first {names[0]}" if len(names) > 1 else f"{kind}: 1 node, {names[0]}"
            for kind, names in found.items()
        )

    def trace(self, shape: tuple[int, ...]) -> Trace:
        """Downsampling and FLOPs for a window of this shape (*spatial), seen in a run of the network itself.

        Features are the outputs of convolutions and poolings, but for those of a global context (squeeze-excite). FLOPs
        are two for each multiplication of Conv, ConvTranspose, MatMul and Gemm, for one window of the batch. Raises
        ModelError where the network does not run.
        """
        own = [node for node in self._nodes if node.domain in STANDARD and not self._data.isdisjoint(node.input)]
        features = {node.output[0] for node in own if node.op_type in LOCAL_PRODUCTS | POOLINGS} - self._context
        products = [node for node in own if node.op_type in PRODUCTS and node.op_type != "Einsum"]
        wanted = sorted(features | {name for node in products for name in (*factors_of(node), node.output[0])})
        probes = [helper.make_node("Shape", [name], [f"shape of {name}"]) for name in wanted]
        outputs = [(probe.output[0], TensorProto.INT64) for probe in probes]
        session = self._session([*self._nodes, *probes], outputs or [(self._output, TensorProto.FLOAT)])
        found = self._run(session, np.zeros(shape, np.bool_))
        shapes = {name: tuple(map(int, sizes)) for name, sizes in zip(wanted, found, strict=bool(wanted))}
        smallest = [shapes[name][2:] for name in features if len(shapes[name]) == len(shape) + 2]
        by_axis = [min(sizes) for sizes in zip(*smallest, strict=True)] or shape
        downsampling = tuple(round(n / least) for n, least in zip(shape, by_axis, strict=True))
        return Trace(downsampling, sum(2 * multiplications(node, shapes) for node in products) // self._batch)

    def _refuse_custom_operators(self, model: ModelProto) -> None:
        local = {(function.domain, function.name) for function in model.functions}
        for node in _with_inner(chain(model.graph.node, *(function.node for function in model.functions))):
            if node.domain not in _RUNNABLE and (node.domain, node.op_type) not in local:
                raise ModelError(
                    f"{self._path}: node {name_of(node)} is {node.op_type} of the domain {node.domain}, an operator "
                    f"that ONNX Runtime does not have; export the network with standard operators"
                )

    def _declared_input(self) -> tuple[ValueInfoProto, list[int | None]]:
        # Until version 3 of the format, initializers are inputs.
        initial = {tensor.name for tensor in self._model.graph.initializer}
        inputs = [declared for declared in self._model.graph.input if declared.name not in initial]
        kinds = [TensorProto.DataType.Name(i.type.tensor_type.elem_type).lower() for i in inputs]
        if kinds != ["float"]:
            found = ", ".join(f"{i.name}: {kind}" for i, kind in zip(inputs, kinds, strict=True)) or "none"
            raise ModelError(f"{self._path} has the inputs {found}; segflow wants one, of float32")
        # Some exporters write -1 for a size that is free.
        sizes = [n.dim_value if n.dim_value > 0 else None for n in inputs[0].type.tensor_type.shape.dim]
        if len(sizes) < 3:
            raise ModelError(
                f"{self._path}: the input {inputs[0].name} declares {len(sizes)} axes; segflow wants (N, C, *spatial)"
            )
        return inputs[0], sizes

    def _marking(self, *, judge: bool) -> tuple[onnxruntime.InferenceSession, list[NodeProto]]:
        """The marking graph, its outputs the marks and whether each of the returned nodes floods; written once."""
        if judge not in self._marked:
            sizes = {name: tensor.dims for name, tensor in self._constants.items()}
            used = {name for node in self._nodes for name in reads(node)} | {self._output}
            marking = Marking(self._path, self._opset, self._data, used, sizes, judge)
            for node in self._nodes:
                if self._data.isdisjoint(reads(node)) or node.op_type in SHAPE_ONLY:
                    marking.nodes.append(node)
                else:
                    marking.rewrite(node)
            outputs = [(marking.mark(self._output), TensorProto.FLOAT)]
            outputs += [(floods, TensorProto.BOOL) for _, floods in marking.verdicts]
            session = self._session(marking.nodes, outputs)
            self._marked[judge] = session, [node for node, _ in marking.verdicts]
        return self._marked[judge]

    def _session(self, nodes: list[NodeProto], outputs: Sequence[tuple[str, int]]) -> onnxruntime.InferenceSession:
        """The model with other nodes and outputs; what it declares of types and shapes between them is dropped."""
        nodes = needed(nodes, {name for name, _ in outputs})
        used = {name for node in nodes for name in reads(node)}
        initial = [tensor for tensor in self._model.graph.initializer if tensor.name in used]
        results = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
        graph = helper.make_graph(nodes, "segflow", [self._input], results, initial)
        version = max(4, self._model.ir_version)
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=version)
        options = session_options(self._threads)
        try:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise ModelError(f"{self._path} does not load in ONNX Runtime: {one_line(error)}") from error

    def _run(self, session: onnxruntime.InferenceSession, marked: NDArray[np.bool_]) -> list[NDArray[Any]]:
        shape = (self._batch, self.channels or 1, *marked.shape)
        batch = np.ascontiguousarray(np.broadcast_to(marked, shape), dtype=np.float32)
        try:
            return list(session.run(None, {self._input.name: batch}))
        except Exception as error:
            raise ModelError(f"{self._path} does not take an input of shape {shape}: {one_line(error)}") from error


def drop_comments(path: Path) -> None:
    """Take out of an ONNX file what its exporter noted of the code and the machine that it came from."""
    model = onnx.load(path, format="protobuf")
    for node in _with_inner(chain(model.graph.node, *(function.node for function in model.functions))):
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    for part in (
        model,
        model.graph,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
        *model.functions,
    ):
        part.ClearField("metadata_props")
    onnx.save(model, path)


def copy_whole(source: Path, target: Path) -> None:
    """Copy an ONNX file, taking in weights that lie in files beside it: a digest then vouches for them, too.

    Raises ModelError for what `OnnxGraph` refuses, and for weights of 2 GiB or more, which fit in no single file.
    """
    OnnxGraph(source)
    try:
        onnx.save(onnx.load(source, format="protobuf"), target)
    except ValueError as error:
        raise ModelError(f"{source} cannot be copied into one file: {one_line(error)}") from error


def multiplications(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Multiply-adds of a sum of products, from the shapes of what it takes and gives."""
    values, weights = (shapes[name] for name in factors_of(node))
    if node.op_type == "ConvTranspose":
        return math.prod(values) * math.prod(weights[1:])
    axis = 0 if attributes_of(node).get("transA") else -1
    terms = math.prod(weights[1:]) if node.op_type in LOCAL_PRODUCTS else values[axis]
    return math.prod(shapes[node.output[0]]) * terms


def _with_inner(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, and those of the graphs inside of them: branches of If, bodies of Loop and Scan."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _with_inner(chain(attribute.g.node, *(body.node for body in attribute.graphs)))


def reads(node: NodeProto) -> set[str]:
    """Tensors that a node depends on, those that the graphs inside of it take from outside among them."""
    return {name for inner in _with_inner([node]) for name in inner.input if name}


def needed(nodes: Sequence[NodeProto], outputs: set[str], given: Set[str] = frozenset()) -> list[NodeProto]:
    """The nodes that outputs depend on where other tensors are given, in order."""
    wanted, found = outputs - given, list[NodeProto]()
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            found.append(node)
            wanted |= reads(node) - given
    return found[::-1]


def flow_of(nodes: Iterable[NodeProto], *sources: str) -> tuple[set[str], set[str]]:
    """What depends on values of the sources, not shapes alone, and what of it global pools and reductions made."""
    data, context = set(sources), set[str]()
    for node in nodes:
        operands = data & reads(node)
        if operands and node.op_type not in SHAPE_ONLY:
            data.update(filter(None, node.output))
            if node.op_type in GLOBAL_POOLINGS | REDUCTIONS or operands <= context:
                context.update(node.output)
    return data, context


def _constants(graph: GraphProto) -> dict[str, TensorProto]:
    """Initializers and tensors of Constant nodes, by name."""
    nodes = [node for node in graph.node if node.op_type == "Constant"]
    made = {node.output[0]: a.t for node in nodes for a in node.attribute if a.name == "value"}
    return {tensor.name: tensor for tensor in graph.initializer} | made


def _parameters(nodes: Iterable[NodeProto], constants: dict[str, TensorProto]) -> int:
    read = {name for node in nodes if node.op_type not in _SETTINGS for name in reads(node)}
    weights = [tensor for name, tensor in constants.items() if name in read and tensor.data_type in _WEIGHTS]
    return sum(math.prod(tensor.dims) for tensor in weights if tensor.dims)
