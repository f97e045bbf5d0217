"""How far a network sees, measured on the network itself.

A network is *local* when the outputs of one cell of `stride` pixels depend on pixels at most `reach` away from that
cell, wherever the cell lies. Then a tile with a halo of its reach says what the whole image says (law 2). Whether it is
so is found in two ways that do not trust each other:

- one cell in the middle of a long strip is marked, and its *footprint* tells which outputs may depend on it. In torch
  a NaN is the mark (`segcore.model.torch`), in ONNX a graph carries marks in place of values (`segcore.model.graph`);
- then the network itself is run on two strips that agree within the reach of a cell and nowhere else, and that lie
  one stride apart: the outputs of the cell must be the same (`largest_error`). This second test is cheap, and is
  repeated whenever a network is loaded.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from segcore.errors import ModelError
from segcore.model.segmenter import Floats, Segmenter
from segcore.spec import Sides, Sight, times

#: Relative difference of scores up to which two runs of a network count as the same: many times what rounding makes.
SAME = 1e-3
#: Sides of images that are tried until a network takes one, for images and volumes.
_SIDES = {1: (256,), 2: (128, 96, 224, 256, 320, 512, 64), 3: (64, 96, 32, 128, 112, 48)}
#: Length of a strip (pixels) behind which a network that still sees its ends is not worth tiling.
_LONGEST = {1: 8192, 2: 4096, 3: 1024}


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward pass: input size relative to the smallest features, per axis, and floating-point operations.

    Operations are those of convolutions and matrix products; a multiply-add counts as two.
    """

    downsampling: tuple[int, ...]
    flops: int


class Probed(Segmenter, Protocol):
    """A network that can also be asked what its outputs depend on."""

    spatial: tuple[int | None, ...] | None
    """Sizes that the file itself declares, None where they are free."""
    parameters: int

    def footprint(self, marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which pixels of the output (*spatial), in any class, may depend on the `marked` pixels of the input."""
        ...

    def flooding(self, marked: NDArray[np.bool_]) -> tuple[str, ...]:
        """Layers that depend on marked pixels everywhere although what they were given does not, in words."""
        ...

    def trace(self, shape: tuple[int, ...]) -> Trace:
        """What a forward pass over an image of this shape does."""
        ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """Which sizes a network accepts: `shape`, and every other that differs from it by multiples of `multiple`.

    A multiple of 0 means that the axis takes no other size.
    """

    shape: tuple[int, ...]
    multiple: tuple[int, ...]

    @property
    def fixed(self) -> bool:
        return 0 in self.multiple

    def __str__(self) -> str:
        if self.fixed:
            return f"{times(self.shape)} only"
        if set(self.multiple) == {1}:
            return "any"
        same = len(set(self.multiple)) == 1
        return f"multiples of {self.multiple[0] if same else times(self.multiple)}"


@dataclass(frozen=True, slots=True)
class Sighting:
    """What was found: sizes accepted, stride, reach (None: not local, `floods` says why), parameters, operations."""

    sizes: Sizes
    stride: tuple[int, ...]
    reach: Sides | None
    floods: tuple[str, ...]
    parameters: int
    flops_per_pixel: float
    engine: str


def probe(network: Probed, channels: int, ndim: int) -> Sighting:
    """Measure a network of `channels` inputs and `ndim` spatial axes. Raises ModelError if it takes no image at all."""
    sizes = accepted_sizes(network, channels, ndim)
    trace = network.trace(sizes.shape)
    stride = tuple(math.lcm(d, m or 1) for d, m in zip(trace.downsampling, sizes.multiple, strict=True))
    reach, floods = _reach(network, channels, sizes, stride)
    if reach is not None and not sizes.fixed:
        error = largest_error(network, Sight(stride, reach), channels)
        if error > SAME:
            reach, floods = None, (f"scores depend on where a window lies: they differ by {error:.1%}",)
    flops = trace.flops / math.prod(sizes.shape)
    return Sighting(sizes, stride, reach, floods, network.parameters, flops, network.engine)


def accepted_sizes(network: Probed, channels: int, ndim: int) -> Sizes:
    """Which sizes a network turns into scores of the same size. Raises ModelError where there is none."""
    declared = network.spatial or (None,) * ndim
    if len(declared) != ndim:
        raise ModelError(f"the network has {len(declared)} spatial axes, and its card says {ndim}; check `axes`")
    reasons: list[str] = []

    def accepts(shape: tuple[int, ...]) -> bool:
        try:
            out = network(_noise((1, channels, *shape)))
        except ModelError as error:
            reasons.append(str(error))
            return False
        if out.shape[2:] != shape:
            reasons.append(f"it turns an image of {times(shape)} into scores of {times(out.shape[2:])}")
        return out.shape[2:] == shape

    candidates = [tuple(n or side for n in declared) for side in (_SIDES[ndim] if None in declared else (0,))]
    shape = next(filter(accepts, candidates), None)
    if shape is None:
        tried = ", ".join(map(times, candidates))
        raise ModelError(
            f"the network takes no image of {channels} channels and {tried} pixels and gives back scores on the same "
            f"grid ({reasons[0]}); segflow needs one score of each class for every pixel"
        )
    multiple = []
    for axis, n in enumerate(declared):
        steps = (2**k for k in range(8)) if n is None else ()
        longer = ((step, tuple(s + step * (a == axis) for a, s in enumerate(shape))) for step in steps)
        multiple.append(next((step for step, other in longer if accepts(other)), 0))
    return Sizes(shape, tuple(multiple))


def largest_error(segmenter: Segmenter, sight: Sight, channels: int, axes: tuple[int, ...] | None = None) -> float:
    """How far a promise of locality is from true: 0 where it holds, some thousandths or more where it does not.

    Along each axis (or those in `axes`), two strips of noise are alike within the halo of one cell and differ by much
    everywhere else; and the cell lies one stride further in the second. The largest difference of its raw scores,
    relative to their size. Raises ModelError where the network does not take the strips.
    """
    worst = 0.0
    for axis in range(len(sight.stride)) if axes is None else axes:
        s, (before, after) = sight.stride[axis], sight.halo[axis]
        shape = _strip(segmenter, channels, sight.stride, axis, before + after + 4 * s)
        first = np.moveaxis(_noise((1, channels, *shape)), 2 + axis, 0)
        second = np.moveaxis(30 * _noise((1, channels, *shape), seed=1), 2 + axis, 0)
        second[2 * s : 2 * s + before + s + after] = first[s : s + before + s + after]
        cells = []
        for strip, start in ((first, s + before), (second, 2 * s + before)):
            out = segmenter(np.ascontiguousarray(np.moveaxis(strip, 0, 2 + axis)))
            cells.append(np.moveaxis(out, 2 + axis, 0)[start : start + s])
        size = max(float(np.abs(cells[0]).max()), 1e-6)
        error = float(np.abs(cells[0] - cells[1]).max()) / size
        worst = max(worst, error if np.isfinite(error) else math.inf)
    return worst


def _strip(segmenter: Segmenter, channels: int, stride: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    """The shape of a strip of this length: one cell thick, or two for a network that dislikes features of one pixel."""
    thin, thick = (tuple(length if a == axis else k * s for a, s in enumerate(stride)) for k in (1, 2))
    short = tuple(min(n, 4 * s) for n, s in zip(thin, stride, strict=True))
    try:
        segmenter(_noise((1, channels, *short)))
    except ModelError:
        return thick
    return thin


def _reach(
    network: Probed, channels: int, sizes: Sizes, stride: tuple[int, ...]
) -> tuple[Sides | None, tuple[str, ...]]:
    """How far the outputs of a cell see, per axis and side; or None, and the layers that see everything."""
    found = []
    for axis, s in enumerate(stride):
        length = sizes.shape[axis] if sizes.fixed else -(-max(256, 16 * s) // s) * s
        while True:
            shape = sizes.shape if sizes.fixed else _strip(network, channels, stride, axis, length)
            start = shape[axis] // s // 2 * s
            marked = np.zeros(shape, bool)
            np.moveaxis(marked, axis, 0)[start : start + s] = True
            others = tuple(a for a in range(len(stride)) if a != axis)
            seen = np.flatnonzero(network.footprint(marked).any(axis=others))
            if seen.size == 0 or (seen[0] > 0 and seen[-1] < shape[axis] - 1):
                break
            # What sees far fills a short strip as well as what sees everything: only a long one tells them apart.
            if sizes.fixed or 2 * length > _LONGEST[len(stride)]:
                far = (
                    f"it sees all of its only size, {times(shape)}" if sizes.fixed else f"it sees {length // 2} pixels"
                )
                return None, network.flooding(marked) or (far,)
            length *= 2
        # Outputs behind the marked cell see what lies before them, and the other way round.
        ends = (int(seen[0]), int(seen[-1])) if seen.size else (start, start)
        found.append((max(0, ends[1] - (start + s - 1)), max(0, start - ends[0])))
    return tuple(found), ()


def bytes_per_pixel(model: str, channels: int, found: Sighting) -> float:
    """What the engine holds for each pixel of a window, in bytes, at its peak; measured in a process of its own.

    `model`: a built-in name or a folder. Two sizes are run, and the second counts, by what it holds over the process at
    rest or over the first, whichever is more: heaps keep what they had, and a prediction should be no less than the
    truth. Where the peak of a process cannot be set back (on Linux it can), the larger image comes last. Raises
    ModelError.
    """
    shapes = [found.sizes.shape, found.sizes.shape]
    if not found.sizes.fixed:
        side = {1: 2**18, 2: 512, 3: 64}[len(found.stride)]
        small = tuple(max(1, side // s) * s for s in found.stride)
        shapes = [small, tuple(2 * n for n in small)]
    request = json.dumps({"model": model, "channels": channels, "shapes": shapes})
    child = subprocess.run(
        [sys.executable, "-m", "segcore.model.probe"], input=request, capture_output=True, text=True, check=False
    )
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"])[-1]
        raise ModelError(f"cannot measure the memory of {model}: {reason}")
    first, second = (float(held) for held in json.loads(child.stdout))
    pixels = math.prod(shapes[1])
    steeper = 0.0 if found.sizes.fixed else (second - first) / (pixels - math.prod(shapes[0]))
    return max(4.0 * channels, steeper, max(first, second) / pixels)


def _measure_memory() -> None:
    """The child of `bytes_per_pixel`: what is held at the peak over the process at rest, in bytes, for each shape."""
    from segcore.model import load_segmenter
    from segcore.model.card import load_card
    from segcore.spec import usable_cores

    request = json.load(sys.stdin)
    segmenter = load_segmenter(load_card(request["model"]), usable_cores())
    images = [_noise((1, request["channels"], *shape)) for shape in request["shapes"]]
    rest, peaks = _held("VmRSS"), []
    for image in images:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        segmenter(image)
        peaks.append(_held("VmHWM") - rest)
    sys.stdout.write(json.dumps(peaks))


def _held(key: str) -> int:
    """Bytes that this process holds now (`VmRSS`) or held at its peak (`VmHWM`); without /proc always the latter."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _noise(shape: tuple[int, ...], seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


if __name__ == "__main__":
    _measure_memory()
