"""The least that tiles take: one after the other, read as segflow reads them, and run; nothing is kept."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import onnxruntime

from benchmarks.peers.work import measured, say
from segcore.box import Box
from segcore.io import open_scene
from segcore.io.source import Wanted
from segcore.model.onnx import session_options
from segcore.spec import Settings, usable_cores


def main() -> None:
    scene, folder, side = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    card = json.loads((folder / "card.json").read_text())
    wanted = Wanted(tuple(channel["name"] for channel in card["channels"]), card["axes"])
    source = open_scene(scene, wanted, Settings())
    session = onnxruntime.InferenceSession(
        folder / card["artifacts"][0]["path"], session_options(usable_cores()), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    counts = [-(-n // side) for n in source.grid.shape]

    def work() -> None:
        for index in product(*map(range, counts)):
            box = Box.cell(index, (side,) * len(counts), source.grid.shape)
            session.run(None, {name: source.read(box)[None]})

    _, facts = measured(work)
    say(facts)


if __name__ == "__main__":
    main()
