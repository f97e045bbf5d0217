"""Our U-Nets: their shapes, how far they see, and that they read what torchvision publishes."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import pickle
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from segcore.errors import ModelError
from segcore.model.unet import UNet

PRETRAINED = ["vgg16_bn", "mobilenet_v2"]


def unet(dims: int = 2, **changes: Any) -> UNet:
    """A network in evaluation mode, its random weights fixed: two channels, three classes, small unless told."""
    arguments = {"in_channels": 2, "classes": 3} | changes
    if arguments.get("encoder", "plain") == "plain":
        arguments = {"widths": [3, 4, 5]} | arguments
    torch.manual_seed(7)
    return UNet(dims=dims, **arguments).eval()


@torch.inference_mode()
def scores(net: UNet, image: Tensor) -> Tensor:
    return net(image)


# Shapes


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("decoder", ["transposed", "upsample"])
@pytest.mark.parametrize("norm", ["batch", "instance", None])
@pytest.mark.parametrize(("widths", "convolutions", "kernel"), [([3, 4], 1, 5), ([2, 5, 4, 7], 2, 3), ([3], 3, 1)])
def test_scores_have_the_size_of_the_image(
    dims: int, decoder: str, norm: str | None, widths: list[int], convolutions: int, kernel: int
) -> None:
    net = unet(dims, decoder=decoder, norm=norm, widths=widths, convolutions=convolutions, kernel=kernel)
    stride = 2 ** (len(widths) - 1)
    assert net.stride == (stride,) * dims
    sides = [stride, 3 * stride, 2 * stride][:dims]
    out = scores(net, torch.randn(2, 2, *sides))
    assert out.shape == (2, 3, *sides)
    assert torch.isfinite(out).all()
    assert out.min() < 0  # raw


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("decoder", ["transposed", "upsample"])
@pytest.mark.parametrize("encoder", PRETRAINED)
def test_known_encoders_have_every_resolution(dims: int, decoder: str, encoder: str) -> None:
    with torch.device("meta"):  # shapes without arithmetic
        net = unet(dims, encoder=encoder, decoder=decoder)
        image = torch.empty(1, 2, *[64, 32, 96][:dims])
        levels, out = net.encode(image), net(image)
    assert net.stride == (32,) * dims
    assert out.shape == (1, 3, *image.shape[2:])
    channels = {"vgg16_bn": [64, 128, 256, 512, 512, 512], "mobilenet_v2": [2, 16, 24, 32, 96, 1280]}[encoder]
    assert [level.shape[1] for level in levels] == channels
    for depth, level in enumerate(levels):
        assert list(level.shape[2:]) == [n // 2**depth for n in image.shape[2:]]


def test_the_decoder_mirrors_a_plain_encoder_unless_told() -> None:
    def widths(net: UNet) -> list[int]:
        return [level.mix[0].out_channels for level in reversed(net.decoder)]

    assert widths(unet(widths=[3, 6, 4, 9])) == [3, 6, 4]
    assert widths(unet(widths=[3, 6, 4, 9], decoder_widths=[5, 2, 7])) == [5, 2, 7]
    with torch.device("meta"):
        assert widths(unet(encoder="vgg16_bn", decoder_widths=[4, 8, 8, 16, 16])) == [4, 8, 8, 16, 16]


def test_every_weight_learns() -> None:
    for encoder, sides in (("plain", (8, 16)), ("mobilenet_v2", (64, 64))):
        net = unet(encoder=encoder).train()
        net(torch.randn(2, 2, *sides)).square().mean().backward()
        without = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]
        # A norm subtracts the mean, so biases before it are idle up to rounding; they exist for torchvision's names.
        assert not [name for name in without if not name.endswith("bias")]


def test_the_same_seed_gives_the_same_network_and_bits() -> None:
    image = torch.randn(1, 2, 16, 24)
    first, second = unet(), unet()
    assert torch.equal(scores(first, image), scores(second, image))
    assert torch.equal(scores(first, image), scores(first, image))
    torch.testing.assert_close(scores(first, torch.cat([image, 9 * image]))[:1], scores(first, image))


# Reach


def reach_by_hand(poolings: int, convolutions: int, decoder: str, kernel: int = 3) -> int:
    """Down and up the plain U: every convolution adds half its side, a pooling halves, a rise doubles."""
    half = kernel // 2
    seen = convolutions * half
    for _ in range(poolings):
        seen = -(-seen // 2) + convolutions * half
    for _ in range(poolings):
        seen = 2 * seen + (half if decoder == "upsample" else 0) + convolutions * half
    return seen


def probed(net: UNet, axis: int, bound: int) -> tuple[int, int]:
    """How many pixels before and after one NaN cell the scores are NaN, on one axis, in a strip of one cell across."""
    stride = net.stride[axis]
    start = stride * (-(-bound // stride) + 1)  # one clean cell at least is left on each side
    sides = list(net.stride)
    sides[axis] = 2 * start + stride
    image = torch.zeros(1, net.in_channels, *sides)
    image.narrow(axis + 2, start, stride).fill_(torch.nan)
    out = scores(net, image).isnan().movedim(axis + 2, 0).flatten(1).any(dim=1).nonzero().flatten()
    first, last = int(out[0]), int(out[-1])
    assert first > 0
    assert last < sides[axis] - 1
    assert last - first + 1 == len(out)
    return start - first, last + 1 - start - stride


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("decoder", ["transposed", "upsample"])
@pytest.mark.parametrize("poolings", [3, 4, 5])
def test_the_reach_is_what_a_nan_says(poolings: int, decoder: str, dims: int) -> None:
    net = unet(dims, in_channels=1, classes=2, widths=[1] * (poolings + 1), decoder=decoder)
    reach = reach_by_hand(poolings, 2, decoder)
    assert net.reach == (reach,) * dims
    for axis in range(dims):
        assert probed(net, axis, reach) == (reach, reach)


@pytest.mark.parametrize(
    ("poolings", "convolutions", "kernel"),
    [(0, 2, 3), (1, 1, 3), (2, 3, 3), (2, 2, 5), (3, 1, 5), (2, 1, 7), (2, 2, 1)],
)
@pytest.mark.parametrize("decoder", ["transposed", "upsample"])
def test_the_reach_follows_number_and_size_of_convolutions(
    poolings: int, convolutions: int, kernel: int, decoder: str
) -> None:
    net = unet(widths=[2] * (poolings + 1), convolutions=convolutions, kernel=kernel, decoder=decoder)
    reach = reach_by_hand(poolings, convolutions, decoder, kernel)
    assert net.reach == (reach, reach)
    assert probed(net, 1, reach) == (reach, reach)


def test_the_reach_of_the_usual_networks() -> None:
    assert [unet(widths=[1] * n).reach for n in (4, 5, 6)] == [(46, 46), (94, 94), (190, 190)]


@pytest.mark.parametrize("decoder", ["transposed", "upsample"])
@pytest.mark.parametrize("encoder", PRETRAINED)
def test_the_reach_of_known_encoders(encoder: str, decoder: str) -> None:
    net = unet(encoder=encoder, decoder=decoder, decoder_widths=[2] * 5)
    assert net.reach is not None
    # A convolution that halves sees one pixel more before its cell than past it, so one side sees less.
    assert max(probed(net, 0, net.reach[0])) == net.reach[0]


def test_instance_norm_sees_everything() -> None:
    net = unet(norm="instance")
    assert net.reach is None
    image = torch.zeros(1, 2, 8, 400)
    image[..., :4] = torch.nan
    assert scores(net, image).isnan().all()


# Export


@pytest.mark.parametrize(
    "changes",
    [
        {"dims": 2},
        {"dims": 3, "decoder": "upsample", "norm": "instance"},
        {"dims": 2, "encoder": "mobilenet_v2", "decoder": "upsample", "decoder_widths": [2] * 5},
    ],
)
class TestExport:
    @pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
    # torch's instance norm compares sizes in Python, and has no other mode than that of training; ours must do neither.
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:torch.nn")
    @pytest.mark.filterwarnings("ignore:ONNX export mode is set to TrainingMode.EVAL, but operator 'instance_norm'")
    def test_onnx_takes_any_size(self, changes: dict[str, Any]) -> None:
        net = unet(**changes)
        free = {axis: f"side{axis}" for axis in (0, *range(2, net.dims + 2))}
        file = io.BytesIO()
        example = torch.zeros(1, 2, *(2 * s for s in net.stride))
        torch.onnx.export(
            net,
            (example,),
            file,
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": free, "y": free},
        )
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        for cells in ((1, 3, 2), (4, 2, 1)):
            image = torch.randn(2, 2, *(n * s for n, s in zip(cells, net.stride, strict=False)))
            (out,) = session.run(None, {"x": image.numpy()})
            np.testing.assert_allclose(out, scores(net, image).numpy(), rtol=1e-3, atol=1e-4)

    def test_an_exported_program_takes_any_size(self, changes: dict[str, Any]) -> None:
        net = unet(**changes)
        # Multiples of the stride, and two cells at least: torch takes a size of one, at the coarsest level, for fixed.
        sides = {axis + 2: s * Dim(f"side{axis}", min=2) for axis, s in enumerate(net.stride)}
        example = torch.zeros(2, 2, *(n * s for n, s in zip((2, 3, 2), net.stride, strict=False)))
        program = torch.export.export(net, (example,), dynamic_shapes=({0: Dim("batch")} | sides,))
        image = torch.randn(1, 2, *(n * s for n, s in zip((5, 2, 3), net.stride, strict=False)))
        with torch.inference_mode():
            torch.testing.assert_close(program.module()(image), net(image))


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 1}, "dims 1 must be one of 2, 3"),
        ({"dims": 2.0}, "dims 2.0"),
        ({"in_channels": 0}, "in_channels 0 must be a whole number, 1 or more"),
        ({"in_channels": True}, "in_channels True"),
        ({"classes": 1}, "classes 1 must be a whole number, 2 or more"),
        ({"encoder": "resnet"}, "'resnet' must be one of 'plain', 'vgg16_bn', 'mobilenet_v2'"),
        ({"encoder": ["plain"]}, "must be one of"),
        ({"kernel": 4}, "kernel 4 must be odd.* take 5"),
        ({"convolutions": 0}, "convolutions 0"),
        ({"norm": "group"}, "norm 'group' must be one of 'batch', 'instance', None"),
        ({"decoder": "bilinear"}, "decoder 'bilinear'"),
        ({"widths": []}, "widths .* each level"),
        ({"widths": 64}, "widths 64"),
        ({"widths": [4, "8"]}, "widths '8'"),
        ({"encoder": "vgg16_bn", "widths": [4, 8]}, "widths of vgg16_bn are its own.*leave `widths` out"),
        ({"encoder": "mobilenet_v2", "widths": 64}, "widths of mobilenet_v2 are its own, not 64"),
        ({"decoder_widths": [4]}, r"decoder_widths \[4\] must be a list of 2"),
        ({"decoder_widths": [4, 0]}, "decoder_widths 0"),
    ],
)
def test_arguments_that_make_no_network(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        unet(**changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 8, 12, 8), r"takes images \(N, 2, side, side\) and got \(1, 2, 8, 12, 8\)"),
        ((1, 3, 8, 8), r"got \(1, 3, 8, 8\)"),
        ((1, 2, 8, 10), "8 x 10 pixels does not fit the stride 4 x 4; pad"),
        ((1, 2, 0, 8), "0 x 8 pixels does not fit"),
    ],
)
def test_images_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        unet()(torch.zeros(shape))


def test_instance_norm_wants_two_cells() -> None:
    with pytest.raises(ModelError, match="4 x 4 pixels, which is the stride"):
        unet(norm="instance")(torch.zeros(1, 2, 4, 4))
    assert scores(unet(norm="instance"), torch.zeros(1, 2, 4, 8)).shape == (1, 3, 4, 8)
    small = unet(norm="instance", encoder="mobilenet_v2", decoder_widths=[2] * 5)
    assert scores(small, torch.zeros(1, 2, 32, 32)).shape == (1, 3, 32, 32)


# Weights of torchvision


def randomise(module: nn.Module) -> None:
    """Statistics of batch norms as after some training, so that no layer is neutral."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value, low, high in ((layer.running_mean, -0.2, 0.2), (layer.running_var, 0.5, 1.5)):
                nn.init.uniform_(value, low, high)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.2, 0.2)


def published(features: nn.Module) -> dict[str, Tensor]:
    """What a file of torchvision holds: the features, and a classifier (small here)."""
    named = {f"features.{name}": value for name, value in features.state_dict().items()}
    return named | {"classifier.0.weight": torch.ones(2, 2), "classifier.0.bias": torch.ones(2)}


@pytest.fixture(scope="session")
def mobilenet() -> dict[str, Tensor]:
    net = unet(in_channels=3, encoder="mobilenet_v2", decoder_widths=[2] * 5)
    randomise(net.encoder)
    return published(net.encoder)


def fresh(in_channels: int = 3, encoder: str = "mobilenet_v2") -> UNet:
    torch.manual_seed(11)
    return UNet(dims=2, in_channels=in_channels, classes=2, encoder=encoder, decoder_widths=[2] * 5).eval()


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, where it is installed; beside a torch that its operators were not built for as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pytest.importorskip("torchvision", exc_type=ImportError)
        except RuntimeError as error:  # the import describes operators that its extension did not bring
            if "does not exist" not in str(error):
                raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        schemas = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        module = pytest.importorskip("torchvision")
        module.schemas_of_the_test = schemas  # they last as long as this object
        return module


def features_of(torchvision: ModuleType, encoder: str) -> nn.Sequential:
    if encoder == "mobilenet_v2":
        return torchvision.models.mobilenet_v2().features
    vgg = torchvision.models.vgg  # its classifier would fill half a gigabyte
    return vgg.make_layers(vgg.cfgs["D"], batch_norm=True)


@pytest.mark.parametrize("encoder", PRETRAINED)
def test_features_equal_torchvision(torchvision: ModuleType, tmp_path: Path, encoder: str) -> None:
    torch.manual_seed(5)
    theirs = features_of(torchvision, encoder).eval()
    randomise(theirs)
    torch.save(published(theirs), tmp_path / "weights.pth")
    ours = fresh(encoder=encoder)
    assert list(ours.encoder.state_dict()) == list(theirs.state_dict())
    ours.load_encoder(tmp_path / "weights.pth")
    ends = {"vgg16_bn": [5, 12, 22, 32, 42, 43], "mobilenet_v2": [1, 3, 6, 13, 18]}[encoder]
    with torch.inference_mode():
        image = value = torch.randn(2, 3, 64, 96)
        levels = ours.encode(image)
        if encoder == "mobilenet_v2":
            assert torch.equal(levels.pop(0), image)
        expected = []
        for index, layer in enumerate(theirs):
            value = layer(value)
            if index in ends:
                expected.append(value.clone())  # the next layer may work in place
    assert len(levels) == len(expected)
    assert expected[-1].std() > 1e-3
    for level, wanted in zip(levels, expected, strict=True):
        assert torch.equal(level, wanted)


@pytest.mark.parametrize("encoder", PRETRAINED)
def test_names_and_shapes_are_those_of_torchvision(encoder: str) -> None:
    """Compared by a digest, which `test_the_digests_are_those_of_torchvision` takes from torchvision itself."""
    with torch.device("meta"):
        assert digest(fresh(encoder=encoder).encoder) == DIGESTS[encoder]


@pytest.mark.parametrize("encoder", PRETRAINED)
def test_the_digests_are_those_of_torchvision(torchvision: ModuleType, encoder: str) -> None:
    with torch.device("meta"):
        assert digest(features_of(torchvision, encoder)) == DIGESTS[encoder]


def digest(module: nn.Module) -> str:
    lines = (f"{name} {tuple(value.shape)}" for name, value in module.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


DIGESTS = {
    "vgg16_bn": "3c73c9e019935607201c560518f0786b8b0a33db9d0316215990fb9dd4737108",
    "mobilenet_v2": "1b7d9de2aba15b17ad0eef51c76a749d2fa8f11b9e39d1bd00c35e1aafeaafb7",
}


@pytest.mark.parametrize("zipped", [True, False])
def test_old_files_do_not_count_batches(tmp_path: Path, mobilenet: dict[str, Tensor], zipped: bool) -> None:
    old = {name: value for name, value in mobilenet.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(mobilenet)
    torch.save(old, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    net = fresh()
    net.load_encoder(tmp_path / "weights.pth")
    for name, value in net.encoder.state_dict().items():
        assert torch.equal(value, mobilenet[f"features.{name}"])


@pytest.mark.parametrize("in_channels", [1, 3, 4, 6])
def test_the_first_convolution_takes_any_channels(
    tmp_path: Path, mobilenet: dict[str, Tensor], in_channels: int
) -> None:
    torch.save(mobilenet, tmp_path / "weights.pth")
    net = fresh(in_channels)
    net.load_encoder(tmp_path / "weights.pth")
    rgb, own = mobilenet["features.0.0.weight"], net.encoder.state_dict()["0.0.weight"]
    assert own.shape[1] == in_channels
    for channel in range(in_channels):
        torch.testing.assert_close(own[:, channel], rgb[:, channel % 3] * 3 / in_channels)


def test_twice_the_channels_see_the_same(tmp_path: Path, mobilenet: dict[str, Tensor]) -> None:
    torch.save(mobilenet, tmp_path / "weights.pth")
    three, six = fresh(3), fresh(6)
    image = torch.randn(1, 3, 32, 64)
    with torch.inference_mode():
        for net in (three, six):
            net.load_encoder(tmp_path / "weights.pth")
        _, *expected = three.encode(image)
        _, *levels = six.encode(torch.cat([image, image], dim=1))
    for level, wanted in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-3, atol=1e-3)


def refused(net: UNet, path: Path, message: str) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ModelError, match=message) as caught:
        net.load_encoder(path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file(tmp_path: Path, mobilenet: dict[str, Tensor], share: float, zipped: bool) -> None:
    whole = io.BytesIO()
    torch.save(mobilenet, whole, _use_new_zipfile_serialization=zipped)
    path = tmp_path / "weights.pth"
    path.write_bytes(whole.getvalue()[: int(share * len(whole.getvalue()))])
    refused(fresh(), path, "weights.pth is damaged")


class Planted:
    """What a hostile pickle does when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_never_runs(tmp_path: Path, mobilenet: dict[str, Tensor]) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.save(mobilenet | {"features.0.0.weight": Planted(trace)}, path)
    refused(fresh(), path, "holds more than weights")
    path.write_bytes(pickle.dumps(Planted(trace)))
    refused(fresh(), path, "holds more than weights")
    assert not trace.exists()


def test_files_that_hold_no_weights(tmp_path: Path, mobilenet: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.pth"
    refused(fresh(), path, "cannot be read: .*No such file")
    refused(fresh(), tmp_path, "cannot be read")
    path.write_text("<!DOCTYPE html>")
    refused(fresh(), path, "is damaged")
    for content in ([1, 2], {"state_dict": mobilenet}, {"epoch": 3}, torch.zeros(2)):
        torch.save(content, path)
        refused(fresh(), path, "holds no table of tensors")


def test_weights_of_something_else(tmp_path: Path, mobilenet: dict[str, Tensor]) -> None:
    path, first = tmp_path / "weights.pth", "features.0.0.weight"

    def save(content: dict[str, Tensor]) -> Path:
        torch.save(content, path)
        return path

    without = {name: value for name, value in mobilenet.items() if name != first}
    refused(fresh(), save(without), f"1 missing: {first}; give")
    refused(fresh(), save(mobilenet | {"layer4.bias": torch.zeros(2)}), "1 unexpected: layer4.bias; give")
    refused(
        fresh(4),
        save(mobilenet | {first: torch.zeros(32, 4, 3, 3)}),
        f"1 of another shape: {first} 32 x 4 x 3 x 3 instead of 32 x 3 x 3 x 3; give",
    )
    bare = {name.removeprefix("features."): value for name, value in mobilenet.items()}
    refused(fresh(), save(bare), r"missing: .*, \.\.\.; \d+ unexpected: 0.0.weight, ")
    refused(fresh(), save({}), "missing")
    refused(fresh(encoder="vgg16_bn"), save(mobilenet), "does not hold the encoder vgg16_bn: 78 missing")


def test_networks_without_published_weights(tmp_path: Path) -> None:
    refused(unet(), tmp_path / "weights.pth", "no weights for a 2-D plain encoder")
    refused(unet(3, encoder="mobilenet_v2", decoder_widths=[2] * 5), tmp_path / "weights.pth", "no weights for a 3-D")


def test_a_network_is_built_again_from_its_arguments(tmp_path: Path) -> None:
    """A state dict fits the network that the same arguments make, strictly."""
    for changes, dims in itertools.product([{"widths": [2, 3]}, {"norm": "instance", "decoder": "upsample"}], (2, 3)):
        net = unet(dims, **changes)
        torch.save(net.state_dict(), tmp_path / "net.pth")
        torch.manual_seed(1)
        again = UNet(dims=dims, **({"in_channels": 2, "classes": 3, "widths": [3, 4, 5]} | changes)).eval()
        again.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
        image = torch.randn(1, 2, *(2 * s for s in net.stride))
        assert torch.equal(scores(again, image), scores(net, image))
