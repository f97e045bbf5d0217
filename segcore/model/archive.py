"""Files of weights, opened without running code that they bring along."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from segcore.errors import ModelError, one_line

Kind = Literal["onnx", "torchscript", "torch-export", "state"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: What a torch.export archive holds, below its own folder; nothing else is taken over.
_MEMBERS = re.compile(
    r"data/(weights|constants)/(\w+_config\.json|(weight|tensor)_\d+)|data/sample_inputs/\w+\.pt|models/\w+\.json|"
    r"archive_format|archive_version|byteorder|version|\.data/\w+"
)
#: Operators that a graph may call: of the thousands that there are, those that segmentation networks are made of.
_OPERATORS = _words(
    """
    _to_copy abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d
    adaptive_max_pool3d add add_ alias alpha_dropout amax amin arange argmax avg_pool1d avg_pool2d avg_pool3d
    batch_norm bmm cat channel_shuffle chunk clamp clamp_ clone constant_pad_nd contiguous conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d convolution cos div div_ dropout dropout_ einsum elu elu_
    erf exp expand expand_as eq feature_dropout flatten flip full full_like ge gelu glu group_norm gt
    hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ instance_norm layer_norm le leaky_relu
    leaky_relu_ linear linalg_vector_norm log logical_and logical_not lt matmul max max_pool1d max_pool2d
    max_pool3d maximum mean min minimum mish mish_ mm movedim mul mul_ narrow native_group_norm
    native_layer_norm ne neg ones ones_like pad permute pixel_shuffle pixel_unshuffle pow prelu reciprocal
    reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 relu_ repeat repeat_interleave
    replication_pad1d replication_pad2d replication_pad3d reshape reshape_as roll rsqrt rsub
    scaled_dot_product_attention select selu selu_ sigmoid sigmoid_ silu silu_ sin slice softmax softplus split
    split_with_sizes sqrt squeeze stack std sub sub_ sum sym_size tanh tanh_ threshold to transpose unbind
    unflatten unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_nearest_exact2d upsample_nearest_exact3d upsample_trilinear3d
    var view view_as where zeros zeros_like
    """
)
_ON_SIZES = re.compile(r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_)")
#: What expressions of sizes are made of, such as `Mul(Integer(16), Symbol('s0'))` or `L['x'].size()[2] // 8 == 4`.
_FUNCTIONS = frozenset(
    ("Symbol", "Integer", "Rational", "Mul", "Add", "Pow", "Max", "Min", "Mod", "FloorDiv", "CeilDiv", "IntTrueDiv",
     "max", "min", "size")
)  # fmt: skip
_SYNTAX = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Attribute, ast.Subscript, ast.BinOp,
    ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


def kind_of(path: Path) -> Kind:
    """What a file holds, by its content where that tells. Raises ModelError for what is none of these."""
    if not path.is_file():
        raise ModelError(f"{path} is no file")
    if path.suffix == ".onnx":
        return "onnx"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any("/code/" in name for name in names):
            return "torchscript"
        return "torch-export" if any("/models/" in name for name in names) else "state"
    if path.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin"):
        return "state"
    raise ModelError(
        f"{path} is no network that segflow knows: it packs ONNX (.onnx) and TorchScript files, and state dicts "
        f"(.safetensors, .pt, .pth)"
    )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, or of one inside a checkpoint. Raises ModelError for a pickle of anything else."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = _tensors(path)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is a pickle of more than tensors, and loading it could run any code: {one_line(error)}; save "
            f"`module.state_dict()` instead"
        ) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise ModelError(f"{path} does not load: {one_line(error)}; is it whole?") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not (isinstance(found, Mapping) and found and all(isinstance(value, torch.Tensor) for value in found.values())):
        raise ModelError(f"{path} holds no state dict: a mapping of names to tensors, as `module.state_dict()` gives")
    state = {str(name): value for name, value in found.items()}
    if all(name.startswith("module.") for name in state):  # as DataParallel wraps it
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def open_export(path: Path) -> torch.nn.Module:
    """The network in a torch.export archive. Raises ModelError, also for one that is more than tensors and a graph."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    clean = io.BytesIO(plain_export(content, str(path)))
    try:
        return torch.export.load(clean).module()
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise ModelError(f"{path} does not load as torch-export: {one_line(error)}; is it whole?") from error


def plain_export(content: bytes, name: str) -> bytes:
    """A torch.export archive, written anew with its tensors and its graph and nothing else.

    torch unpickles some members of such an archive, evaluates texts in it and imports what others name. So what is
    opened is never the archive itself, but what was understood of it here: each member once, JSON as it was read, no
    pickles, no traces of the machine that it was made on. Raises ModelError for anything that is not on a short list.
    """
    written = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(written, "w") as to:
            names = archive.namelist()
            if len({member.casefold() for member in names}) != len(names):
                raise _refusal(name, "holds two members of one name")
            if len({member.partition("/")[0] for member in names}) != 1:
                raise _refusal(name, "holds more than one folder")
            for member in names:
                inside = member.partition("/")[2]
                if not _MEMBERS.fullmatch(inside):
                    raise _refusal(name, f"holds {member!r}, which no network needs")
                part = archive.read(member)
                if inside.endswith(".pt"):
                    part = b""  # inputs that it was exported with, pickled: torch does without them
                elif inside.endswith(".json"):
                    part = json.dumps(_plain(json.loads(part), name)).encode()
                to.writestr(member, part)
    except (zipfile.BadZipFile, ValueError, RecursionError, NotImplementedError, zlib.error) as error:
        raise ModelError(f"{name} is no whole archive of torch.export: {one_line(error)}") from error
    return written.getvalue()


def _refusal(name: str, fault: str) -> ModelError:
    return ModelError(f"{name} {fault}, and opening it could run any code; pack the network again, as ONNX if need be")


def _plain(document: Any, name: str) -> Any:
    """A JSON document of an archive without comments on the code that it came from, if it is what it should be."""
    if isinstance(document, list):
        return [_plain(value, name) for value in document]
    if not isinstance(document, dict):
        return document
    plain = {}
    for key, value in document.items():
        if key == "use_pickle" and value:
            raise _refusal(name, "says that a tensor is pickled")
        if key in ("target", "as_operator") and not _is_operator(value):
            raise _refusal(name, f"calls {value!r}, which is not among the operators of networks")
        if key in ("in_spec", "out_spec") and not _is_structure(value):
            raise _refusal(name, f"has the structure {str(value)[:60]!r}, which is not of plain tuples")
        for text in {"expr_str": [value], "guards_code": value, "range_constraints": value}.get(key) or ():
            if not _is_arithmetic(str(text)):
                raise _refusal(name, f"has the expression {str(text)[:60]!r}, which is no arithmetic of sizes")
        plain[key] = {} if key in ("metadata", "treespec_namedtuple_fields") else _plain(value, name)
    return plain


def _is_operator(target: object) -> bool:
    parts = str(target).split(".")
    known = parts[:3] == ["torch", "ops", "aten"] and len(parts) <= 5 and parts[3:4] and parts[3] in _OPERATORS
    return bool(known or _ON_SIZES.fullmatch(str(target)) or str(target) == "torch.sym_max")


def _is_structure(text: object) -> bool:
    """Whether a description of arguments is made of tuples, lists and dictionaries without keys."""
    if not isinstance(text, str):
        return text is None
    allowed = {"type": {None, "builtins.tuple", "builtins.list", "builtins.dict"}, "context": {None, "null", "[]"}}
    pending = [json.loads(text)]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            if any(key != "children_spec" and value not in allowed.get(key, ()) for key, value in part.items()):
                return False
            pending.append(part.get("children_spec"))
        elif not (part is None or isinstance(part, int)):
            return False
    return True


def _is_arithmetic(expression: str) -> bool:
    """Whether a text computes with sizes and does nothing else."""
    # Few characters, so that a parser that leaves some out, as sympy does with new lines, reads the same.
    if not re.fullmatch(r"[\w ()\[\],.'+*/%<>=!-]*", expression, re.ASCII):
        return False
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in nodes:
        if not isinstance(node, _SYNTAX):
            return False
        if isinstance(node, ast.Attribute) and node.attr != "size":
            return False
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.fullmatch(r"\w+", node.value):
            return False
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called not in _FUNCTIONS:
                return False
    return True


def _tensors(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols that it does not know
        return torch.load(path, map_location="cpu", weights_only=True)
