"""One forward pass of ONNX Runtime, as segflow sets it up, over noise of this shape: the median of three."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.peers.work import measured, say
from segcore.model.onnx import session_options
from segcore.spec import usable_cores


def main() -> None:
    folder, shape = Path(sys.argv[1]), tuple(map(int, sys.argv[2:]))
    card = json.loads((folder / "card.json").read_text())
    (artifact,) = [artifact for artifact in card["artifacts"] if artifact["format"] == "onnx"]
    # Without TF32, as segflow runs it: see segcore/model/onnx.py.
    wanted = {"CUDAExecutionProvider": {"use_tf32": 0}, "CPUExecutionProvider": {}}
    providers = [(name, given) for name, given in wanted.items() if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(
        folder / artifact["path"], session_options(usable_cores()), providers=providers
    )
    name = session.get_inputs()[0].name
    image = np.random.default_rng(0).standard_normal((1, len(card["channels"]), *shape), np.float32)
    runs = []
    for _ in range(3):
        _, facts = measured(lambda: session.run(None, {name: image}))
        runs.append(facts)
    medians: dict[str, object] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    say({**medians, "engine": f"onnxruntime {onnxruntime.__version__} ({session.get_providers()[0]})"})


if __name__ == "__main__":
    main()
