"""A scene as a program that holds everything in memory has it: one float32 tensor."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from segcore.box import Box
from segcore.io import open_scene
from segcore.io.source import Wanted
from segcore.spec import Settings


def read_image(scene: Path, card: Mapping[str, Any], most: int | None = None) -> torch.Tensor:
    """(1, C, *spatial), scaled as the card says, filled strip by strip; `most`: of each side, from the beginning."""
    channels = tuple(channel["name"] for channel in card["channels"])
    source = open_scene(str(scene), Wanted(channels, str(card["axes"])), Settings())
    shape = tuple(min(n, most or n) for n in source.grid.shape)
    image = torch.empty((1, len(channels), *shape))
    thickness = max(1, 2**22 // prod(shape[1:]))
    for begin in range(0, shape[0], thickness):
        end = min(begin + thickness, shape[0])
        values = source.read(Box((begin, *(0,) * (len(shape) - 1)), (end, *shape[1:])))
        image[0, :, begin:end] = torch.from_numpy(values)
    for step in card["scaling"]:
        assert step["step"] == "affine", "these programs know no other step"
        image.mul_(step["scale"]).add_(step.get("offset", 0.0))
    return image
