"""Forward passes of the engine that segflow takes, as it sets it up, over noise: the median of three, and the first."""

from __future__ import annotations

import statistics
import sys

import numpy as np

from benchmarks.peers.work import measured, say
from segcore.model import runner_of
from segcore.model.card import load_card
from segcore.model.onnx import OnnxSegmenter
from segcore.model.openvino import OpenVinoSegmenter
from segcore.spec import usable_cores


def main() -> None:
    model, shape = load_card(sys.argv[1]), tuple(map(int, sys.argv[2:]))
    load = {"onnxruntime": OnnxSegmenter, "openvino": OpenVinoSegmenter}[runner_of(model, "auto")]
    segmenter = load(model.weights()[1], usable_cores())
    image = np.random.default_rng(0).standard_normal((1, len(model.card.channels), *shape), np.float32)
    runs = []
    for _ in range(3):
        _, facts = measured(lambda: segmenter(image))
        runs.append(facts)
    medians: dict[str, object] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    say({**medians, "engine": segmenter.engine, "first": runs[0]})


if __name__ == "__main__":
    main()
