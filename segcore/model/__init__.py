"""Networks: one home for each runtime. `load_segmenter` chooses between them."""

from __future__ import annotations

from segcore.errors import ModelError
from segcore.model.card import Card, Model
from segcore.model.probe import SAME, Probed, largest_error
from segcore.model.segmenter import Segmenter


def load_segmenter(model: Model, threads: int) -> Segmenter:
    """The network of a model, run with `threads` CPU threads.

    Its weights are checked, and so is its card's word that it is local. Raises CardError, ModelError.
    """
    artifact, path = model.weights()
    # Imported here: each of these takes a second or more, and a run needs one of them.
    segmenter: Segmenter
    try:
        if artifact.format == "onnx":
            from segcore.model.onnx import OnnxSegmenter

            segmenter = OnnxSegmenter(path, threads)
        else:
            from segcore.model.torch import TorchSegmenter, load_module

            segmenter = TorchSegmenter(load_module(artifact, path), threads)
    except ImportError as error:
        raise ModelError(
            f"model {model.card.name} is {artifact.format}, and {error.name} is not installed; run "
            f"`pip install {error.name}`"
        ) from error
    _confirm(segmenter, model.card)
    return segmenter


def open_probe(model: Model, threads: int) -> Probed:
    """The network of a model, to be measured. Raises CardError, ModelError."""
    artifact, path = model.weights()
    if artifact.format == "onnx":
        from segcore.model.onnx import OnnxProbe

        return OnnxProbe(path, len(model.card.channels), threads)
    from segcore.model.torch import TorchProbe, load_module

    return TorchProbe(load_module(artifact, path), len(model.card.channels), threads)


def _confirm(segmenter: Segmenter, card: Card) -> None:
    """Try a local network's promise along one axis, where it sees furthest: a small price for what depends on it."""
    sight = card.sight()
    if not sight.local or sight.fixed:
        return
    widths = [before + after for before, after in sight.halo]
    error = largest_error(segmenter, sight, len(card.channels), (widths.index(max(widths)),))
    if error > SAME:
        raise ModelError(
            f"model {card.name} is not local, or sees further than its card says (stride {card.stride}, reach "
            f"{card.reach}): what lies beyond changes its scores by {error:.1%}; `segflow model inspect` measures it"
        )
