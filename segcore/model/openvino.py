"""OpenVINO: the engine of networks in 8-bit integers on a CPU. An extra: `pip install 'segflow[openvino]'`."""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path

import numpy as np

from segcore.box import Box
from segcore.errors import ModelError, one_line
from segcore.model.segmenter import Floats, Segmenter


class OpenVinoSegmenter:
    """A network that `segcore.model.quantise` made. Raises ModelError where it does not load."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        # Floats as they are: what is not in integers would else be rounded to bfloat16 where the CPU has it.
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        try:
            core = openvino.Core()
            with zipfile.ZipFile(path) as archive:
                weights = openvino.Tensor(np.frombuffer(archive.read("network.bin"), np.uint8).copy())
                network = core.read_model(archive.read("network.xml"), weights)
            compiled = core.compile_model(network, "CPU", options)
            self._request = compiled.create_infer_request()
        except Exception as error:  # openvino's exceptions share no base but RuntimeError, and texts of many lines
            raise ModelError(f"{path} does not load in OpenVINO: {_reason(error)}") from error
        self.device = threading.Lock()
        self.engine = f"openvino {openvino.get_version().split('-')[0]} (CPU, {threads} threads)"
        self.batch = 1

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        try:
            out = self._request.infer({0: batch}, share_inputs=True)[0]
        except Exception as error:
            raise ModelError(f"OpenVINO failed on a batch of shape {batch.shape}: {_reason(error)}") from error
        return np.array(out, dtype=np.float32)  # a copy: the request's own memory is filled again by the next call


def _reason(error: Exception) -> str:
    """The last line of its text: the first ones name places in OpenVINO's source."""
    return one_line(RuntimeError([line for line in str(error).splitlines() if line.strip()][-1:] or [repr(error)]))


def _conforms(segmenter: OpenVinoSegmenter) -> Segmenter:
    return segmenter
