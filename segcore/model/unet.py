"""U-Nets of our own in torch, 2-D and 3-D from the same code.

    level 0   image ── encoder ──────── skip ──────── decoder ── 1x1 ── raw scores
    level 1              └─ encoder ──── skip ──── decoder ─┘
      ...                      └─ ...          ... ─┘             level i has 1 / 2^i of the image's size
    level n                       └─ encoder, bridge ─┘

The U: Ronneberger, Fischer and Brox 2015 (arXiv:1505.04597). In 3-D, and with padding and batch norm: Çiçek et al. 2016
(arXiv:1606.06650). Its encoder may be VGG16 (Simonyan and Zisserman 2014, arXiv:1409.1556) or MobileNetV2 (Sandler et
al. 2018, arXiv:1801.04381), which read the weights that torchvision publishes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segcore.errors import ModelError, one_line
from segcore.spec import times

Encoder = Literal["plain", "vgg16_bn", "mobilenet_v2"]
Norm = Literal["batch", "instance"]
Decoder = Literal["transposed", "upsample"]

_Make = Callable[..., nn.Module]
_CONVOLUTION: dict[int, _Make] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, _Make] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOLING: dict[int, _Make] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_BATCH: dict[int, _Make] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE: dict[int, _Make] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

_PLAIN_WIDTHS = (32, 64, 128, 256, 512)
# Column D of the paper's first table. Its fifth pooling is followed by the classifier, so nothing else is left there.
_VGG_WIDTHS, _VGG_CONVOLUTIONS = (64, 128, 256, 512, 512, 512), (2, 2, 3, 3, 3, 0)
# The paper's second table, cut where it halves: expansion, channels and repeats of the bottlenecks of each level.
_MOBILENET: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((1, 16, 1),),
    ((6, 24, 2),),
    ((6, 32, 3),),
    ((6, 64, 4), (6, 96, 3)),
    ((6, 160, 3), (6, 320, 1)),
)
_MOBILENET_STEM, _MOBILENET_LAST = 32, 1280
_DECODER_WIDTHS = {"vgg16_bn": (32, 64, 128, 256, 256), "mobilenet_v2": (16, 32, 64, 128, 256)}


class UNet(nn.Module):
    """A U-Net: images (N, in_channels, *spatial) become raw scores (N, classes, *spatial), sides multiples of `stride`.

    All arguments are plain JSON values, so that a network can be built again from what a file says.

    `dims`: 2 or 3. `encoder`: "plain" learns from scratch; "vgg16_bn" and "mobilenet_v2" have the parameters of
    torchvision's `features`, under the same names, for `load_encoder`. `widths`: channels of each level of a plain
    encoder, the finest first, with a max-pooling between two of them; 32, 64, 128, 256, 512 by default. `convolutions`:
    how many on each level of the plain encoder and of every decoder; `kernel`: their side in pixels, odd; `norm`, after
    each of them: "batch", "instance" or None. `decoder`: how a level doubles its size, "transposed" (a transposed
    convolution of side 2) or "upsample" (each value repeated, then a convolution). `decoder_widths`: channels of its
    levels, the finest first; by default those of a plain encoder.

    Skips lead from every level but the coarsest to the decoder. MobileNetV2 halves the image in its first layer, so the
    image itself is its skip at full resolution; VGG16 ends with a pooling, so convolutions of the decoder's ("bridge")
    work at its coarsest level. Convolutions pad with zeros. Weights start as in section 3 of Ronneberger et al. 2015.
    Raises ModelError for arguments that make no network.
    """

    def __init__(
        self,
        *,
        dims: int,
        in_channels: int,
        classes: int,
        encoder: Encoder = "plain",
        widths: Sequence[int] | None = None,
        convolutions: int = 2,
        kernel: int = 3,
        norm: Norm | None = "batch",
        decoder: Decoder = "transposed",
        decoder_widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _check_choice("dims", dims, (2, 3))
        _check_choice("encoder", encoder, ("plain", "vgg16_bn", "mobilenet_v2"))
        _check_choice("norm", norm, ("batch", "instance", None))
        _check_choice("decoder", decoder, ("transposed", "upsample"))
        _check_count("in_channels", in_channels)
        _check_count("classes", classes, least=2)
        _check_count("convolutions", convolutions)
        _check_count("kernel", kernel)
        if kernel % 2 == 0:
            raise ModelError(f"kernel {kernel} must be odd, so that a pixel lies in its middle; take {kernel + 1}")
        if widths is not None and encoder != "plain":
            raise ModelError(f"the widths of {encoder} are its own, not {widths!r}; leave `widths` out")
        self.dims, self.in_channels, self.classes, self.encoder_name = dims, in_channels, classes, encoder
        # Instance norm wants two values at least, also at the coarsest level; a MobileNetV2 has its own norm there.
        self._needs_two = norm == "instance" and encoder != "mobilenet_v2"

        if encoder == "mobilenet_v2":
            levels, channels = _mobilenet_levels(dims, in_channels)
        elif encoder == "vgg16_bn":
            channels = _VGG_WIDTHS
            levels = _pooled_levels(dims, in_channels, channels, _VGG_CONVOLUTIONS, 3, "batch")
        else:
            channels = _checked_widths("widths", _PLAIN_WIDTHS if widths is None else widths)
            levels = _pooled_levels(dims, in_channels, channels, (convolutions,) * len(channels), kernel, norm)
        # One flat row of layers, because its indices are the names of torchvision's parameters.
        self.encoder = nn.Sequential(*(layer for level in levels for layer in level))
        self._ends = tuple(accumulate(map(len, levels)))

        rising = _DECODER_WIDTHS.get(encoder, channels[:-1]) if decoder_widths is None else decoder_widths
        rising = _checked_widths("decoder_widths", rising, len(channels) - 1)
        bottom, self.bridge = channels[-1], nn.Sequential()
        if encoder == "vgg16_bn":
            self.bridge = nn.Sequential(*_convolve(dims, bottom, rising[-1], kernel, norm, convolutions))
            bottom = rising[-1]
        # Coarsest first, in the order in which data goes, which `reach` relies on.
        self.decoder = nn.ModuleList()
        for skip, width in reversed(list(zip(channels[:-1], rising, strict=True))):
            rise = _rise(dims, bottom, width, kernel, decoder)
            mix = nn.Sequential(*_convolve(dims, skip + width, width, kernel, norm, convolutions))
            self.decoder.append(_Level(rise, mix))
            bottom = width
        self.head = _CONVOLUTION[dims](bottom, classes, 1)
        self.apply(_initialise)

    @property
    def stride(self) -> tuple[int, ...]:
        """Total downsampling per axis: sides of the input are multiples of it."""
        return (2 ** len(self.decoder),) * self.dims

    @property
    def reach(self) -> tuple[int, ...] | None:
        """How far an output sees, per axis, in pixels from the border of its stride cell; None with instance norm.

        A bound that is met: a NaN in one cell (`stride` pixels on each axis, aligned) makes outputs NaN up to here
        past the cell, and no further. Without batch statistics, that is, in evaluation mode.
        """
        # Modules come in the order of the deepest path, and no skip or residual sees further than the path beside it.
        seen = 0
        for layer in self.modules():
            if isinstance(layer, nn.InstanceNorm2d | nn.InstanceNorm3d):
                return None
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                seen = -(-(seen + layer.kernel_size[0] // 2) // layer.stride[0])
            elif isinstance(layer, nn.MaxPool2d | nn.MaxPool3d):
                seen = -(-seen // 2)
            elif isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Upsample):
                seen *= 2
        return (seen,) * self.dims

    def forward(self, image: Tensor) -> Tensor:
        """Raw scores (N, classes, *spatial), without an activation, of images (N, in_channels, *spatial).

        Raises ModelError for other channels, and for sides that are no multiples of `stride`: callers pad and crop.
        Nothing is checked while the network is traced or exported, so that its sides stay free.
        """
        tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if not (tracing or torch.compiler.is_compiling()):
            self._check(image.shape)
        *skips, deep = self.encode(image)
        deep = self.bridge(deep)
        for level, skip in zip(self.decoder, reversed(skips), strict=True):
            deep = level(deep, skip)
        return self.head(deep)

    def encode(self, image: Tensor) -> list[Tensor]:
        """The encoder's features on each level, (N, channels, *spatial / 2^level), the finest first."""
        layers, features = list(self.encoder), []
        for first, end in pairwise((0, *self._ends)):
            for layer in layers[first:end]:
                image = layer(image)
            features.append(image)
        return features

    def load_encoder(self, path: Path) -> None:
        """Read the encoder's weights from a file that torchvision publishes, such as `vgg16_bn-6c64b313.pth`.

        The weights of the classifier are passed over. Where `in_channels` is not 3, the first convolution takes those
        of red, green and blue in turns, times 3 / in_channels, which keeps the size of its sums. The pickle in the
        file is read without running any of its code. Raises ModelError, and leaves the network as it was, for a file
        that does not hold exactly this encoder, and for networks without such a file: a plain encoder, or 3-D.
        """
        if self.encoder_name == "plain" or self.dims != 2:
            raise ModelError(
                f"torchvision has no weights for a {self.dims}-D {self.encoder_name} encoder; load those of a 2-D "
                f"vgg16_bn or mobilenet_v2, or train from scratch"
            )
        own = self.encoder.state_dict()
        stored = {name: value for name, value in _read(path).items() if not name.startswith("classifier.")}
        first, *_ = own
        wanted = {f"features.{name}": tuple(value.shape) for name, value in own.items()}
        wanted[f"features.{first}"] = (own[first].shape[0], 3, *own[first].shape[2:])
        # Files from before torch 0.4.1, as that of VGG16, do not count batches, and nothing here reads the count.
        counts = {name for name in wanted if name.endswith(".num_batches_tracked")}
        faults = {
            "missing": [name for name in wanted if name not in stored and name not in counts],
            "unexpected": [name for name in stored if name not in wanted],
            "of another shape": [
                f"{name} {times(stored[name].shape)} instead of {times(shape)}"
                for name, shape in wanted.items()
                if name in stored and tuple(stored[name].shape) != shape
            ],
        }
        if any(faults.values()):
            told = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
            raise ModelError(
                f"{path} does not hold the encoder {self.encoder_name}: {told}; give the file that torchvision "
                f"publishes for {self.encoder_name}"
            )
        weights = {name.removeprefix("features."): value for name, value in stored.items()}
        turns = [i % 3 for i in range(self.in_channels)]
        weights[first] = weights[first][:, turns] * (3 / self.in_channels)
        self.encoder.load_state_dict(own | weights)

    def _check(self, shape: torch.Size) -> None:
        if len(shape) != self.dims + 2 or shape[1] != self.in_channels:
            raise ModelError(
                f"the network takes images (N, {self.in_channels}, {', '.join(['side'] * self.dims)}) and got "
                f"{tuple(shape)}; arrange the axes and channels so"
            )
        sides = shape[2:]
        if any(n < s or n % s for n, s in zip(sides, self.stride, strict=True)):
            raise ModelError(
                f"an image of {times(sides)} pixels does not fit the stride {times(self.stride)}; pad its sides to "
                f"multiples of it, and crop the scores"
            )
        if self._needs_two and sides == self.stride:
            raise ModelError(
                f"instance norm has a single value left of an image of {times(sides)} pixels, which is the stride; "
                f"give an image that is larger on one side at least"
            )


class _Level(nn.Module):
    """One level of the decoder: what lies below rises by two, and is mixed with the skip."""

    def __init__(self, rise: nn.Module, mix: nn.Module) -> None:
        super().__init__()
        self.rise, self.mix = rise, mix

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return self.mix(torch.cat([skip, self.rise(deep)], dim=1))


class _Bottleneck(nn.Module):
    """The inverted residual of MobileNetV2: expand, filter each channel, project without an activation."""

    def __init__(self, dims: int, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [] if expansion == 1 else [_relu6_unit(dims, inputs, hidden, 1)]
        layers += [_relu6_unit(dims, hidden, hidden, 3, stride, groups=hidden)]
        self.conv = nn.Sequential(*layers, _CONVOLUTION[dims](hidden, outputs, 1, bias=False), _BATCH[dims](outputs))
        self._residual = stride == 1 and inputs == outputs

    def forward(self, image: Tensor) -> Tensor:
        return image + self.conv(image) if self._residual else self.conv(image)


def _convolve(dims: int, inputs: int, outputs: int, kernel: int, norm: Norm | None, repeats: int) -> list[nn.Module]:
    """`repeats` times convolution, norm and ReLU."""
    layers: list[nn.Module] = []
    for i in range(repeats):
        layers.append(_CONVOLUTION[dims](outputs if i else inputs, outputs, kernel, padding=kernel // 2))
        if norm == "batch":
            layers.append(_BATCH[dims](outputs))
        elif norm == "instance":
            layers.append(_INSTANCE[dims](outputs, affine=True))
        layers.append(nn.ReLU(inplace=True))
    return layers


def _pooled_levels(
    dims: int, inputs: int, widths: Sequence[int], repeats: Sequence[int], kernel: int, norm: Norm | None
) -> list[list[nn.Module]]:
    """The layers of each level: a pooling on all but the first, and convolutions."""
    levels = []
    for depth, (width, count) in enumerate(zip(widths, repeats, strict=True)):
        pooling = [_POOLING[dims](2)] if depth else []
        levels.append([*pooling, *_convolve(dims, inputs, width, kernel, norm, count)])
        inputs = width
    return levels


def _mobilenet_levels(dims: int, inputs: int) -> tuple[list[list[nn.Module]], tuple[int, ...]]:
    """The layers of each level of MobileNetV2, none on the first, and its channels."""
    levels: list[list[nn.Module]] = [[], [_relu6_unit(dims, inputs, _MOBILENET_STEM, 3, 2)]]
    channels, width = [inputs], _MOBILENET_STEM
    for depth, rows in enumerate(_MOBILENET):
        stride = 1
        if depth:
            levels.append([])
            stride = 2
        for expansion, outputs, repeats in rows:
            for _ in range(repeats):
                levels[-1].append(_Bottleneck(dims, width, outputs, expansion, stride))
                width, stride = outputs, 1
        channels.append(width)
    levels[-1].append(_relu6_unit(dims, width, _MOBILENET_LAST, 1))
    return levels, (*channels[:-1], _MOBILENET_LAST)


def _relu6_unit(dims: int, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    convolution = _CONVOLUTION[dims](
        inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, _BATCH[dims](outputs), nn.ReLU6(inplace=True))


def _rise(dims: int, inputs: int, outputs: int, kernel: int, decoder: Decoder) -> nn.Module:
    """Twice the size, without an activation, as in the U-Net's paper."""
    if decoder == "transposed":
        return _TRANSPOSED[dims](inputs, outputs, 2, stride=2)
    convolution = _CONVOLUTION[dims](inputs, outputs, kernel, padding=kernel // 2)
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), convolution)


def _initialise(layer: nn.Module) -> None:
    """Values of variance 2 / n, for the n values that an output is made of; the ReLU after them halves the power."""
    if isinstance(layer, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    elif isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d):
        # Side and stride are equal, so each output is made of one value of each channel, and no ReLU follows.
        nn.init.normal_(layer.weight, std=layer.in_channels**-0.5)
    else:
        return
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights by name. Raises ModelError for anything else; runs no code from it."""
    try:
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from error
    except Exception as error:  # what a damaged or foreign file makes torch raise shares no base but Exception
        raise ModelError(
            f"{path} is damaged, or holds more than weights, which segflow never opens ({type(error).__name__}); get "
            f"the file again, from torchvision"
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ModelError(f"{path} holds no table of tensors; give a file of weights that torchvision publishes")
    return {str(name): value for name, value in stored.items()}


def _some(names: Sequence[str]) -> str:
    """The first few of many."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_choice(argument: str, value: object, choices: tuple[object, ...]) -> None:
    # By type as well: 2.0 == 2, and a JSON file may say either.
    if (type(value), value) not in [(type(choice), choice) for choice in choices]:
        raise ModelError(f"{argument} {value!r} must be one of {', '.join(map(repr, choices))}")


def _check_count(argument: str, value: object, least: int = 1) -> None:
    if type(value) is not int or value < least:
        raise ModelError(f"{argument} {value!r} must be a whole number, {least} or more")


def _checked_widths(argument: str, widths: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    if not isinstance(widths, list | tuple) or not (widths or count == 0) or count not in (None, len(widths)):
        wanted = "a number of channels for each level" if count is None else f"{count} numbers of channels"
        raise ModelError(f"{argument} {widths!r} must be a list of {wanted}, the finest level first")
    for width in widths:
        _check_count(argument, width)
    return tuple(widths)
