"""Packing: from a network as people have it to a model folder, measured and verified.

    module, or class + state dict  ->  model.onnx, model.pt2 (torch.export), model.safetensors + class
    ONNX, TorchScript, .pt2        ->  the file itself
                                       + card.json: what its author says of it, and what was measured on it

Pickles that could run code are never loaded, and no class is imported but those of MONAI, of
segmentation-models-pytorch and of segflow.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from segcore.errors import CardError, ModelError, SegcoreError, one_line
from segcore.files import sha256_of
from segcore.model import load_segmenter
from segcore.model.card import Artifact, Card, Model, Network, check_card
from segcore.model.graph import copy_whole
from segcore.model.onnx import OnnxProbe
from segcore.model.probe import Probed, Sighting, bytes_per_pixel, probe
from segcore.model.segmenter import Floats
from segcore.model.torch import TorchProbe, build, load_module
from segcore.spec import times, usable_cores

#: Largest difference of scores, relative to their size (or to 1), between what was packed and the original.
SAME = 1e-4
#: Side of a window (pixels) where a network is not local and its draft says nothing, by number of axes.
WINDOW = {2: 512, 3: 128}
#: What is measured, and so not to be told.
MEASURED = ("artifacts", "stride", "local", "reach", "fixed_window", "bytes_per_pixel", "probe")

Kind = Literal["onnx", "torchscript", "torch-export", "state"]


@dataclass(frozen=True, slots=True)
class Packed:
    """A model as it was packed, what was found, and what its user should know."""

    model: Model
    sighting: Sighting
    notes: tuple[str, ...]


def pack(
    source: Path | torch.nn.Module, draft: Mapping[str, Any], folder: Path, network: Network | None = None
) -> Packed:
    """Make a model folder of a network.

    `source`: a module, an ONNX, TorchScript or torch.export file, or a state dict (safetensors, or .pt without code) of
    `network`. `draft`: the fields of a card that cannot be measured: name, version, license, citation, axes, channels,
    classes, scaling and so on. Every engine's scores are compared with the original's on sizes that differ from the
    one it was exported at. The folder must not exist; it is there only when all has gone well. Raises CardError,
    ModelError.
    """
    told = sorted(set(MEASURED) & set(draft))
    if told:
        raise CardError(f"the draft says {', '.join(told)}, which packing measures: leave them out")
    about = check_card(dict(draft) | _unmeasured(draft), "the draft")
    if folder.exists():
        raise ModelError(f"{folder} is there already; choose another place, or remove it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        packed = _fill(partial, source, about, draft, network)
        os.replace(partial, folder)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Packed(Model(packed.model.card, folder), packed.sighting, packed.notes)


def kind_of(path: Path) -> Kind:
    """What a file holds, by its content where that tells. Raises ModelError for what is none of these."""
    if not path.is_file():
        raise ModelError(f"{path} is no file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any("/code/" in name for name in names):
            return "torchscript"
        return "torch-export" if path.suffix == ".pt2" else "state"
    if path.suffix == ".onnx":
        return "onnx"
    if path.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin"):
        return "state"
    raise ModelError(
        f"{path} is no network that segflow knows: it packs ONNX (.onnx), TorchScript and torch.export (.pt2) files, "
        f"and state dicts (.safetensors, .pt, .pth)"
    )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, or of one inside a checkpoint. Raises ModelError for a pickle of anything else."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that it does not know
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is a pickle of more than tensors, and loading it could run any code: {one_line(error)}; save "
            f"`module.state_dict()` instead"
        ) from error
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise ModelError(f"{path} does not load: {one_line(error)}; is it whole?") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not (isinstance(found, Mapping) and found and all(isinstance(value, torch.Tensor) for value in found.values())):
        raise ModelError(f"{path} holds no state dict: a mapping of names to tensors, as `module.state_dict()` gives")
    return dict(found)


def _unmeasured(draft: Mapping[str, Any]) -> dict[str, Any]:
    """Measured fields for a draft that is only to be checked."""
    axes = str(draft.get("axes", "yx"))
    artifact = {"format": "onnx", "path": "model.onnx", "sha256": "0" * 64}
    return {"artifacts": [artifact], "stride": [1] * len(axes), "local": False}


def _fill(
    folder: Path, source: Path | torch.nn.Module, about: Card, draft: Mapping[str, Any], network: Network | None
) -> Packed:
    channels, ndim = len(about.channels), len(about.axes)
    kind = kind_of(source) if isinstance(source, Path) else "state"
    if kind != "state" and network is not None:
        raise CardError(f"{source} brings its own network; leave out {network.name}")
    artifacts: list[Artifact] = []
    notes: list[str] = []
    probed: Probed
    if kind == "state":
        module = _module(source, network)
        probed = TorchProbe(module, channels, usable_cores())
        sighting = probe(probed, channels, ndim)
        examples = _examples(sighting, channels)
        for write in (_write_onnx, _write_export, _write_safetensors):
            try:
                artifact = write(folder, module, network, sighting, examples[0])
                if artifact is not None:
                    _verify(Model(_card(about, draft, sighting, [artifact]), folder), probed, examples)
                    artifacts.append(artifact)
            except SegcoreError as error:
                notes.append(str(error))
        if not artifacts:
            raise ModelError("; ".join(notes))
    else:
        assert isinstance(source, Path)
        if kind == "onnx":
            path = folder / "model.onnx"
            copy_whole(source, path)
            probed = OnnxProbe(path, channels, usable_cores())
        else:
            path = folder / ("model.ts" if kind == "torchscript" else "model.pt2")
            shutil.copyfile(source, path)
            loaded = load_module(Artifact(format=kind, path=path.name, sha256="0" * 64), path)
            probed = TorchProbe(loaded, channels, usable_cores())
        artifacts.append(Artifact(format=kind, path=path.name, sha256=sha256_of(path)))
        sighting = probe(probed, channels, ndim)
        examples = _examples(sighting, channels)
        _verify(Model(_card(about, draft, sighting, artifacts), folder), probed, examples)
    outputs = probed(examples[0]).shape[1]
    if outputs != len(about.classes) and not (outputs == 1 and about.binary):
        raise CardError(
            f"the network gives {outputs} scores for each pixel, and the draft names {len(about.classes)} classes"
        )
    if sighting.reach is None and not sighting.sizes.fixed and "window" not in draft:
        notes.append(
            f"it is not local, and the draft names no window: {times(_window(sighting))} pixels were taken; set "
            f"`window` to the size that it was trained on"
        )
    # The card is written twice: a process that measures the memory has to load the model.
    _write_card(folder, _card(about, draft, sighting, artifacts))
    held = bytes_per_pixel(str(folder), channels, sighting)
    card = _card(about, draft, sighting, artifacts, bytes_per_pixel=float(f"{held:.3g}"))
    _write_card(folder, card)
    return Packed(Model(card, folder), sighting, tuple(notes))


def _module(source: Path | torch.nn.Module, network: Network | None) -> torch.nn.Module:
    if isinstance(source, torch.nn.Module):
        return source.cpu().float().eval()
    if network is None:
        raise CardError(
            f"{source} holds weights without a network; name its class and arguments (--network, --arguments)"
        )
    module, state = build(network), read_state(source)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"{source} does not fit {network.name} {network.arguments}: {' '.join(lines[1:3])}") from error
    return module.float().eval()


def _card(about: Card, draft: Mapping[str, Any], found: Sighting, artifacts: list[Artifact], **more: Any) -> Card:
    """The draft's card with what was measured."""
    local = found.reach is not None
    measured: dict[str, Any] = {
        "artifacts": [artifact.model_dump(mode="json") for artifact in artifacts],
        "stride": found.stride,
        "local": local,
        "reach": [b if b == a else (b, a) for b, a in found.reach] if found.reach else None,
        "fixed_window": found.sizes.fixed,
        "probe": {
            "engine": found.engine,
            "parameters": found.parameters,
            "flops_per_pixel": round(found.flops_per_pixel, 1),
            "sizes": str(found.sizes),
            "floods": found.floods,
        },
    }
    if found.sizes.fixed or (not local and about.window is None):
        window = _window(found)
        measured |= {"window": window, "overlap": draft.get("overlap") or tuple(side // 2 for side in window)}
    return check_card(dict(draft) | measured | more, "the card")


def _window(found: Sighting) -> tuple[int, ...]:
    if found.sizes.fixed:
        return found.sizes.shape
    side = WINDOW[len(found.stride)]
    return tuple(max(1, side // s) * s for s in found.stride)


def _examples(found: Sighting, channels: int) -> list[Floats]:
    """Noise of several sizes that the network accepts: `sizes.shape` and some cells more, differently by axis."""
    rng = np.random.default_rng(0)
    shapes = [
        tuple(
            n + (k + a) * s * bool(k) * bool(m)
            for a, (n, s, m) in enumerate(zip(found.sizes.shape, found.stride, found.sizes.multiple, strict=True))
        )
        for k in range(3)
    ]
    return [rng.standard_normal((1, channels, *shape)).astype(np.float32) for shape in dict.fromkeys(shapes)]


def _verify(model: Model, original: Probed, examples: list[Floats]) -> None:
    """Compare the scores of a packed artifact with the original's. Raises ModelError where they differ."""
    segmenter = load_segmenter(model, usable_cores())
    for example in examples:
        expected, got = original(example), segmenter(example)
        error = float(np.abs(expected - got).max()) / max(1.0, float(np.abs(expected).max()))
        if not error <= SAME:
            raise ModelError(
                f"{model.card.artifacts[0].path} gives other scores than the original on an image of "
                f"{times(example.shape[2:])}: they differ by {error:.2g}, and {SAME:g} is allowed"
            )


def _write_onnx(
    folder: Path, module: torch.nn.Module, network: Network | None, found: Sighting, example: Any
) -> Artifact:
    """ONNX with a free batch and free sizes, by way of torch.export."""
    path = folder / "model.onnx"
    with _quiet("ONNX"):
        exported = _export(module, found, example)
        program = torch.onnx.export(
            exported,
            (),
            input_names=["image"],
            output_names=["scores"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert program is not None
        program.save(path)
    return Artifact(format="onnx", path=path.name, sha256=sha256_of(path))


def _write_export(
    folder: Path, module: torch.nn.Module, network: Network | None, found: Sighting, example: Any
) -> Artifact:
    path = folder / "model.pt2"
    with _quiet("torch.export"):
        torch.export.save(_export(module, found, example), path)
    return Artifact(format="torch-export", path=path.name, sha256=sha256_of(path))


def _write_safetensors(
    folder: Path, module: torch.nn.Module, network: Network | None, found: Sighting, example: Any
) -> Artifact | None:
    if network is None:
        return None
    path = folder / "model.safetensors"
    # Tensors that share their memory are written once each: safetensors does not take them otherwise.
    save_file({name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()}, path)
    return Artifact(format="safetensors", path=path.name, sha256=sha256_of(path), network=network)


def _export(module: torch.nn.Module, found: Sighting, example: Any) -> torch.export.ExportedProgram:
    batch = np.concatenate([example, example])  # a batch of one would be taken for the only size
    free: dict[int, Any] = {0: torch.export.Dim("n")}
    for axis, (s, multiple) in enumerate(zip(found.stride, found.sizes.multiple, strict=True)):
        if multiple:
            free[2 + axis] = s * torch.export.Dim(f"s{axis}", min=2)
    with torch.no_grad():
        return torch.export.export(module, (torch.from_numpy(batch),), dynamic_shapes=(free,))


@contextlib.contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Exporters warn a lot and fail with whatever they like."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    except ImportError as error:
        raise ModelError(f"packing as {what} needs {error.name}; run `pip install 'segflow[pack]'`") from error
    except Exception as error:
        raise ModelError(f"the network cannot be packed as {what}: {one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


def _write_card(folder: Path, card: Card) -> None:
    text = json.dumps(card.model_dump(mode="json", exclude_unset=True), indent=2, ensure_ascii=False)
    (folder / "card.json").write_text(text + "\n", encoding="utf-8")
