"""The marking graph: an ONNX graph that carries, in place of values, what they depend on.

PyTorch carries a NaN planted in the input through every operator; ONNX Runtime does not, as its ReLU and max pooling
drop it. So the reach is bounded from the graph, which is rewritten into a *marking graph*: a tensor that depends on
values of the input keeps name and shape, but holds marks in float32, 1 where an element may depend on a marked pixel
of the input and 0 where it does not.

    data movement       as it is
    element-wise        Max, the OR of its operands
    sums of products    the same, each factor in turn against ones: Conv, ConvTranspose, MatMul, Gemm, Einsum
    pooling, resizing   the same windows: MaxPool, Resize
    norms, softmax      an OR over what they normalise
    anything else       a refusal that names it

What depends on constants and shapes alone is computed as before. After every sum marks go back to 0 and 1, so neither
depth nor width makes them vanish. Shares onnx with `segcore.model.graph`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from segcore.errors import ModelError

STANDARD = frozenset({"", "ai.onnx"})


class Marking:
    """A marking graph while it is written.

    With `judge`, every node of a kind that aggregates leaves a verdict: itself, and the name of a bool that says if it
    floods. If so, its output is replaced by that of a node without neighbours: the operand of a norm, else nothing.
    """

    def __init__(
        self, path: Path, opset: int, data: set[str], used: set[str], sizes: dict[str, Sequence[int]], judge: bool
    ) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.verdicts: list[tuple[NodeProto, str]] = []
        self._path, self._data, self._used, self._sizes, self._judge = path, data, used, sizes, judge
        self._count = 0

    def rewrite(self, node: NodeProto) -> None:
        """Append what marks the outputs of a node. Raises ModelError where that cannot be bounded."""
        write, carrying = RULES.get(node.op_type, (None, _ANY))
        if write is None or node.domain not in STANDARD:
            raise self.unbounded(node)
        for position, name in enumerate(node.input):
            if name in self._data and position not in carrying:
                raise self.unbounded(node, f", as its operand {position} depends on the image")
        marks = write(self, node)
        if self._used.intersection(node.output[len(marks) :]):
            raise self.unbounded(node, ", as more than its first output is used")
        if self._judge and node.op_type in _AGGREGATES:
            marks[0] = self._judged(node, marks[0])
        for name, mark in zip(node.output, marks, strict=False):
            if name:
                self.nodes.append(helper.make_node("Identity", [mark], [name]))

    def op(self, kind: str, *operands: str, **attributes: Any) -> str:
        """Append a node; the name of its output."""
        return self.copy(NodeProto(output=[""]), operands, kind, **attributes)[0]

    def copy(
        self, node: NodeProto, operands: Iterable[str], kind: str = "", without: Iterable[str] = (), **changed: Any
    ) -> list[str]:
        """Append a node like this one on other operands, of another kind, with other attributes; its outputs."""
        names = [f"marking {self._count + i}" for i, _ in enumerate(node.output)]
        self._count += len(names)
        copied = helper.make_node(kind or node.op_type, list(operands), names, **changed)
        copied.attribute.extend(a for a in node.attribute if a.name not in {*without, *changed})
        self.nodes.append(copied)
        return names

    def integers(self, *values: int) -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.array(values, np.int64)))

    def filled(self, name: str, value: float) -> str:
        """A tensor of this one's shape, in float32 whatever its type."""
        # Large weights need not be kept for their shapes.
        shape = self.integers(*self._sizes[name]) if name in self._sizes else self.op("Shape", name)
        return self.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.array([value], np.float32)))

    def mark(self, name: str) -> str:
        """The marks of a tensor; a constant has none."""
        return name if name in self._data else self.filled(name, 0)

    def largest(self, mark: str, axes: Sequence[int], keepdims: int = 1) -> str:
        """The OR over these axes."""
        if self.opset >= 18:
            return self.op("ReduceMax", mark, self.integers(*axes), keepdims=keepdims)
        return self.op("ReduceMax", mark, axes=list(axes), keepdims=keepdims)

    def unbounded(self, node: NodeProto, why: str = "") -> ModelError:
        kind = node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"
        return ModelError(
            f"{self._path}: the reach of the operator {kind} (node {name_of(node)}) cannot be bounded{why}; export the "
            f"network without it, or blend its windows (`local: false`)"
        )

    def _judged(self, node: NodeProto, mark: str) -> str:
        operands = [name for name in node.input if name in self._data]
        before = self.op("Max", *(self.op("ReduceMin", name, keepdims=0) for name in operands))
        after = self.op("ReduceMin", mark, keepdims=0)
        floods = self.op("Less", before, after)
        self.verdicts.append((node, floods))
        return self.op("Where", floods, operands[0] if node.op_type in _NORMS else self.filled(mark, 0), mark)

    # How operators are marked: each appends nodes, and returns the marks of the outputs that it accounts for.

    def _alike(self, node: NodeProto) -> list[str]:
        return [self.mark(node.input[0])]

    def _element_wise(self, node: NodeProto) -> list[str]:
        # A constant takes part, as it may be larger than the data.
        return [self.op("Max", *(self.mark(name) for name in node.input if name))]

    def _moved(self, node: NodeProto) -> list[str]:
        if attributes_of(node).get("reduction", b"none") != b"none":
            raise self.unbounded(node, ", as it combines values")
        _, carrying = RULES[node.op_type]
        operands = (self.mark(name) if i in carrying else name for i, name in enumerate(node.input))
        return self.copy(node, operands)

    def _padded(self, node: NodeProto) -> list[str]:
        return self.copy(node, ["" if i == 2 else name for i, name in enumerate(node.input)], without=["value"])

    def _summed(self, node: NodeProto) -> list[str]:
        return [self.op("Sign", *self.copy(node, node.input))]

    def _multiplied(self, node: NodeProto) -> list[str]:
        """Each factor against ones: a sum is marked where any of its products is."""
        factors, sums = factors_of(node), list[str]()
        for position, factor in enumerate(factors):
            if factor in self._data:
                operands = [factor if i == position else self.filled(name, 1) for i, name in enumerate(factors)]
                if node.op_type == "Gemm":  # whose third operand was not optional before opset 11
                    operands += [self.filled(name, 0) for name in node.input[2:] if name]
                sums += self.copy(node, operands, node.op_type.removeprefix("QLinear"), without=["alpha", "beta"])
        return [self.op("Sign", self.op("Sum", *sums))]

    def _pooled(self, node: NodeProto) -> list[str]:
        # A window that lies in the padding altogether has a maximum below zero.
        others = ("count_include_pad", "p", "storage_order")
        return [self.op("Relu", self.copy(node, node.input, "MaxPool", others)[0])]

    def _resized(self, node: NodeProto) -> list[str]:
        attributes = attributes_of(node)
        if attributes.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
            raise self.unbounded(node, ", as it crops")
        if attributes.get("mode") != b"cubic":
            return self._summed(node)
        if attributes.get("antialias"):
            raise self.unbounded(node, ", as it is cubic and antialiases")
        # Cubic weights have both signs and could cancel; they reach a pixel further to each side than linear ones,
        # which are positive. ONNX Runtime has them for two spatial axes only.
        wider = self.op("MaxPool", node.input[0], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        cubic = ("cubic_coeff_a", "exclude_outside")
        return [self.op("Sign", *self.copy(node, [wider, *node.input[1:]], "", cubic, mode="linear"))]

    def _reduced(self, node: NodeProto) -> list[str]:
        # From opset 13 to 17 ReduceSum takes its axes in another way than the rest.
        return self._summed(node) if node.op_type == "ReduceSum" else self.copy(node, node.input, "ReduceMax")

    def _chosen(self, node: NodeProto) -> list[str]:
        attributes = attributes_of(node)
        return [self.largest(node.input[0], [attributes.get("axis", 0)], attributes.get("keepdims", 1))]

    def _pooled_globally(self, node: NodeProto) -> list[str]:
        return [self.op("GlobalMaxPool", node.input[0])]

    def _over_space(self, node: NodeProto) -> list[str]:
        return [self.op("Max", node.input[0], *self._pooled_globally(node))]

    def _batch_normalised(self, node: NodeProto) -> list[str]:
        return self._over_space(node) if attributes_of(node).get("training_mode") else self._alike(node)

    def _over_axes(self, node: NodeProto) -> list[str]:
        attributes = attributes_of(node)
        default = {"MeanVarianceNormalization": [0, 2, 3], "LRN": [1]}.get(node.op_type)
        axes = attributes.get("axes") or default or [attributes.get("axis", -1)]
        return [self.op("Max", node.input[0], self.largest(node.input[0], axes))]

    def _over_last_axes(self, node: NodeProto) -> list[str]:
        axis = attributes_of(node).get("axis", 1 if node.op_type in _SOFTMAXES else -1)
        return self._over_rows(node, self.op("Flatten", node.input[0], axis=axis))

    def _softmax(self, node: NodeProto) -> list[str]:
        return self._over_axes(node) if self.opset >= 13 else self._over_last_axes(node)

    def _over_groups(self, node: NodeProto) -> list[str]:
        groups = self.integers(0, attributes_of(node)["num_groups"], -1)
        return self._over_rows(node, self.op("Reshape", node.input[0], groups))

    def _over_rows(self, node: NodeProto, rows: str) -> list[str]:
        marks = self.op("Max", rows, self.largest(rows, [-1]))
        return [self.op("Reshape", marks, self.op("Shape", node.input[0]))]

    def _everything(self, node: NodeProto) -> list[str]:
        """Every output sees every operand. The node itself is run for the shapes of its outputs."""
        seen = [self.op("ReduceMax", name, keepdims=0) for name in node.input if name in self._data]
        return [self.op("Max", self.filled(output, 0), *seen) for output in self.copy(node, node.input)]


def named(names: str) -> frozenset[str]:
    """Kinds of operators, from a list in words."""
    return frozenset(names.split())


SHAPE_ONLY = named("Shape Size")
POOLINGS = named("MaxPool AveragePool LpPool")
GLOBAL_POOLINGS = named("GlobalAveragePool GlobalMaxPool GlobalLpPool")
_CHOICES = named("ArgMax ArgMin")
REDUCTIONS = frozenset(f"Reduce{kind}" for kind in named("L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"))
_SOFTMAXES = named("Softmax LogSoftmax Hardmax")
_NORMS = _SOFTMAXES | named(
    """BatchNormalization GroupNormalization InstanceNormalization LRN LayerNormalization LpNormalization
    MeanVarianceNormalization RMSNormalization"""
)
OPAQUE = named("Attention GRU LSTM RNN")
LOCAL_PRODUCTS = named("Conv ConvTranspose QLinearConv")
PRODUCTS = LOCAL_PRODUCTS | named("MatMul Gemm Einsum QLinearMatMul")
#: Kinds that may gather from everywhere.
_AGGREGATES = _NORMS | GLOBAL_POOLINGS | REDUCTIONS | _CHOICES | OPAQUE | (PRODUCTS - LOCAL_PRODUCTS)
#: How kinds are marked, and which of their operands carry values: no other may depend on the image.
_ANY, _FIRST = range(1_000_000), range(1)
RULES: dict[str, tuple[Callable[[Marking, NodeProto], list[str]] | None, Sequence[int]]] = {
    kind: (write, carrying)
    for write, carrying, kinds in (
        (Marking._element_wise, _ANY, named(
            """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil
            Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN
            LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu
            Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"""
        )),
        (Marking._moved, _FIRST, named(
            """DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Reshape Slice SpaceToDepth Split
            Squeeze Tile Transpose Trilu Unsqueeze"""
        )),
        (Marking._moved, (0, 2), named("ScatterElements ScatterND")),
        (Marking._moved, _ANY, named("Concat")),
        (Marking._padded, _FIRST, named("Pad")),
        (Marking._alike, _FIRST, named("Cast DequantizeLinear Dropout QuantizeLinear")),
        (Marking._alike, _ANY, named("CastLike")),
        (Marking._multiplied, (0, 1), named("Conv ConvTranspose Gemm MatMul")),
        (Marking._multiplied, (0, 3), named("QLinearConv QLinearMatMul")),
        (Marking._multiplied, _ANY, named("Einsum")),
        (Marking._summed, _FIRST, named("CumSum")),
        (Marking._pooled, _FIRST, POOLINGS),
        (Marking._resized, _FIRST, named("Resize Upsample")),
        (Marking._reduced, _FIRST, REDUCTIONS),
        (Marking._chosen, _FIRST, _CHOICES),
        (Marking._pooled_globally, _FIRST, GLOBAL_POOLINGS),
        (Marking._batch_normalised, _FIRST, named("BatchNormalization")),
        (Marking._over_space, _FIRST, named("InstanceNormalization")),
        (Marking._over_groups, _FIRST, named("GroupNormalization")),
        (Marking._over_last_axes, _FIRST, named("LayerNormalization RMSNormalization")),
        (Marking._over_axes, _FIRST, named("LRN LpNormalization MeanVarianceNormalization")),
        (Marking._softmax, _FIRST, _SOFTMAXES),
        (Marking._everything, _ANY, OPAQUE),
    )
    for kind in kinds
}  # fmt: skip


def name_of(node: NodeProto) -> str:
    return node.name or next(filter(None, node.output), node.op_type)


def attributes_of(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def factors_of(node: NodeProto) -> list[str]:
    """The operands of a sum of products without the bias, and in QLinear ones without scales and zero points."""
    _, carrying = RULES[node.op_type]
    return [name for i, name in enumerate(node.input) if i in carrying]
