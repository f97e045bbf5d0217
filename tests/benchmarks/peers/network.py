"""The network of a packed model in eager torch, as MONAI's users run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from segcore.model.card import load_card
from segcore.model.torch import load_module


def open_network(folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The network, in evaluation mode, and the card."""
    (artifact,) = [each for each in load_card(str(folder)).card.artifacts if each.format == "safetensors"]
    card: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return load_module(artifact, folder / artifact.path).eval(), card
