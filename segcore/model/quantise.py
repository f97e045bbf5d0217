"""Networks in 8-bit integers: made from an ONNX file and real pixels, and kept, so that it is done once.

Static quantisation (Jacob et al. 2018, arXiv:1712.05877), by NNCF: the scales of all tensors are fixed when the network
is made, from what it says about the pixels that it is calibrated on. So a network that is local stays local: no scale
depends on what else a window shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segcore.errors import ModelError
from segcore.files import sha256_of
from segcore.model.card import Model
from segcore.model.proved import versions
from segcore.model.segmenter import Floats, Integers

#: Raised whenever a change of this module, or of where `segcore.model.stages` crops, may change a network that it
#: makes: kept ones are then made again.
VERSION = 3


@dataclass(frozen=True, slots=True)
class Quantised:
    """A network in int8: its file, the SHA-256 of that, and the digest of the calibration that it was made in.

    It is a function of the model and the calibration, which names the scene and how it was read.
    """

    path: Path
    sha256: str
    calibration: str


def quantise(name: str, network: bytes, batches: Sequence[Sequence[Floats | Integers]], target: Path) -> str:
    """Write a network, given as ONNX, in int8 to `target`; returns its SHA-256. `name`: what errors call it.

    `batches`: the inputs that it is calibrated on, the first of each an image (N, C, *window), scaled. Weights are
    signed and have a scale for each channel, activations have one for each tensor, and what rounding shifts is given
    back to the biases. The first and the last convolutions stay in floats, as is usual: that halves the error (of a
    BasicUNet's labels 0.25 % differed, and not 0.45 %), and takes a twelfth to two fifths more time. The same network
    and batches give the same bytes. It is made in a process of its own, whose memory goes with it: NNCF holds much, and
    writes to the terminal. Raises ModelError where it cannot be made.
    """
    with tempfile.TemporaryDirectory() as folder:
        made, shown, source = Path(folder) / "int8.zip", [], Path(folder) / "network.onnx"
        source.write_bytes(network)
        for number, batch in enumerate(batches):
            shown.append(f"{folder}/{number}.npz")
            np.savez(shown[-1], *batch)
        request = json.dumps({"network": str(source), "batches": shown, "made": str(made)})
        command = [sys.executable, "-P", "-m", "segcore.model.quantise"]
        child = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
        if child.returncode or not made.is_file():
            reason = (child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"])[-1]
            raise ModelError(f"{name} cannot be quantised by NNCF: {reason.strip()}; leave --precision int8 out")
        put(made, target)
        return sha256_of(target)


def _quantise() -> None:
    """The child of `quantise`."""
    # NNCF imports it wherever it is installed, for networks of its own: that takes longer than all the rest.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import nncf
    import openvino

    request = json.load(sys.stdin)
    made = Path(request["made"])
    # From bytes, so that weights in files beside it, for which no digest vouches, are not found.
    network = openvino.Core().read_model(Path(request["network"]).read_bytes())
    _stride(network)
    batches = []
    for path in request["batches"]:
        with np.load(path) as inputs:
            batches.append([inputs[f"arr_{i}"] for i in range(len(inputs))])
    preset = nncf.QuantizationPreset.MIXED
    floats = nncf.IgnoredScope(names=sorted(_outermost(network)))
    quantised = nncf.quantize(
        network, nncf.Dataset(batches), preset=preset, subset_size=len(batches), ignored_scope=floats
    )
    _centre(quantised)
    openvino.save_model(quantised, made.with_suffix(".xml"), compress_to_fp16=False)
    with zipfile.ZipFile(made, "w") as archive:
        for suffix in (".xml", ".bin"):
            # Without the time, so that the same network is the same file.
            archive.writestr(zipfile.ZipInfo(f"network{suffix}"), made.with_suffix(suffix).read_bytes())


def _outermost(network: Any) -> set[str]:
    """Names of the convolutions that see the image itself, and of those whose sums the scores are."""

    def after(node: Any) -> list[Any]:
        return [entry.get_node() for output in node.outputs() for entry in output.get_target_inputs()]

    def before(node: Any) -> list[Any]:
        return [entry.get_source_output().get_node() for entry in node.inputs()]

    found = set[str]()
    # Its other inputs say where it is cropped.
    for waiting, following in ((network.get_parameters()[:1], after), (network.get_results(), before)):
        seen = set[str]()
        while waiting:
            node = waiting.pop()
            name = str(node.get_friendly_name())
            if "Convolution" in node.get_type_name():
                found.add(name)
            elif name not in seen:
                waiting += following(node)
            seen.add(name)
    return found


def _stride(network: Any) -> None:
    """Crop by StridedSlice and not by Slice, which NNCF takes for the end of what is in integers."""
    import openvino.opset13 as ops

    for node in network.get_ordered_ops():
        inputs = [entry.get_source_output() for entry in node.inputs()]
        if node.get_type_name() != "Slice" or inputs[1].get_node().get_type_name() != "Parameter":
            continue  # one of the network's own
        data, first, stop, *_ = inputs
        # Of images (N, C, *spatial), cropped along all axes but the first two.
        rank = data.get_partial_shape().rank.get_length()
        ends = [ops.concat([ops.constant(np.zeros(2, np.int64)), end], 0) for end in (first, stop)]
        mask = [1, 1] + [0] * (rank - 2)
        strided = ops.strided_slice(data, *ends, ops.constant(np.ones(rank, np.int64)), mask, mask)
        for entry in node.output(0).get_target_inputs():
            entry.replace_source_output(strided.output(0))
    network.validate_nodes_and_infer_types()


def _centre(network: Any) -> None:
    """Have what transposed convolutions take alone lie around zero, as OpenVINO runs them in integers only then.

    That takes a bit of a tensor whose numbers are mostly positive; in floats they took a seventh of a BasicUNet's time.
    What has other users, too, is left as it is. Biases were corrected before.
    """
    import openvino.opset13 as ops

    for node in network.get_ordered_ops():
        if node.get_type_name() != "ConvolutionBackpropData":  # those of groups are run in floats in any case
            continue
        rounded = node.input(0).get_source_output().get_node()
        while rounded.get_type_name() == "StridedSlice" and len(rounded.output(0).get_target_inputs()) == 1:
            rounded = rounded.input(0).get_source_output().get_node()
        if rounded.get_type_name() != "FakeQuantize" or len(rounded.output(0).get_target_inputs()) != 1:
            continue
        low, high = (np.asarray(rounded.input(i).get_source_output().get_node().data) for i in (1, 2))
        if (low >= 0).all():
            continue
        # In 256 steps, of which one more lies below zero than above.
        end = np.maximum(-low, high * 128 / 127)
        for first, value in ((1, -end), (2, end * 127 / 128)):
            centred = ops.constant(value.astype(np.float32)).output(0)
            for i in (first, first + 2):
                rounded.input(i).replace_source_output(centred)
    network.validate_nodes_and_infer_types()


def find_quantised(model: Model) -> Quantised | None:
    """The network in int8 that is kept of this model; None where there is none, or it is damaged."""
    for folder in _folders(model):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            fields = json.loads((folder / f"{_name(model)}.json").read_text())
            found = str(fields["sha256"])
            kept = Quantised(folder / f"{_name(model)}-{found[:16]}.zip", found, str(fields["calibration"]))
            if sha256_of(kept.path) == found:
                return kept
    return None


def keep_quantised(model: Model, made: Quantised) -> None:
    """Keep a network in int8 for other scenes and later runs, unless one is kept or no folder can be written.

    It lies beside the model; of a built-in model, or where that cannot be written, in the user's cache
    (`$XDG_CACHE_HOME/segflow`, `~/.cache/segflow`); and only in `$SEGFLOW_CACHE` where that is set.
    """
    if find_quantised(model) is not None:
        return
    for folder in _folders(model):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # The network first: what is said about it makes it found.
            put(made.path, folder / f"{_name(model)}-{made.sha256[:16]}.zip")
            said = folder / f"{_name(model)}.json"
            if said.exists():  # of a network that is damaged
                said.unlink()
            fields = {"model": model.digest, "sha256": made.sha256, "calibration": made.calibration}
            with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".partial") as unfinished:
                json.dump(fields, unfinished, indent=2)
                unfinished.flush()
                os.link(unfinished.name, said)  # of two runs at once the first wins: it does not replace
            return


def put(source: Path, target: Path) -> None:
    """Copy a file; at every moment the target is whole, or not there. Raises OSError."""
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _folders(model: Model) -> list[Path]:
    """Where networks of a model may be kept, the best first."""
    if chosen := os.environ.get("SEGFLOW_CACHE"):
        return [Path(chosen).absolute()]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segflow"
    return [cache] if model.built_in else [model.folder, cache]


def _name(model: Model) -> str:
    """What the files of its network in int8 begin with: another model or another way to quantise has another name."""
    # Where it is cropped is looked up in the graph as ONNX Runtime simplifies it.
    digest = hashlib.sha256(
        f"{model.digest} {VERSION} {versions('onnxruntime', 'onnxruntime-gpu')}".encode()
    ).hexdigest()
    return f"{model.card.name}-int8-{digest[:16]}"


if __name__ == "__main__":
    _quantise()
