"""OpenVINO: the quickest engine for convolutions on a CPU, in float32, bfloat16 and, made by `quantise`, integers."""

from __future__ import annotations

import contextlib
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino

from segcore.box import Box
from segcore.errors import ModelError, one_line
from segcore.model.segmenter import Floats, Integers, Part, Segmenter, failure
from segcore.spec import Precision, times

#: Layers of which it keeps what it has compiled for a size.
_KEPT = 64


def check_bf16() -> None:
    """Raises ModelError where this processor has no arithmetic for bfloat16."""
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ModelError(
            "this processor has no arithmetic for bfloat16 (AVX512-BF16 or AMX), which would be slower than fp32; "
            "leave --precision bf16 out, or try --precision int8"
        )


class OpenVinoPart:
    """A part of a network as ONNX, on the CPU, with one output. Raises ModelError where it does not load."""

    def __init__(
        self,
        model: bytes,
        threads: int,
        chunks: bool = False,
        weights: bytes | None = None,
        streams: int = 1,
        floats: str = "f32",
    ) -> None:
        """`weights`: of a network in OpenVINO's own format; `streams`: how many runs share the threads; `floats`: what
        floats are rounded to, f32 or bf16. What is run chunk after chunk is run like anything.
        """
        if floats == "bf16":
            check_bf16()
        how = f"CPU, {threads} threads" + (", bf16" if floats == "bf16" else "")
        self.engine = f"openvino {openvino.get_version().split('-')[0]} ({how})"
        # Said in any case: floats would else be rounded to bfloat16 wherever the CPU has it.
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": floats,
            "ENABLE_CPU_PINNING": False,
            # What it compiles for a size of window it would keep for thousands of them: an archive has as many.
            "CPU_RUNTIME_CACHE_CAPACITY": _KEPT,
        }
        try:
            core = openvino.Core()
            if weights is None:
                network = core.read_model(model)
            else:
                network = core.read_model(model, openvino.Tensor(np.frombuffer(weights, np.uint8).copy()))
            self._compiled = core.compile_model(network, "CPU", options)
            self._requests: list[openvino.InferRequest] = []
        except Exception as error:  # openvino's exceptions share no base but RuntimeError, and texts of many lines
            raise ModelError(f"does not load in OpenVINO: {_reason(error)}") from error

    def __call__(self, given: Sequence[Floats | Integers], last: bool = False) -> Floats:
        (made,) = self.run_all([given])
        if last:
            self.release()
        return made

    @property
    def inputs(self) -> int:
        """How many inputs it takes."""
        return len(self._compiled.inputs)

    def release(self) -> None:
        """Give back all arrays; a request holds what it was given and what came out, too."""
        self._requests.clear()
        self._compiled.release_memory()

    def run_all(self, all_given: Sequence[Sequence[Floats | Integers]]) -> list[Floats]:
        """Run it on several inputs, side by side."""
        try:
            while len(self._requests) < len(all_given):
                self._requests.append(self._compiled.create_infer_request())
            # Inputs are shared with the engine, and so must live as long as it is at work.
            shown = [{i: np.ascontiguousarray(array) for i, array in enumerate(given)} for given in all_given]
            under_way = list(zip(self._requests, shown, strict=False))
            for request, inputs in under_way:
                request.start_async(inputs, share_inputs=True)
            for request, _ in under_way:
                request.wait()
            # Copies: a request's own memory is filled again by the next call.
            return [np.array(request.get_output_tensor(0).data, dtype=np.float32) for request, _ in under_way]
        except Exception as error:
            for request in self._requests:  # the others are still at work
                with contextlib.suppress(Exception):
                    request.wait()
            self._requests.clear()
            shapes = ", ".join(times(array.shape) for given in all_given for array in given)
            raise failure("OpenVINO", f"a batch of shape {shapes}", _reason(error)) from error


class OpenVinoSegmenter:
    """A network as an ONNX file, or one in int8 that `segcore.model.quantise` made (.zip), with one input and output.

    Raises ModelError where it does not load.
    """

    def __init__(self, path: Path, threads: int, streams: int = 1, precision: Precision = "fp32") -> None:
        """`streams`: how many windows are run side by side, each on its share of the threads; `precision`: of an ONNX
        file. In bfloat16 all sums are kept in float32. A network in int8 of several inputs is run by its `network`.
        """
        try:
            # From bytes, so that weights in files beside it, for which no digest vouches, are not found.
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    model, weights = archive.read("network.xml"), archive.read("network.bin")
                self.network = OpenVinoPart(model, threads, weights=weights, streams=streams)
            else:
                floats = "bf16" if precision == "bf16" else "f32"
                self.network = OpenVinoPart(path.read_bytes(), threads, streams=streams, floats=floats)
        except (OSError, KeyError, zipfile.BadZipFile, ModelError) as error:
            raise ModelError(f"{path}: {one_line(error)}") from error
        self.device, self.engine = threading.Lock(), self.network.engine
        self.batch = streams

    def release(self) -> None:
        self.network.release()

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        if self.batch == 1:
            return self.network([batch])
        return np.concatenate(self.network.run_all([[window[None]] for window in batch]))


def _reason(error: Exception) -> str:
    """The last line of its text: the first ones name places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(RuntimeError(lines[-1] if lines else repr(error)))


def _conforms(segmenter: OpenVinoSegmenter, part: OpenVinoPart) -> tuple[Segmenter, Part]:
    return segmenter, part
