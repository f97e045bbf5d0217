"""MONAI's BasicUNet with the weights of a packed model, in eager torch, as its users run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import BasicUNet
from safetensors.torch import load_file


def open_network(folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The network, in evaluation mode, and the card."""
    card = json.loads((folder / "card.json").read_text())
    (artifact,) = [artifact for artifact in card["artifacts"] if artifact["format"] == "safetensors"]
    network = BasicUNet(**artifact["network"]["arguments"])
    network.load_state_dict(load_file(folder / artifact["path"]))
    return network.eval(), card
