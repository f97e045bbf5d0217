"""What the network says about the whole image: on the whole, or on boxes with far more around them than it sees."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.agreement import MARGIN, keep, parse_boxes
from benchmarks.peers.image import read_image
from benchmarks.peers.network import open_network
from benchmarks.peers.work import say
from segcore.box import Box


def main() -> None:
    scene, model, out, boxes = sys.argv[1:]
    network, card = open_network(Path(model))
    image = read_image(Path(scene), card)
    shape = tuple(image.shape[2:])
    found = []
    with torch.inference_mode():
        for box in parse_boxes(boxes):
            seen = Box(
                tuple(max(0, a - MARGIN) for a in box.start),
                tuple(min(n, b + MARGIN) for n, b in zip(shape, box.stop, strict=True)),
            )
            scores = torch.softmax(network(image[(slice(None), slice(None), *seen.slices())])[0], 0)
            inside = tuple(slice(a - s, b - s) for a, b, s in zip(box.start, box.stop, seen.start, strict=True))
            found.append(scores[(slice(None), *inside)].numpy())
    keep(Path(out), found)
    say({})


if __name__ == "__main__":
    main()
