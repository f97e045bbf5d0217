"""How far networks see: known answers, in torch and in ONNX, and promises that are not kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_if_trained, save_local_unet
from torch import nn

from segcore.errors import ModelError
from segcore.model import load_segmenter, open_network
from segcore.model.card import load_card
from segcore.model.memory import bytes_per_pixel
from segcore.model.onnx import OnnxNetwork
from segcore.model.probe import Network, Sighting, largest_error, probe, rounding_of
from segcore.model.torch import TorchNetwork
from segcore.model.unet import UNet
from segcore.spec import Sight, symmetric


def seen_by(module: nn.Module, channels: int = 2, ndim: int = 2) -> Sighting:
    torch.manual_seed(0)
    return probe(TorchNetwork(module.eval(), channels, 2), channels, ndim)


def in_onnx(module: nn.Module, path: Path, channels: int = 2, ndim: int = 2) -> Network:
    free = {0: "n", **{2 + axis: f"s{axis}" for axis in range(ndim)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (torch.zeros(1, channels, *(64,) * ndim),), path, dynamo=False,
                          input_names=["x"], output_names=["y"], dynamic_axes={"x": free})  # fmt: skip
    return OnnxNetwork(path, channels, 2)


class SqueezeExcite(nn.Module):
    """As in EfficientNet: every channel times a gate that is made of its mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * self.gate(image)


class Positions(nn.Module):
    """Adds a number that depends on the row."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + torch.arange(image.shape[2])[None, None, :, None] * 0.1


class Swallower(nn.Module):
    """Sees five pixels, and hides all but one from a probe that plants NaN."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + nn.functional.avg_pool2d(torch.nan_to_num(image), 11, 1, 5)


def conv(inputs: int = 2, outputs: int = 2, kernel: int | tuple[int, int] = 3, **options: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, **options)


#: A network, its stride and its reach (before and after, per axis).
KNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], tuple]] = {
    "one 3 x 3": (lambda: conv(padding=1), (1, 1), ((1, 1), (1, 1))),
    "one 1 x 1": (lambda: conv(kernel=1), (1, 1), ((0, 0), (0, 0))),
    "dilated": (lambda: conv(padding=4, dilation=4), (1, 1), ((4, 4), (4, 4))),
    "even kernel": (lambda: nn.Sequential(nn.ZeroPad2d((2, 1, 0, 3)), conv(kernel=4)), (1, 1), ((0, 3), (2, 1))),
    "one axis only": (lambda: conv(kernel=(1, 7), padding=(0, 3)), (1, 1), ((0, 0), (3, 3))),
    "strided and back": (lambda: nn.Sequential(conv(kernel=2, stride=2), nn.ConvTranspose2d(2, 2, 2, 2)), (2, 2),
                         ((0, 0), (0, 0))),
    "strided 3 x 3": (lambda: nn.Sequential(conv(padding=1, stride=2), nn.Upsample(scale_factor=2)), (2, 2),
                      ((2, 0), (2, 0))),
    "pooled, then 3 x 3": (lambda: nn.Sequential(nn.MaxPool2d(4), conv(padding=1), nn.Upsample(scale_factor=4)), (4, 4),
                           ((4, 4), (4, 4))),
    "bilinear": (lambda: nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")), (2, 2),
                 ((1, 1), (1, 1))),
    "far through gaps": (lambda: nn.Sequential(*(conv(padding=100, dilation=100) for _ in range(4))), (1, 1),
                         ((400, 400), (400, 400))),
    "further": (lambda: conv(padding=900, dilation=900), (1, 1), ((900, 900), (900, 900))),
    "our U-Net, 2 poolings": (lambda: UNet(dims=2, in_channels=2, classes=2, widths=[3, 3, 3]), (4, 4),
                              ((22, 22), (22, 22))),
    "our U-Net, 3 poolings": (lambda: UNet(dims=2, in_channels=2, classes=2, widths=[3] * 4), (8, 8),
                              ((46, 46), (46, 46))),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_reaches_come_out_exactly(name: str, tmp_path: Path) -> None:
    make, stride, reach = KNOWN[name]
    module = make()
    for found in (seen_by(module), probe(in_onnx(module, tmp_path / "net.onnx"), 2, 2)):
        assert found.stride == stride
        assert found.reach == reach
        assert found.floods == ()


@pytest.mark.parametrize("ndim", [2, 3])
def test_monais_basic_unet_is_local_with_batch_norm_only(ndim: int, tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    options = {"spatial_dims": ndim, "in_channels": 1, "out_channels": 3, "features": (4,) * 6}
    local = nets.BasicUNet(**options, norm="batch")
    for found in (seen_by(local, 1, ndim), probe(in_onnx(local, tmp_path / "b.onnx", 1, ndim), 1, ndim)):
        assert found.stride == (16,) * ndim
        assert found.reach == symmetric((94,) * ndim)
        assert found.parameters == pytest.approx(sum(p.numel() for p in local.parameters()), rel=0.1)
    flooded = nets.BasicUNet(**options)
    for found in (seen_by(flooded, 1, ndim), probe(in_onnx(flooded, tmp_path / "i.onnx", 1, ndim), 1, ndim)):
        assert found.reach is None
        assert "instance" in found.floods[0].lower()
        assert "18" in found.floods[0]


@pytest.mark.parametrize("encoder", ["vgg16_bn", "mobilenet_v2"])
def test_pretrained_encoders_are_local(encoder: str) -> None:
    module = UNet(dims=2, in_channels=1, classes=2, encoder=encoder, decoder_widths=[4] * 5)
    found = seen_by(module, 1)
    assert found.stride == module.stride == (32, 32)
    assert found.reach is not None
    assert tuple(max(sides) for sides in found.reach) == module.reach


def test_one_squeeze_excite_block_makes_a_network_not_local(tmp_path: Path) -> None:
    module = nn.Sequential(conv(padding=1), SqueezeExcite(2), nn.ReLU(), conv(padding=1))
    found = seen_by(module)
    assert found.reach is None
    assert found.floods == ("adaptive_avg_pool2d",)
    found = probe(in_onnx(module, tmp_path / "se.onnx"), 2, 2)
    assert found.reach is None
    assert "GlobalAveragePool" in found.floods[0]


def test_attention_makes_a_network_not_local() -> None:
    class Attention(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            tokens = image.flatten(2).transpose(1, 2)
            weights = torch.softmax(tokens @ tokens.transpose(1, 2), -1)
            return (weights @ tokens).transpose(1, 2).reshape(image.shape)

    found = seen_by(nn.Sequential(conv(padding=1), nn.AvgPool2d(4), Attention(), nn.Upsample(scale_factor=4)))
    assert found.reach is None
    assert found.floods == ("softmax", "matmul")


@pytest.mark.parametrize(
    "layer", [Positions(), nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear",
                                                                      align_corners=True))],
)  # fmt: skip
def test_a_network_that_knows_where_it_is_is_not_local(layer: nn.Module) -> None:
    found = seen_by(nn.Sequential(conv(padding=1), layer))
    assert found.reach is None
    assert "knows where it is" in found.floods[0]


class Whole(nn.Module):
    """Knows how large the image is."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image / (image.shape[2] * image.shape[3]) ** 0.5


@pytest.mark.parametrize("layer", [Whole(), nn.Conv2d(2, 2, 5, padding=2, padding_mode="circular")])
def test_a_network_that_feels_the_ends_of_the_image_is_not_local(layer: nn.Module) -> None:
    """In the middle of an image there is nothing to be seen of that."""
    assert seen_by(nn.Sequential(conv(padding=1), layer)).reach is None


def test_what_is_seen_along_a_diagonal_only_counts(tmp_path: Path) -> None:
    class Diagonal(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image + nn.functional.pad(image, (20, 0, 20, 0))[:, :, :-20, :-20]

    for found in (seen_by(Diagonal()), probe(in_onnx(Diagonal(), tmp_path / "net.onnx"), 2, 2)):
        assert found.reach == ((20, 0), (20, 0))


def test_monais_basic_unet_with_aligned_corners_is_not_local() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    module = nets.BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(4,) * 6, norm="batch",
                            upsample="nontrainable")  # fmt: skip
    assert seen_by(as_if_trained(module), 1).reach is None


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
def test_paddings_that_a_tile_at_the_border_repeats_are_local(mode: str) -> None:
    for reach in (3, 20):
        found = seen_by(nn.Conv2d(2, 2, 2 * reach + 1, padding=reach, padding_mode=mode))
        assert found.reach == ((reach, reach), (reach, reach))


@pytest.mark.parametrize(("poolings", "short"), [(2, 20), (3, 40), (4, 16)])
def test_a_reach_that_is_a_little_too_short_is_noticed(poolings: int, short: int) -> None:
    module = as_if_trained(UNet(dims=2, in_channels=2, classes=2, widths=[8] * (poolings + 1)))
    network, reach = TorchNetwork(module, 2, 2), module.reach or (0, 0)
    assert largest_error(network, Sight(module.stride, symmetric(reach)), 2) <= rounding_of(network)
    assert largest_error(network, Sight(module.stride, symmetric((short, short))), 2) > rounding_of(network)


def test_strides_that_are_no_power_of_two() -> None:
    found = seen_by(nn.Sequential(conv(kernel=3, stride=3), conv(padding=1), nn.Upsample(scale_factor=3)))
    assert str(found.sizes) == "multiples of 3"
    assert (found.stride, found.reach) == ((3, 3), ((3, 3), (3, 3)))


def test_weights_that_are_not_numbers_are_named() -> None:
    module = conv(padding=1)
    module.weight.data[0] = np.nan
    with pytest.raises(ModelError, match="NaN or infinity"):
        seen_by(module)


def test_a_network_that_hides_from_nan_is_found_out() -> None:
    network = TorchNetwork(Swallower(), 2, 2)
    assert "hides what it sees" in probe(network, 2, 2).floods[0]
    assert largest_error(network, Sight((1, 1), symmetric((4, 4))), 2) > rounding_of(network)
    assert largest_error(network, Sight((1, 1), symmetric((5, 5))), 2) <= rounding_of(network)


def test_sizes_that_a_network_takes(tmp_path: Path) -> None:
    unet = UNet(dims=2, in_channels=2, classes=2, widths=[2, 2, 2, 2])
    assert str(seen_by(unet).sizes) == "multiples of 8"
    assert str(seen_by(conv(padding=1)).sizes) == "any"
    assert (
        str(seen_by(nn.Sequential(nn.MaxPool2d((4, 1)), nn.Upsample(scale_factor=(4, 1)))).sizes)
        == "multiples of 4 x 1"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(conv(padding=1), (torch.zeros(1, 2, 96, 64),), tmp_path / "fixed.onnx", dynamo=False)
    fixed = probe(OnnxNetwork(tmp_path / "fixed.onnx", 2, 2), 2, 2)
    assert str(fixed.sizes) == "96 x 64 only"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (conv(), "128 x 128 into scores of 126 x 126"),
        (nn.MaxPool2d(4), "128 x 128 into scores of 32 x 32"),
        (nn.Flatten(), "128 x 128 into scores of"),
        (conv(inputs=5, padding=1), "takes no image of 2 channels"),
    ],
)
def test_networks_without_a_score_for_every_pixel_are_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        seen_by(module)


def test_operations_are_counted(tmp_path: Path) -> None:
    module = nn.Sequential(conv(2, 8, padding=1), nn.ReLU(), conv(8, 3, 1))
    expected = 2 * (2 * 8 * 9 + 8 * 3)
    assert seen_by(module).flops_per_pixel == expected
    assert probe(in_onnx(module, tmp_path / "net.onnx"), 2, 2).flops_per_pixel == expected
    assert seen_by(module).parameters == sum(p.numel() for p in module.parameters())


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    for width in (8, 64):
        folder = save_local_unet(tmp_path / str(width), "yx", width=width, poolings=2)
        found = probe(open_network(load_card(str(folder)), 2), 1, 2)
        # The largest features are `width` wide at full resolution, and a convolution reads and writes some.
        assert 4 * width < bytes_per_pixel(str(folder), 1, found) < 40 * width
    with pytest.raises(ModelError, match="cannot measure"):
        bytes_per_pixel(str(tmp_path / "nothing"), 1, found)


@pytest.mark.parametrize("reach", [22, 9])
def test_a_card_that_promises_too_much_is_refused_when_it_is_loaded(reach: int, tmp_path: Path) -> None:
    folder = save_local_unet(tmp_path / "unet", "yx", poolings=2, convolutions=2, reach=reach)
    if reach == 22:
        load_segmenter(load_card(str(folder)), 2)
    else:
        with pytest.raises(ModelError, match=r"sees further than its card says .*reach \(9, 9\)"):
            load_segmenter(load_card(str(folder)), 2)


def test_strides_that_are_too_small_are_noticed(tmp_path: Path) -> None:
    folder = save_local_unet(tmp_path / "unet", "yx", poolings=2)
    document = json.loads((folder / "card.json").read_text()) | {"stride": [2, 2], "reach": [64, 64]}
    (folder / "card.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"cannot be tried|sees further than its card says"):
        load_segmenter(load_card(str(folder)), 2)


def test_built_in_models_are_what_their_cards_say() -> None:
    clouds = load_card("ukis-csmask-4b-l1c")
    found = probe(open_network(clouds, 2), 4, 2)
    assert found.reach is None
    assert any("GlobalAveragePool" in kind or "ReduceMean" in kind for kind in found.floods)
    brain = load_card("deepbet")
    found = probe(open_network(brain, 2), 1, 3)
    assert found.reach is None
    assert "instance_norm" in found.floods[0]
    assert found.stride == brain.card.stride
    assert np.prod(found.stride) > 1
