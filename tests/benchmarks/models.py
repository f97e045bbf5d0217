"""The networks, packed by segflow itself and kept in `build/benchmarks`.

MONAI's in 2-D is trained for a minute, to tell water, vegetation and the rest by the usual indices. The others have
random but fixed weights; their batch norms have the statistics of the real scene, and the last layer is shifted so that
all classes occur: labels of networks that always say the same would agree whatever happened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks.peers.image import read_image
from benchmarks.scenes import CACHE, mosaic, volume
from segcore.model.card import NetworkClass
from segcore.model.pack import pack

#: MONAI's default widths.
FEATURES = (32, 32, 64, 128, 256, 32)
_S2 = ("blue", "green", "red", "nir")


def basic_unet(axes: str = "yx", folder: Path = CACHE) -> Path:
    """MONAI's BasicUNet with batch norm and its default widths: four bands or one T1, three classes."""
    dims = len(axes)
    channels = _S2 if dims == 2 else ("T1w",)
    arguments = {"spatial_dims": dims, "in_channels": len(channels), "out_channels": 3, "features": list(FEATURES),
                 "norm": "batch"}  # fmt: skip
    scale = {"step": "affine", "scale": 4.0, "offset": -0.5} if dims == 2 else {"step": "affine", "scale": 0.01}
    about = _draft(f"basic-unet-{axes}", axes, channels, scale)
    scene = mosaic(2000) if dims == 2 else volume(96)
    network = NetworkClass(name="monai.networks.nets.BasicUNet", arguments=arguments)
    return _packed(folder, about, network, scene, trained=dims == 2)


def small_unet(widths: Sequence[int] = (4, 6, 8), folder: Path = CACHE) -> Path:
    """A U-Net of our own that is quick to run, so that what is around it shows."""
    arguments = {"dims": 2, "in_channels": len(_S2), "classes": 3, "widths": list(widths)}
    name = "unet-" + "-".join(map(str, widths))
    about = _draft(name, "yx", _S2, {"step": "affine", "scale": 4.0, "offset": -0.5})
    return _packed(folder, about, NetworkClass(name="segcore.model.unet.UNet", arguments=arguments), mosaic(2000))


def idle(folder: Path = CACHE) -> Path:
    """One convolution of 1 x 1 pixel: a network that does nothing, for one band."""
    model = folder / "models" / "idle"

    def write() -> None:
        source = folder / "models" / "idle.onnx"
        source.parent.mkdir(parents=True, exist_ok=True)
        weights = numpy_helper.from_array(np.array([0.5, -0.5], np.float32).reshape(2, 1, 1, 1), "weights")
        graph = helper.make_graph(
            [helper.make_node("Conv", ["x", "weights"], ["y"])],
            "idle",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, "h", "w"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, "h", "w"])],
            [weights],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), source)
        pack(source, _draft("idle", "yx", ("value",), None, classes=2), model)

    return _kept(model, write)


def _packed(folder: Path, about: dict[str, object], network: NetworkClass, scene: Path, trained: bool = False) -> Path:
    """The model folder of a network of this class, its statistics those of the scene."""
    model = folder / "models" / str(about["name"])

    def write() -> None:
        from segcore.model.torch import build

        torch.manual_seed(7)
        module = build(network)
        image = read_image(scene, about, most=512 if len(str(about["axes"])) == 2 else 96)
        state = model.with_name(f"{model.name}.pt")
        state.parent.mkdir(parents=True, exist_ok=True)
        module = _as_if_trained(module, image)
        if trained:
            module = _trained(module, read_image(scene, about, most=2000))
        torch.save(module.state_dict(), state)
        pack(state, about, model, network)
        state.unlink()

    return _kept(model, write)


def _as_if_trained(module: nn.Module, image: torch.Tensor) -> nn.Module:
    """Batch norms with the statistics of this image, and scores that are centred and of deviation 2."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            layer.momentum = None  # the mean of all that it has seen: of one image
    with torch.no_grad():
        module.train()(image)
        module.eval()
        last = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d)][-1]
        scores = module(image)
        over = (0, *range(2, scores.ndim))
        gain = 2 / scores.std(dim=over)
        assert last.bias is not None
        last.weight.mul_(gain.view(-1, *(1,) * (last.weight.ndim - 1)))
        last.bias.sub_(scores.mean(dim=over)).mul_(gain)
    return module


def _trained(module: nn.Module, image: torch.Tensor, steps: int = 200, side: int = 128) -> nn.Module:
    """Trained to tell water (NDWI above 0), vegetation (NDVI above 0.4) and the rest, on pieces of a scaled image."""
    _blue, green, red, nir = (image[0] + 0.5) / 4
    vegetation = (nir - red) / (nir + red).clamp(min=1e-3) > 0.4
    water = (green - nir) / (green + nir).clamp(min=1e-3) > 0
    wanted = torch.where(water, 2, torch.where(vegetation, 1, 0))
    chance, slope = torch.Generator().manual_seed(7), torch.optim.Adam(module.parameters(), lr=1e-3)
    module.train()
    for _ in range(steps):
        rows, cols = (torch.randint(image.shape[axis] - side, (4,), generator=chance).tolist() for axis in (2, 3))
        pieces = [(slice(r, r + side), slice(c, c + side)) for r, c in zip(rows, cols, strict=True)]
        batch = torch.stack([image[(0, slice(None), *piece)] for piece in pieces])
        loss = nn.functional.cross_entropy(module(batch), torch.stack([wanted[piece] for piece in pieces]))
        slope.zero_grad()
        loss.backward()
        slope.step()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    with torch.no_grad():  # statistics of the network as it is now
        for top in range(0, image.shape[2] - 500, 500):
            module(image[:, :, top : top + 500, :500])
    return module.eval()


def _draft(
    name: str, axes: str, channels: Sequence[str], scale: dict[str, object] | None, classes: int = 3
) -> dict[str, object]:
    return {
        "name": name,
        "version": "1",
        "license": "Apache-2.0",
        "citation": "none: random weights",
        "axes": axes,
        "channels": [{"name": channel} for channel in channels],
        "classes": [{"index": i, "name": f"class {i}", "color": [60 * i, 120, 255 - 60 * i]} for i in range(classes)],
        "activation": "softmax",
        "scaling": [scale] if scale else [],
    }


def _kept(model: Path, write: Callable[[], None]) -> Path:
    """The folder, packed if it is not there or does not load any more as a card of today."""
    if not (model / "card.json").exists():
        write()
    assert json.loads((model / "card.json").read_text())["name"] == model.name
    return model
