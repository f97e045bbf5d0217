"""OpenVINO: the quickest engine for convolutions on a CPU, in float32 and, made by `quantise`, in 8-bit integers."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino

from segcore.box import Box
from segcore.errors import ModelError, one_line
from segcore.model.segmenter import Floats, Part, Segmenter, failure
from segcore.spec import times


class OpenVinoPart:
    """A part of a network as ONNX, on the CPU, with one output. Raises ModelError where it does not load."""

    def __init__(self, model: bytes, threads: int, chunks: bool = False, weights: bytes | None = None) -> None:
        """`weights`: of a network in OpenVINO's own format. What is run chunk after chunk is run like anything."""
        # Floats as they are: they would else be rounded to bfloat16 where the CPU has it.
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        try:
            core = openvino.Core()
            if weights is None:
                network = core.read_model(model)
            else:
                network = core.read_model(model, openvino.Tensor(np.frombuffer(weights, np.uint8).copy()))
            self._compiled = core.compile_model(network, "CPU", options)
            self._request: openvino.InferRequest | None = None
        except Exception as error:  # openvino's exceptions share no base but RuntimeError, and texts of many lines
            raise ModelError(f"does not load in OpenVINO: {_reason(error)}") from error

    def __call__(self, given: Sequence[Floats], last: bool = False) -> Floats:
        inputs = {i: np.ascontiguousarray(array) for i, array in enumerate(given)}
        try:
            self._request = self._request or self._compiled.create_infer_request()
            # A copy: the request's own memory is filled again by the next call.
            made = np.array(self._request.infer(inputs, share_inputs=True, share_outputs=True)[0], dtype=np.float32)
            if last:  # a request holds what it was given and what came out
                self._request = None
                self._compiled.release_memory()
        except Exception as error:
            shapes = " and ".join(times(array.shape) for array in given)
            raise failure("OpenVINO", f"a batch of shape {shapes}", _reason(error)) from error
        return made


class OpenVinoSegmenter:
    """A network as an ONNX file, or one in int8 that `segcore.model.quantise` made (.zip), with one input and output.

    Raises ModelError where it does not load.
    """

    def __init__(self, path: Path, threads: int) -> None:
        try:
            # From bytes, so that weights in files beside it, for which no digest vouches, are not found.
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    model, weights = archive.read("network.xml"), archive.read("network.bin")
                self._network = OpenVinoPart(model, threads, weights=weights)
            else:
                self._network = OpenVinoPart(path.read_bytes(), threads)
        except (OSError, KeyError, zipfile.BadZipFile, ModelError) as error:
            raise ModelError(f"{path}: {one_line(error)}") from error
        self.device = threading.Lock()
        self.engine = f"openvino {openvino.get_version().split('-')[0]} (CPU, {threads} threads)"
        self.batch = 1

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        return self._network([batch])


def _reason(error: Exception) -> str:
    """The last line of its text: the first ones name places in OpenVINO's source."""
    return one_line(RuntimeError([line for line in str(error).splitlines() if line.strip()][-1:] or [repr(error)]))


def _conforms(segmenter: OpenVinoSegmenter, part: OpenVinoPart) -> tuple[Segmenter, Part]:
    return segmenter, part
