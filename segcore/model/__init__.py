"""Networks: one home for each runtime. `load_segmenter` chooses between them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from segcore.errors import MemoryShortageError, ModelError
from segcore.files import sha256_of
from segcore.machine import release_memory
from segcore.model.card import Card, Model
from segcore.model.probe import Network, first_taken, largest_error, rounding_of
from segcore.model.proved import prove_once
from segcore.model.quantise import Quantised
from segcore.model.segmenter import Segmenter
from segcore.spec import SAME_SCORES, STREAMS, Engine, Precision, Runner, usable_cores
from segcore.staging import ONE_PASS, Stages, Staging

if TYPE_CHECKING:
    from segcore.model.cut import Cut
    from segcore.model.staged import LoadPart

#: Up to what the scores of two engines differ by rounding alone, relative to the largest of them, of networks that are
#: not local: squeeze-excite makes 2e-4 of it, and bfloat16 would be some 4e-3 off.
_SAME = 1e-3
#: The same of one network in bf16 or int8 in two ways: what is left out was proved in floats, but a float that is
#: rounded otherwise may make another number (none was seen).
_SAME_SHORT = 0.02
#: Sides of the windows on which they are compared, by number of axes; networks with many levels want larger ones.
_SIDES = {1: (64, 128, 256), 2: (64, 128, 256), 3: (32, 64, 128)}
_LOG = logging.getLogger(__name__)


def load_segmenter(
    model: Model,
    threads: int,
    staging: Staging | None = None,
    quantised: Quantised | None = None,
    engine: Engine = "auto",
    precision: Precision = "fp32",
) -> Segmenter:
    """The network of a model, run with `threads` CPU threads; its large windows in stages where that is asked for, and
    in int8 where it was `quantised`.

    `precision`: of a network that was not quantised, fp32 or bf16. `engine`: what runs an ONNX file in fp32; `auto`
    takes OpenVINO for a local network on a CPU, where it is installed and says what ONNX Runtime says. Its weights are
    checked. What else is promised is proved on noise, once on a machine: that engines say the same, that stages do, and
    the card's word that the network is local. Raises CardError, ModelError, and PlanError for a staging that the
    network does not have.
    """
    artifact, path = model.weights()
    segmenter: Segmenter
    with _engine(model.card):
        if quantised is not None:
            segmenter = _load_int8(model, path, quantised, threads)
        elif precision == "bf16":
            segmenter = _load_bf16(model, path, threads, staging)
        elif artifact.format == "onnx":
            segmenter = _load_onnx(model, path, threads, staging, engine)
        elif staging is not None and staging.levels:
            raise ModelError(f"model {model.card.name} is {artifact.format}; only ONNX is run in stages")
        else:
            from segcore.model.torch import TorchSegmenter, load_module

            segmenter = TorchSegmenter(load_module(artifact, path), threads)
    numbers = quantised.sha256 if quantised else precision
    sight = model.card.sight()
    if sight.local and not sight.fixed:
        prove_once(lambda: _confirm(segmenter, model.card), "reach", model.digest, segmenter.engine, numbers, staging)
    # What was compared held arrays, and networks of its own.
    segmenter.release()
    release_memory()
    return segmenter


def runner_of(model: Model, engine: Engine) -> Runner:
    """What a model is run in where this is asked for, on a CPU: by itself a local one in OpenVINO, if that is there.

    OpenVINO takes longer to load; squeeze-excite and depthwise convolutions gain too little by it (a tenth).

    Raises ModelError where it is not run in that, or that is not installed.
    """
    card = model.card
    if engine == "auto":
        if card.artifacts[0].format != "onnx":
            return "torch"
        return "openvino" if card.local and find_spec("openvino") else "onnxruntime"
    if card.artifacts[0].format != "onnx":
        raise ModelError(f"model {card.name} is {card.artifacts[0].format}: torch runs that; leave --engine out")
    if find_spec(engine) is None:
        raise ModelError(f"--engine {engine} is not installed; run `pip install {engine}`, on every worker too")
    return engine


def _load_onnx(model: Model, path: Path, threads: int, staging: Staging | None, engine: Engine) -> Segmenter:
    """An ONNX file in the engine that is asked for, or in the quicker one."""
    from segcore.model.onnx import OnnxPart, OnnxSegmenter, has_gpu

    card, streams = model.card, _streams(model.card, threads)
    usual = partial(OnnxSegmenter, path, threads, streams)
    where = usual().engine if has_gpu() else "CPU"
    if runner_of(model, engine) == "openvino" and (engine == "openvino" or "CPU" in where):
        try:
            from segcore.model.openvino import OpenVinoPart, OpenVinoSegmenter

            quicker = partial(OpenVinoSegmenter, path, threads, streams)
            prove_once(lambda: _compare(usual(), quicker(), card), "engines", model.digest, where, threads)
            return _in_stages(model, path, quicker, OpenVinoPart, threads, staging)
        except MemoryShortageError:
            raise
        except (ModelError, ImportError) as fault:
            if engine == "openvino":
                raise ModelError(f"model {card.name} does not run in OpenVINO: {fault}; leave --engine out") from fault
            _LOG.info("%s does not run in OpenVINO: %s", card.name, fault)
    return _in_stages(model, path, usual, OnnxPart, threads, staging if "CPU" in where else None)


def _streams(card: Card, threads: int) -> int:
    """How many windows are run side by side: those of a fixed size are small, too small for all threads."""
    return min(threads, STREAMS) if card.fixed_window else 1


def _in_stages(
    model: Model,
    path: Path,
    plain: Callable[[], Segmenter],
    load: LoadPart,
    threads: int,
    staging: Staging | None,
    exact: LoadPart | None = None,
) -> Segmenter:
    """A network that runs in one pass by `plain`, its large windows in stages, or in part, where that is asked for.

    `plain`, `load`: what loads it, and its parts; weights are large, and what is not run is not kept. `exact`: what
    loads parts in float32, in which stages are proved where `load` rounds more.
    """
    if staging is None:
        return plain()
    from segcore.model.staged import CroppedSegmenter, StagedSegmenter, find_crops

    channels = len(model.card.channels)

    def in_part() -> CroppedSegmenter:
        cut, network = find_crops(path, channels, threads)
        return CroppedSegmenter(load(network, threads, False), cut)

    if staging == ONE_PASS:
        with _tried(model.card):  # else what the plan has saved by it is done after all
            cropped = in_part()
            prove_once(lambda: cropped.prove(path, plain()), "part", model.digest, cropped.engine)
            return cropped
        return plain()

    def staged(load: LoadPart) -> StagedSegmenter:
        return StagedSegmenter(path, plain, load, threads, channels, staging)

    segmenter = staged(load)

    def prove() -> None:
        if exact is None:
            segmenter.prove(path)
        else:
            staged(exact).prove(path)
            segmenter.prove(path, _SAME_SHORT)

    prove_once(prove, "stages", model.digest, segmenter.engine, staging)
    return segmenter


@contextlib.contextmanager
def _tried(card: Card) -> Iterator[None]:
    """What need not succeed: a fault is logged, and what follows is done. A shortage of memory is no fault."""
    try:
        yield
    except MemoryShortageError:
        raise
    except ModelError as fault:
        _LOG.info("%s: %s", card.name, fault)


def _compare(usual: Segmenter, other: Segmenter, card: Card) -> None:
    """Raises ModelError where scores of noise differ from those of ONNX Runtime by more than rounding makes."""
    sight = card.sight()
    shapes = [tuple(-(-side // s) * s for s in sight.stride) for side in _SIDES[len(sight.stride)]]
    sizes = [sight.window] if sight.fixed and sight.window else shapes
    image, scores = first_taken(usual, ((1, len(card.channels), *size) for size in sizes), "takes no noise")
    error = float(np.abs(scores - other(image)).max()) / max(float(np.abs(scores).max()), 1e-6)
    if not error <= (SAME_SCORES if card.local else _SAME):
        raise ModelError(f"its scores are {error:.2g} of their size from those of ONNX Runtime")


def stages_of(path: Path, channels: int) -> Stages | None:
    """How the network in an ONNX file can be run in stages, None where it cannot be. Raises ModelError."""
    from segcore.model.stages import find_stages  # onnx, which labelling tiles may do without

    cut = find_stages(path, channels, usable_cores())
    return cut.stages if cut else None


def check_precision(model: Model, precision: Precision) -> None:
    """Raises ModelError where a model is not run in these numbers, or what runs it is not installed here."""
    if precision == "fp32":
        return
    artifact = model.card.artifacts[0]
    if artifact.format != "onnx":
        raise ModelError(
            f"model {model.card.name} is {artifact.format}, and only ONNX can be run in {precision}; put an ONNX file "
            f"of it first in its card (`segflow model pack` makes one), or leave --precision {precision} out"
        )
    if precision == "bf16" and find_spec("openvino") is None:
        raise ModelError(
            "--precision bf16 is run in OpenVINO, which is not installed; run `pip install openvino`, on every worker "
            "too, or leave --precision bf16 out"
        )
    if precision == "int8" and (find_spec("openvino") is None or find_spec("nncf") is None):
        raise ModelError(
            "--precision int8 needs OpenVINO, which runs the network, and NNCF, which makes it, and they are not "
            "installed; run `pip install 'segflow[int8]'`, on every worker too, or leave --precision int8 out"
        )


def check_processor(precision: Precision) -> None:
    """Raises ModelError where this machine, which need not be a worker, cannot run networks in these numbers."""
    if precision == "bf16" and find_spec("openvino"):
        from segcore.model.openvino import check_bf16

        check_bf16()


def cut_of(model: Model, threads: int) -> tuple[Cut, bytes] | None:
    """Where the network of a local model is cropped, and that as an ONNX file; None where it cannot be, or no proof is.

    Proved in float32, as what is left out does not depend on how numbers are rounded. Raises CardError, and
    MemoryShortageError: what is made of it must not depend on memory.
    """
    artifact, path = model.weights()
    if artifact.format != "onnx" or not model.card.local:
        return None
    from segcore.model.openvino import OpenVinoPart, OpenVinoSegmenter
    from segcore.model.staged import CroppedSegmenter, find_crops

    def prove() -> None:
        CroppedSegmenter(OpenVinoPart(network, threads), cut).prove(path, OpenVinoSegmenter(path, threads))

    with _tried(model.card):
        cut, network = find_crops(path, len(model.card.channels), threads)
        prove_once(prove, "part, before it is quantised", model.digest, threads)
        return cut, network
    return None


def _load_bf16(model: Model, path: Path, threads: int, staging: Staging | None) -> Segmenter:
    """An ONNX file in bfloat16, its large windows in stages, or in part, where that is asked for."""
    check_precision(model, "bf16")
    from segcore.model.openvino import OpenVinoPart, OpenVinoSegmenter

    plain = partial(OpenVinoSegmenter, path, threads, _streams(model.card, threads), "bf16")
    load = partial(OpenVinoPart, floats="bf16")
    return _in_stages(model, path, plain, load, threads, staging, OpenVinoPart)


def _load_int8(model: Model, path: Path, quantised: Quantised, threads: int) -> Segmenter:
    """A network in int8, of whose windows only what is wanted rises if it was made so."""
    if find_spec("openvino") is None:
        raise ModelError(
            "a worker is to run a network in int8, and OpenVINO is not installed there; run `pip install "
            "'segflow[int8]'` on every worker, or leave --precision int8 out"
        )
    from segcore.model.openvino import OpenVinoSegmenter

    try:
        found = sha256_of(quantised.path)
    except OSError as error:
        raise ModelError(f"{quantised.path}: {error.strerror or error}; run the scene again", retryable=True) from error
    if found != quantised.sha256:
        raise ModelError(f"{quantised.path} is not the network that was proved; remove it and run the scene again")
    plain = OpenVinoSegmenter(quantised.path, threads, _streams(model.card, threads))
    if plain.network.inputs == 1:
        return plain
    from segcore.model.staged import CroppedSegmenter
    from segcore.model.stages import find_stages

    cut = find_stages(path, len(model.card.channels), threads)
    if cut is None or plain.network.inputs != 1 + 2 * len(cut.crops):
        raise ModelError(
            f"{quantised.path} was made of other parts of {model.card.name} than are found here; install the same "
            f"versions of onnx and onnxruntime on every worker, or remove that file's folder, and run the scene again"
        )
    cropped = CroppedSegmenter(plain.network, cut.without_parts())
    del cut  # and its weights
    with _tried(model.card):  # a part of a window against the same in all of it
        prove_once(lambda: cropped.prove(quantised.path, cropped, _SAME_SHORT), "part", found, plain.engine)
        return cropped
    cropped.in_part = False
    return cropped


def open_network(model: Model, threads: int) -> Network:
    """The network of a model, to be measured. Raises CardError, ModelError."""
    artifact, path = model.weights()
    channels = len(model.card.channels)
    with _engine(model.card):
        if artifact.format == "onnx":
            from segcore.model.onnx import OnnxNetwork

            return OnnxNetwork(path, channels, threads)
        from segcore.model.torch import TorchNetwork, load_module

        return TorchNetwork(load_module(artifact, path), channels, threads)


@contextlib.contextmanager
def _engine(card: Card) -> Iterator[None]:
    """Says which engine is missing. They are imported late: each takes a second or more, and a run needs one."""
    try:
        yield
    except ImportError as error:
        raise ModelError(
            f"model {card.name} is {card.artifacts[0].format}, and {error.name} is not installed; run "
            f"`pip install {error.name}`"
        ) from error


def _confirm(segmenter: Segmenter, card: Card) -> None:
    """Try a local network's promise: a small price for what depends on it."""
    try:
        error = largest_error(segmenter, card.sight(), len(card.channels))
    except ModelError as fault:
        raise ModelError(f"model {card.name}: its promise to be local cannot be tried: {fault}") from fault
    if error > rounding_of(segmenter):
        raise ModelError(
            f"model {card.name} is not local, or sees further than its card says (stride {card.stride}, reach "
            f"{card.reach}): what lies beyond changes its scores by {error:.2g} of their size; `segflow model inspect` "
            f"measures it"
        )
