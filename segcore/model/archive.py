"""Files of weights, opened without running code that they bring along."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from segcore.errors import ModelError, one_line

Kind = Literal["onnx", "torchscript", "torch-export", "state"]

#: What a torch.export archive of ours holds, below its own folder; nothing else is opened.
_EXPORT_MEMBERS = re.compile(
    r"data/(weights|constants)/(\w+_config\.json|(weight|tensor)_\d+)|data/sample_inputs/\w+\.pt|models/\w+\.json|"
    r"archive_format|archive_version|byteorder|version|\.data/\w+"
)
#: Operators that a graph may call: arithmetic on tensors, and on sizes.
_TARGETS = re.compile(
    r"torch\.ops\.aten\.\w+(\.\w+)?|"
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_)|torch\.sym_(max|min|not|int)"
)
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
    """The network in a torch.export archive.

    torch would unpickle some members of such an archive, and evaluate texts in it, whatever they say: so one that holds
    more than plain tensors and plain expressions is refused before. Raises ModelError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            fault = next(_faults(archive), None)
        if fault is None:
            return torch.export.load(path).module()
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise ModelError(f"{path} does not load as torch-export: {one_line(error)}; is it whole?") from error
    raise ModelError(f"{path} {fault}, and loading it could run any code; pack the network again, or export it to ONNX")


def _tensors(file: Path | io.BytesIO) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols that it does not know
        return torch.load(file, map_location="cpu", weights_only=True)


def _faults(archive: zipfile.ZipFile) -> Iterator[str]:
    """What in a torch.export archive is more than plain tensors and a plain graph."""
    for member in archive.namelist():
        inside = member.partition("/")[2]
        if not _EXPORT_MEMBERS.fullmatch(inside):
            yield f"holds {member}, which no network needs"
        elif inside.endswith(".pt"):
            try:
                _tensors(io.BytesIO(archive.read(member)))
            except Exception:
                yield f"holds a pickle of more than tensors, {member}"
        elif inside.endswith(".json"):
            for key, value in _entries(json.loads(archive.read(member))):
                if key == "use_pickle" and value:
                    yield f"says in {member} that a tensor is pickled"
                if key == "target" and not _TARGETS.fullmatch(str(value)):
                    yield f"calls {value!r}, which is no operator on tensors"
                evaluated = {"expr_str": [value], "guards_code": value, "range_constraints": value}.get(key) or ()
                for text in evaluated:
                    if not _is_plain(str(text)):
                        yield f"has the expression {str(text)[:60]!r}, which is no sum or product of sizes"


def _is_plain(expression: str) -> bool:
    """Whether a text computes with sizes and does nothing else."""
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except (SyntaxError, ValueError):
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


def _entries(document: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of a JSON document, however deep."""
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in pairs:
        yield str(key), value
        yield from _entries(value)
