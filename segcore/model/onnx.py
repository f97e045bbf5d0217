"""ONNX through ONNX Runtime: the default engine on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from segcore.box import Box
from segcore.errors import ModelError, one_line
from segcore.model.probe import ROUNDING, Network, noise
from segcore.model.segmenter import Floats, Segmenter, failure
from segcore.spec import times
from segcore.staging import Staging, chunks, inside

#: What sides of a small window must be multiples of, for most networks and for those that halve it six times or seven.
_CELLS = (32, 64, 128)


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """How every session is run: on so many threads, silent, and without an arena."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what it would print is raised as well
    # Workers hold images beside the network; an arena that only grows would break the memory budget.
    options.enable_cpu_mem_arena = False
    return options


class OnnxSegmenter:
    """An ONNX file with one input and one output, in float32. Raises ModelError where it does not load."""

    def __init__(self, path: Path, threads: int) -> None:
        available = onnxruntime.get_available_providers()
        # TF32 keeps 10 bits of a float32: too few for the scores of tiles to be those of the whole.
        options_of = {"CUDAExecutionProvider": {"use_tf32": 0}, "CPUExecutionProvider": {}}
        providers = [(name, given) for name, given in options_of.items() if name in available]
        try:
            # From bytes, so that weights in files beside it, for which no digest vouches, are not found.
            self._session = onnxruntime.InferenceSession(
                path.read_bytes(), session_options(threads), providers=providers
            )
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise ModelError(f"{path} does not load in ONNX Runtime: {one_line(error)}") from error
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
        self.engine = f"onnxruntime {onnxruntime.__version__} ({on})"
        self.batch = 1 if on.startswith("CPU") else 16

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        try:
            out = self._session.run([self._output], {self._input: batch})[0]
        except Exception as error:
            raise failure("ONNX Runtime", f"a batch of shape {batch.shape}", one_line(error)) from error
        return np.asarray(out, dtype=np.float32)


class StagedSegmenter(OnnxSegmenter):
    """An ONNX file, windows of which that are larger than a chunk are run in stages, on a CPU (`segcore.staging`).

    Windows that fit in one chunk, and those whose sides do not fit the levels, are run in one pass. When made, each
    level is run on noise in both ways. Raises ModelError where these differ, where the network has no such stages, and
    where the file does not load. A window in chunks that are too small raises PlanError.
    """

    def __init__(self, path: Path, threads: int, channels: int, staging: Staging) -> None:
        # Imported here: running in one pass does without it.
        from segcore.model.stages import find_stages

        super().__init__(path, threads)
        cut = find_stages(path, channels, threads)
        if cut is None or len(cut.stages.levels) < staging.levels:
            found = len(cut.stages.levels) if cut else 0
            raise ModelError(
                f"{path} is to be run with {staging.levels} levels in chunks, and has {found} that can be; run it in "
                f"one pass"
            )
        self.stages, self._staging, self._cut, self._threads = cut.stages, staging, cut, threads
        self._down = [_chunk_session(part, threads) for part in cut.down[: staging.levels]]
        self._up = [_chunk_session(part, threads) for part in cut.up[: staging.levels]]
        self._inner: tuple[int, onnxruntime.InferenceSession] | None = None
        for depth in range(staging.levels):
            self._prove(path, depth)

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        window = batch.shape[2:]
        depth = self.stages.depth(window, self._staging)
        if depth == 0:
            return super().__call__(batch)
        box = Box.of(window) if wanted is None else wanted
        # What is not wanted is not touched, and so takes no memory.
        scores = np.empty((len(batch), self.stages.scores, *window), np.float32)
        for image, out in zip(batch, scores, strict=True):
            self._rise(
                out[(None, slice(None), *box.slices())], image[None], 0, box, Staging(depth, self._staging.chunk)
            )
        return scores

    def _rise(self, out: Floats, image: Floats, depth: int, wanted: Box, staging: Staging) -> None:
        """Write what rises to a level in a wanted box of its grid. `image`: what has gone down to it."""
        level, shape = self.stages.levels[depth], image.shape[2:]
        below = inside(wanted, shape, level)
        risen = self._risen(self._pooled(image, depth, staging), depth + 1, below, staging)
        pieces = chunks(shape, wanted, level.up_halo, level.factor, staging.chunk)
        for chunk in pieces:
            shown = [image[_at(chunk.read)], risen[_at(chunk.read.coarse(level.factor), below.start)]]
            given = [array for array, taken in zip(shown, self._cut.takes[depth], strict=True) if taken]
            core = chunk.core & wanted
            out[_at(core, wanted.start)] = _run(self._up[depth], given, chunk is pieces[-1])[
                _at(core, chunk.read.start)
            ]

    def _pooled(self, image: Floats, depth: int, staging: Staging) -> Floats:
        """What goes down from a level."""
        level, shape = self.stages.levels[depth], image.shape[2:]
        whole = Box.of(shape)
        pooled = np.empty((1, level.pooled, *whole.coarse(level.factor).shape), np.float32)
        pieces = chunks(shape, whole, level.down_halo, level.factor, staging.chunk)
        for chunk in pieces:
            core, read = chunk.core.coarse(level.factor), chunk.read.coarse(level.factor)
            found = _run(self._down[depth], [image[_at(chunk.read)]], chunk is pieces[-1])
            pooled[_at(core)] = found[_at(core, read.start)]
        _release()
        return pooled

    def _risen(self, pooled: Floats, depth: int, wanted: Box, staging: Staging) -> Floats:
        """What rises from a level, in a wanted box of its grid."""
        if depth == staging.levels:
            whole = _run(self._inside(depth), [pooled])
            _release()
            return whole[_at(wanted)]
        risen = np.empty((1, self.stages.levels[depth - 1].risen, *wanted.shape), np.float32)
        self._rise(risen, pooled, depth, wanted, staging)
        return risen

    def _inside(self, depth: int) -> onnxruntime.InferenceSession:
        """The part inside of so many levels. One is kept: windows are mostly of one size, and weights are large."""
        if self._inner is None or self._inner[0] != depth:
            self._inner = None
            self._inner = depth, _session(self._cut.inner[depth], session_options(self._threads))
        return self._inner[1]

    def _prove(self, path: Path, depth: int) -> None:
        """Compare what a level and all inside of it give in small chunks, and in one pass."""
        level = self.stages.levels[depth]
        channels = self.stages.levels[depth - 1].pooled if depth else self.stages.channels
        for cell in _CELLS:
            # Two chunks along each axis, and more along the first, so that some do not touch the border there.
            sides = [-(-(n + 2 * f) // cell) * cell for n, f in zip(level.least, level.factor, strict=True)]
            chunk = tuple(
                max(n + f, side * 3 // 4 // f * f) for n, f, side in zip(level.least, level.factor, sides, strict=True)
            )
            image = noise((1, channels, 2 * sides[0], *sides[1:]))
            try:
                plain = _run(self._inside(depth), [image])
            except ModelError as error:
                reason = error
                continue
            staged = np.empty_like(plain)
            self._rise(staged, image, depth, Box.of(image.shape[2:]), Staging(depth + 1, chunk))
            error_size = float(np.abs(plain - staged).max()) / max(float(np.abs(plain).max()), 1e-6)
            if error_size <= ROUNDING["CPU"]:
                return
            raise ModelError(
                f"{path} gives other scores in chunks than in one pass, by {error_size:.2g} of their size in "
                f"{times(image.shape[2:])} pixels of level {depth}; run it in one pass"
            )
        raise ModelError(f"{path} cannot be tried in chunks: {reason}")


def _session(model: bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A part of a network, on the CPU. Raises ModelError."""
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        raise ModelError(f"a part of the network does not load in ONNX Runtime: {one_line(error)}") from error


def _chunk_session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """A part that is run chunk after chunk: an arena spares it new pages for every chunk, and is given back after."""
    options = session_options(threads)
    options.enable_cpu_mem_arena = True
    # Several parts take turns: the idle threads of one would spin in the way of the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return _session(model, options)


def _release() -> None:
    """Give memory that was freed back to the system: the next stage frees and takes arrays of other sizes."""
    with contextlib.suppress(AttributeError, OSError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _run(session: onnxruntime.InferenceSession, given: Sequence[Floats], last: bool = False) -> Floats:
    """What a part with one output makes of its inputs; after the `last`, its arena is given back. Raises ModelError."""
    options = onnxruntime.RunOptions()
    if last:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    inputs = {i.name: np.ascontiguousarray(array) for i, array in zip(session.get_inputs(), given, strict=True)}
    try:
        return np.asarray(session.run(None, inputs, options)[0], dtype=np.float32)
    except Exception as error:
        shapes = " and ".join(times(array.shape) for array in given)
        raise failure("ONNX Runtime", f"a part of shape {shapes}", one_line(error)) from error


def _at(box: Box, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
    """Index of a box in an array (N, C, *spatial) whose first pixel lies at `origin`."""
    return (slice(None), slice(None), *box.slices(origin))


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


def _conforms(segmenter: OnnxSegmenter, probe: OnnxNetwork) -> tuple[Segmenter, Network]:
    return segmenter, probe
