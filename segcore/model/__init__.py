"""Networks: one home for each runtime. `load_segmenter` chooses between them."""

from __future__ import annotations

from segcore.errors import ModelError
from segcore.model.card import Model
from segcore.model.segmenter import Segmenter


def load_segmenter(model: Model, threads: int) -> Segmenter:
    """The network of a model, its weights checked, run with `threads` CPU threads. Raises CardError, ModelError."""
    artifact, path = model.weights()
    # Imported here: each of these takes a second or more, and a run needs one of them.
    try:
        if artifact.format == "onnx":
            from segcore.model.onnx import OnnxSegmenter

            return OnnxSegmenter(path, threads)
        from segcore.model.torch import TorchSegmenter

        return TorchSegmenter(path, threads)
    except ImportError as error:
        raise ModelError(
            f"model {model.card.name} is {artifact.format}, and {error.name} is not installed; run "
            f"`pip install {error.name}`"
        ) from error
