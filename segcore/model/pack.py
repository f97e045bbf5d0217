"""Packing: from a network as people have it to a model folder, measured and verified.

    module, or class + state dict  ->  model.onnx, model.pt2 (torch.export), model.safetensors + class
    ONNX, TorchScript              ->  the file itself
                                       + card.json: what its author says of it, and what was measured on it

Pickles that could run code are never loaded, and no class is imported but those of MONAI, of
segmentation-models-pytorch and of segflow.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from segcore.errors import CardError, ModelError, SegcoreError, one_line
from segcore.files import sha256_of
from segcore.model import load_segmenter
from segcore.model.archive import Kind, kind_of, plain_export, read_state
from segcore.model.card import Artifact, Card, Model, NetworkClass, check_card
from segcore.model.graph import copy_whole, drop_comments
from segcore.model.memory import bytes_per_pixel
from segcore.model.onnx import OnnxNetwork
from segcore.model.probe import Network, Sighting, noise, probe
from segcore.model.segmenter import Floats
from segcore.model.torch import TorchNetwork, build, load_module
from segcore.spec import SAME_SCORES, times, usable_cores

#: Side of a window (pixels) where a network is not local and its draft says nothing, by number of axes.
WINDOW = {2: 512, 3: 128}
#: What is measured, and so not to be told.
MEASURED = ("artifacts", "stride", "local", "reach", "fixed_window", "bytes_per_pixel", "probe")


@dataclass(frozen=True, slots=True)
class Packed:
    """A model as it was packed, what was found, and what its user should know."""

    model: Model
    sighting: Sighting
    notes: tuple[str, ...]


def pack(
    source: Path | torch.nn.Module, draft: Mapping[str, Any], folder: Path, network: NetworkClass | None = None
) -> Packed:
    """Make a model folder of a network.

    `source`: a module, an ONNX or TorchScript file, or a state dict (safetensors, or .pt without code) of `network`.
    `draft`: the fields of a card that cannot be measured: name, version, license, citation, axes, channels, classes,
    scaling and so on. The scores of what is written are compared with the original's on sizes that differ from the
    one it was exported at. The folder must not exist; it is there only when all has gone well. Raises CardError,
    ModelError.
    """
    told = sorted(set(MEASURED) & set(draft))
    if told:
        raise CardError(f"the draft says {', '.join(told)}, which packing measures: leave them out")
    about = check_card(dict(draft) | _unmeasured(draft), "the draft")
    folder = Path(folder)
    if folder.exists():
        raise ModelError(f"{folder} is there already; choose another place, or remove it")
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        packed = _fill(unfinished, source, about, draft, network)
        os.replace(unfinished, folder)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Packed(Model(packed.model.card, folder), packed.sighting, packed.notes)


def _unmeasured(draft: Mapping[str, Any]) -> dict[str, Any]:
    """Measured fields for a draft that is only to be checked."""
    axes = str(draft.get("axes", "yx"))
    artifact = {"format": "onnx", "path": "model.onnx", "sha256": "0" * 64}
    return {"artifacts": [artifact], "stride": [1] * len(axes), "local": False}


def _fill(
    folder: Path, source: Path | torch.nn.Module, about: Card, draft: Mapping[str, Any], network: NetworkClass | None
) -> Packed:
    """Weights and card, into a folder that is there."""
    kind = kind_of(source) if isinstance(source, Path) else "state"
    if kind == "state":
        made = _from_module(folder, _module(source, network), about, draft, network)
    elif network is not None:
        raise CardError(f"{source} brings its own network; leave out {network.name}")
    else:
        assert isinstance(source, Path)
        made = _from_file(folder, source, kind, about, draft)
    sighting, artifacts, notes = made
    if sighting.reach is None and not sighting.sizes.fixed and about.window is None:
        notes.append(
            f"it is not local, and the draft names no window: {times(_window(sighting, about))} pixels were taken; set "
            f"`window` to the size that it was trained on"
        )
    # The card is written twice: a process that measures the memory has to load the model.
    _write_card(folder, _card(about, draft, sighting, artifacts))
    held = bytes_per_pixel(str(folder), len(about.channels), sighting, about.window)
    card = _card(about, draft, sighting, artifacts, bytes_per_pixel=float(f"{held:.3g}"))
    _write_card(folder, card)
    return Packed(Model(card, folder), sighting, tuple(notes))


def _from_module(
    folder: Path, module: torch.nn.Module, about: Card, draft: Mapping[str, Any], network: NetworkClass | None
) -> tuple[Sighting, list[Artifact], list[str]]:
    """Write a module in every format that works, and say which do not."""
    channels, ndim = len(about.channels), len(about.axes)
    # A copy, since an engine may take it to another device.
    original = TorchNetwork(deepcopy(module), channels, usable_cores())
    sighting = probe(original, channels, ndim)
    examples = _examples(sighting, channels)
    _check_outputs(original, examples[0], about)
    artifacts, notes = list[Artifact](), list[str]()
    # Traced once, for both of the formats that are made of a trace.
    export = cache(lambda: _export(module, sighting, examples[0]))
    writers: list[Callable[[], Artifact]] = [
        partial(_write_onnx, folder, export),
        partial(_write_export, folder, export),
    ]
    if network is not None:
        writers.append(partial(_write_safetensors, folder, module, network))
    for write in writers:
        try:
            artifact = write()
            _verify(Model(_card(about, draft, sighting, [artifact]), folder), original, examples)
            artifacts.append(artifact)
        except SegcoreError as error:
            notes.append(str(error))
    if not artifacts:
        raise ModelError("; ".join(notes))
    kept = {artifact.path for artifact in artifacts}
    for path in list(folder.iterdir()):
        if path.name not in kept:
            path.unlink()
    if artifacts[0].format == "onnx":
        # This is what will run; and NaN may hide, which marks in a graph cannot. But not every operator has marks.
        with contextlib.suppress(ModelError):
            graph = OnnxNetwork(folder / "model.onnx", channels, usable_cores())
            # Exporters fold parameters into each other: the module's own number is the right one.
            sighting = replace(probe(graph, channels, ndim), parameters=sighting.parameters)
    return sighting, artifacts, notes


def _from_file(
    folder: Path, source: Path, kind: Kind, about: Card, draft: Mapping[str, Any]
) -> tuple[Sighting, list[Artifact], list[str]]:
    """Take a file that is a network as it is."""
    channels = len(about.channels)
    network: Network
    if kind == "onnx":
        path = folder / "model.onnx"
        copy_whole(source, path)
        network = OnnxNetwork(path, channels, usable_cores())
        artifact = Artifact(format="onnx", path=path.name, sha256=sha256_of(path))
    elif kind == "torchscript":
        path = folder / "model.ts"
        shutil.copyfile(source, path)
        artifact = Artifact(format="torchscript", path=path.name, sha256=sha256_of(path))
        network = TorchNetwork(load_module(artifact, path), channels, usable_cores())
    else:
        raise ModelError(
            f"{source} is an archive of torch.export, which may bring code along; pack the module that it was made "
            f"of, or export that to ONNX"
        )
    sighting = probe(network, channels, len(about.axes))
    _check_outputs(network, _examples(sighting, channels)[0], about)
    return sighting, [artifact], []


def _check_outputs(network: Network, example: Floats, about: Card) -> None:
    outputs = network(example).shape[1]
    if outputs != len(about.classes) and not (outputs == 1 and about.binary):
        raise CardError(
            f"the network gives {outputs} scores for each pixel, and the draft names {len(about.classes)} classes"
        )


def _module(source: Path | torch.nn.Module, network: NetworkClass | None) -> torch.nn.Module:
    """The network that is to be packed, in evaluation mode and float32; what was given stays as it was."""
    if isinstance(source, torch.nn.Module):
        return deepcopy(source).cpu().float().eval()
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
    if not local:
        window = _window(found, about)
        overlap = tuple(side // 2 for side in window) if about.overlap is None else about.overlap
        measured |= {"window": window, "overlap": overlap}
    return check_card(dict(draft) | measured | more, "the card")


def _window(found: Sighting, about: Card) -> tuple[int, ...]:
    """The windows of a network that is not local: its only size, or the draft's, or a usual one."""
    if found.sizes.fixed:
        return found.sizes.shape
    if about.window is not None:
        return about.window
    side = WINDOW[len(found.stride)]
    return tuple(max(1, side // s) * s for s in found.stride)


def _examples(found: Sighting, channels: int) -> list[Floats]:
    """Noise of several sizes that the network accepts: `sizes.shape` and some cells more, differently by axis."""
    shapes = []
    for k in range(3):
        axes = enumerate(zip(found.sizes.shape, found.stride, found.sizes.multiple, strict=True))
        # Two cells at least: exporters take a size of one for the only one.
        shapes.append(tuple(max(n, 2 * s) + (k + a) * s * bool(k) if m else n for a, (n, s, m) in axes))
    return [noise((1, channels, *shape)) for shape in dict.fromkeys(shapes)]


def _verify(model: Model, original: Network, examples: list[Floats]) -> None:
    """Compare the scores of a packed artifact with the original's. Raises ModelError where they differ."""
    segmenter = load_segmenter(model, usable_cores())
    for example in examples:
        expected, got = original(example), segmenter(example)
        error = float(np.abs(expected - got).max()) / max(1.0, float(np.abs(expected).max()))
        if not error <= SAME_SCORES:
            raise ModelError(
                f"{model.card.artifacts[0].path} gives other scores than the original on an image of "
                f"{times(example.shape[2:])}: they differ by {error:.2g}, and {SAME_SCORES:g} is allowed"
            )


def _write_onnx(folder: Path, export: Callable[[], torch.export.ExportedProgram]) -> Artifact:
    """ONNX with a free batch and free sizes."""
    path = folder / "model.onnx"
    with _quiet("ONNX"):
        program = torch.onnx.export(
            export(),
            (),
            input_names=["image"],
            output_names=["scores"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert program is not None
        program.save(path)
        drop_comments(path)
    return Artifact(format="onnx", path=path.name, sha256=sha256_of(path))


def _write_export(folder: Path, export: Callable[[], torch.export.ExportedProgram]) -> Artifact:
    path = folder / "model.pt2"
    with _quiet("torch.export"):
        # By way of memory: on a full disk its own writer ends the process.
        content = io.BytesIO()
        torch.export.save(export(), content)
        path.write_bytes(plain_export(content.getvalue(), "its graph"))
    return Artifact(format="torch-export", path=path.name, sha256=sha256_of(path))


def _write_safetensors(folder: Path, module: torch.nn.Module, network: NetworkClass) -> Artifact:
    path = folder / "model.safetensors"
    # Tensors that share their memory are written once each: safetensors does not take them otherwise.
    path.write_bytes(save({name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()}))
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
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    except ImportError as error:
        raise ModelError(f"packing as {what} needs {error.name}; run `pip install 'segflow[pack]'`") from error
    except Exception as error:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", one_line(error))
        raise ModelError(
            f"the network cannot be packed as {what}: {reason}; where you can, export it to ONNX and pack that"
        ) from error
    finally:
        logging.disable(disabled)


def _write_card(folder: Path, card: Card) -> None:
    text = json.dumps(card.model_dump(mode="json", exclude_unset=True), indent=2, ensure_ascii=False)
    (folder / "card.json").write_text(text + "\n", encoding="utf-8")
