"""MONAI's sliding_window_inference over a scene that is in memory: time of the inference alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from monai.inferers import sliding_window_inference

from benchmarks.agreement import keep, parse_boxes
from benchmarks.peers.image import read_image
from benchmarks.peers.network import open_network
from benchmarks.peers.work import measured, say


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scene", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="labels and scores of the boxes")
    parser.add_argument("boxes")
    parser.add_argument("--roi", type=int, required=True)
    parser.add_argument("--overlap", type=float, required=True)
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), required=True)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    network, card = open_network(given.model)
    image = read_image(given.scene, card)
    dims = image.ndim - 2
    network = network.to(given.device)
    if given.layout == "channels_last":
        layout = torch.channels_last if dims == 2 else torch.channels_last_3d
        network, image = network.to(memory_format=layout), image.contiguous(memory_format=layout)

    def work() -> torch.Tensor:
        with torch.inference_mode():
            # Windows go to the device one batch at a time; what is stitched stays in main memory, as scenes do not fit.
            return sliding_window_inference(image, (given.roi,) * dims, 4, network, given.overlap, mode="gaussian",
                                            sw_device=given.device, device="cpu")  # fmt: skip

    scores, facts = measured(work)
    boxes = parse_boxes(given.boxes)
    keep(given.out, [torch.softmax(scores[0][(slice(None), *box.slices())], 0).numpy() for box in boxes])
    # On a GPU torch rounds what convolutions multiply to TF32 unless it is told not to, and segflow tells it.
    on = "cuda, TF32" if given.device == "cuda" and torch.backends.cudnn.allow_tf32 else given.device
    say({**facts, "engine": f"torch {torch.__version__} ({on})"})


if __name__ == "__main__":
    main()
