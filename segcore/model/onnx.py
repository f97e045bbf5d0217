"""ONNX through ONNX Runtime: the engine of whatever exports."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import onnxruntime

from segcore.box import Box
from segcore.errors import ModelError, one_line
from segcore.model.probe import Network
from segcore.model.segmenter import Floats, Integers, Part, Segmenter, failure
from segcore.spec import times

# Too late where it was imported before, as the environment was not set then; but better than nothing.
if os.environ.get("ORT_DISABLE_TELEMETRY") != "0":
    onnxruntime.disable_telemetry_events()


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """How a session is run: on so many threads, silent, and by itself without an arena."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what it would print is raised as well
    # Workers hold images beside the network; an arena that only grows would break the memory budget.
    options.enable_cpu_mem_arena = False
    return options


def _engine(where: str) -> str:
    return f"onnxruntime {onnxruntime.__version__} ({where})"


def has_gpu() -> bool:
    """Whether this ONNX Runtime was built for a GPU. Whether there is one shows where a network is loaded."""
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _last() -> onnxruntime.RunOptions:
    """Of a run after which the arena is given back."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


class OnnxSegmenter:
    """An ONNX file with one input and one output, in float32. Raises ModelError where it does not load."""

    def __init__(self, path: Path, threads: int, streams: int = 1) -> None:
        """`streams`: how many windows, all of one size, are run side by side on a CPU, sharing the threads."""
        # TF32 keeps 10 bits of a float32: too few for the scores of tiles to be those of the whole.
        options_of = {"CUDAExecutionProvider": {"use_tf32": 0}, "CPUExecutionProvider": {}}
        available = onnxruntime.get_available_providers()
        providers = [(name, given) for name, given in options_of.items() if name in available]
        if has_gpu():
            streams = 1
        # Each of several brings a thread of its own. These need not wait for one another, as those of one window do
        # after every layer: where another program has a core, that takes twice the time.
        options = session_options(threads - streams + 1)
        # It does not grow where all are of one size; without it each thread's heap keeps what both of them need.
        options.enable_cpu_mem_arena = streams > 1
        try:
            # From bytes, so that weights in files beside it, for which no digest vouches, are not found.
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise ModelError(
                f"{path} does not load in ONNX Runtime: {one_line(error)}; copy it again, or export the network again"
            ) from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            found = ", ".join(f"{i.name}: {i.type}" for i in inputs)
            raise ModelError(f"{path} has the inputs {found}; segflow wants one, of float32")
        outputs = [output.name for output in self._session.get_outputs()]
        if len(outputs) != 1:
            raise ModelError(
                f"{path} has the outputs {', '.join(outputs)}; segflow wants one, the scores: cut the others off with "
                f"onnx.utils.extract_model"
            )
        self._input, self._output = inputs[0].name, outputs[0]
        self.device = threading.Lock()
        on = "CUDA" if self._session.get_providers()[0].startswith("CUDA") else f"CPU, {threads} threads"
        self.engine = _engine(on)
        self.batch = streams if on.startswith("CPU") else 16
        self._crew = ThreadPoolExecutor(streams) if self.batch == streams > 1 else None
        #: Shape of the windows that fill the arena.
        self._shown: tuple[int, ...] | None = None

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        if self._crew is None:
            return self._run(batch)
        self._shown = batch.shape[1:]
        runs = [self._crew.submit(self._run, window) for window in np.split(batch, len(batch))]
        wait(runs)  # also where one fails: nothing is under way when this ends
        return np.concatenate([run.result() for run in runs])

    def _run(self, batch: Floats, options: onnxruntime.RunOptions | None = None) -> Floats:
        try:
            out = self._session.run([self._output], {self._input: batch}, options)[0]
        except Exception as error:
            raise failure("ONNX Runtime", f"a batch of shape {batch.shape}", one_line(error)) from error
        return np.asarray(out, dtype=np.float32)

    def release(self) -> None:
        """Give back the arena: that is done at the end of a run, for which one window of nothing has to do."""
        if self._shown is not None:
            self._run(np.zeros((1, *self._shown), np.float32), _last())
            self._shown = None


class OnnxPart:
    """A part of a network, on the CPU. `chunks`: whether it is run chunk after chunk. Raises ModelError."""

    def __init__(self, model: bytes, threads: int, chunks: bool) -> None:
        options = session_options(threads)
        self.engine = _engine(f"CPU, {threads} threads")
        self._keeps = chunks
        if chunks:
            # An arena spares it new pages for every chunk, and is given back after the last.
            options.enable_cpu_mem_arena = True
            # By a pattern it would take, on the second chunk, all that it needs once more, in one piece.
            options.enable_mem_pattern = False
            # Several parts take turns: the idle threads of one would spin in the way of the next.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise ModelError(f"a part of the network does not load in ONNX Runtime: {one_line(error)}") from error

    def __call__(self, given: Sequence[Floats | Integers], last: bool = False) -> Floats:
        options = _last() if last and self._keeps else None
        names = (declared.name for declared in self._session.get_inputs())
        inputs = {name: np.ascontiguousarray(array) for name, array in zip(names, given, strict=True)}
        try:
            return np.asarray(self._session.run(None, inputs, options)[0], dtype=np.float32)
        except Exception as error:
            shapes = " and ".join(times(array.shape) for array in given)
            raise failure("ONNX Runtime", f"a part of shape {shapes}", one_line(error)) from error

    def release(self) -> None:
        """There is nothing to give back after the last of a pass."""


class OnnxNetwork(OnnxSegmenter):
    """An ONNX file under the probe: what its outputs depend on is bounded by its graph. Raises ModelError."""

    def __init__(self, path: Path, channels: int, threads: int) -> None:
        # Imported here: labelling tiles does without it.
        from segcore.model.graph import OnnxGraph

        graph = OnnxGraph(path, threads)  # first, for its messages are better
        graph.channels = channels  # a file may leave them free
        super().__init__(path, threads)
        self.spatial: tuple[int | None, ...] | None = graph.spatial
        self.parameters = graph.parameters
        self.footprint, self.flooding, self.trace = graph.footprint, graph.flooding, graph.trace


def _conforms(segmenter: OnnxSegmenter, part: OnnxPart, probe: OnnxNetwork) -> tuple[Segmenter, Part, Network]:
    return segmenter, part, probe
