"""How far a network sees, measured on the network itself.

A network is *local* when the outputs of one cell of `stride` pixels depend on pixels at most `reach` away from that
cell, wherever the cell lies. Then a tile with a halo of its reach says what the whole image says (law 2). Whether it is
so is found in two ways that do not trust each other:

- one cell in the middle of a long strip is marked, and its *footprint* tells which outputs may depend on it. In torch
  a NaN is the mark (`segcore.model.torch`), in ONNX a graph carries marks in place of values (`segcore.model.graph`);
- then the network itself is run on two strips that agree within the reach of some cells and nowhere else: the scores
  of these cells must be the same (`largest_error`). This second test is cheap, and repeated when a network is first
  loaded on a machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from segcore.errors import MemoryShortageError, ModelError
from segcore.model.segmenter import Floats, Segmenter
from segcore.spec import Sides, Sight, times

#: Difference of scores, relative to their size, that rounding may make. On a CPU none was ever seen.
ROUNDING = {"CPU": 1e-5, "CUDA": 1e-3}
#: What differs in two strips is so many times larger than what does not, so that little influence shows.
_CONTRAST = np.float32(1000)
#: Why a network is not local though no layer sees everything.
_AWARE = "a layer knows where it is or how large the image is, or hides what it sees"
_HIDDEN = "marks on the image do not arrive in the scores: a layer hides NaN from the probe"
#: Sides of images that are tried until a network takes one, for images and volumes.
_SIDES = {2: (128, 96, 224, 256, 320, 512, 64), 3: (64, 96, 32, 128, 112, 48)}
#: Length of the strips that are probed (pixels): who still sees their ends is not worth tiling.
_LONGEST = {2: 4096, 3: 1024}
#: Least and largest side of the image in which a network is looked at from all around.
_SQUARE = {2: (512, 1536), 3: (64, 112)}


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward pass: input size relative to the smallest features, per axis, and floating-point operations.

    Operations are those of convolutions and matrix products; a multiply-add counts as two.
    """

    downsampling: tuple[int, ...]
    flops: int


class Network(Segmenter, Protocol):
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
    """Which sizes a network accepts: `shape`, and what differs from it by multiples of `multiple`, which divide it.

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


def probe(network: Network, channels: int, ndim: int) -> Sighting:
    """Measure a network of `channels` inputs and `ndim` spatial axes. Raises ModelError if it takes no image at all."""
    sizes = accepted_sizes(network, channels, ndim)
    if not np.isfinite(network(noise((1, channels, *sizes.shape)))).all():
        raise ModelError("the network gives NaN or infinity for an image of noise; are its weights whole?")
    trace = network.trace(sizes.shape)
    stride = tuple(math.lcm(d, m or 1) for d, m in zip(trace.downsampling, sizes.multiple, strict=True))
    try:
        reach, floods = _reach(network, channels, sizes, stride)
    except ModelError as fault:
        reach, floods = None, (str(fault),)
    if reach is not None:
        error = largest_error(network, Sight(stride, reach), channels, _LONGEST[ndim] // 8)
        if error > rounding_of(network):
            reach = None
            floods = (f"scores change by {error:.2g} of their size with what lies beyond its reach: {_AWARE}",)
    flops = trace.flops / math.prod(sizes.shape)
    return Sighting(sizes, stride, reach, floods, network.parameters, flops, network.engine)


def accepted_sizes(network: Network, channels: int, ndim: int) -> Sizes:
    """Which sizes a network turns into scores of the same size. Raises ModelError where there is none."""
    declared = network.spatial or (None,) * ndim
    if len(declared) != ndim:
        raise ModelError(f"the network has {len(declared)} spatial axes, and its card says {ndim}; check `axes`")
    reasons: list[str] = []
    steps = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 28, 32, 48, 64, 96, 112, 128, 256)

    def accepts(shape: tuple[int, ...]) -> bool:
        try:
            out = network(noise((1, channels, *shape)))
        except ModelError as error:
            reasons.append(str(error))
            return False
        if out.shape[2:] != shape:
            reasons.append(f"it turns an image of {times(shape)} into scores of {times(out.shape[2:])}")
        return out.shape[2:] == shape

    candidates = [tuple(n or side for n in declared) for side in (_SIDES[ndim] if None in declared else (0,))]
    shape = next(filter(accepts, candidates), None)
    if shape is None:
        sides = ", ".join(map(times, candidates))
        raise ModelError(
            f"the network takes no image of {channels} channels and {sides} pixels and gives back scores on the same "
            f"grid ({reasons[0]}); segflow needs one score of each class for every pixel"
        )
    multiple = []
    for axis, n in enumerate(declared):
        tried = (step for step in steps if n is None and shape[axis] % step == 0)
        longer = ((step, tuple(s + step * (a == axis) for a, s in enumerate(shape))) for step in tried)
        multiple.append(next((step for step, other in longer if accepts(other)), 0))
    return Sizes(shape, tuple(multiple))


def rounding_of(segmenter: Segmenter) -> float:
    """Up to what `largest_error` counts as none, in this engine: on a GPU far pixels may take part in rounding."""
    return ROUNDING["CUDA" if "CUDA" in segmenter.engine else "CPU"]


def largest_error(segmenter: Segmenter, sight: Sight, channels: int, margin: int = 64) -> float:
    """How far a promise of locality is from true, relative to the scores; `rounding_of` where it holds.

    Along each axis, a strip of noise is compared with two others of other lengths. One is like it within the halo of
    its first cell, one within that of its last, and both within that of a cell in the middle, which lies elsewhere in
    each; the rest differs by much, for `margin` pixels at least. The scores of these cells must be the same. Raises
    ModelError where the network does not take the strips.
    """
    worst = 0.0
    for axis, (s, (before, after)) in enumerate(zip(sight.stride, sight.halo, strict=True)):
        gap = -(-margin // s) * s
        cell = before + s + after
        length = s + after + gap + cell + gap + before + s
        middle = s + after + gap
        shape = _strip(segmenter, channels, sight.stride, axis, length)
        one = np.moveaxis(noise((1, channels, *shape)), 2 + axis, 0)
        mine = _along(segmenter, one, axis)
        # In each of the others: how much longer it is, where the middle lies, and which end is alike: where that begins
        # here and there, its length, and where in it the cell lies.
        for more, shift, here, there, count, at in (
            (3 * s, s, 0, 0, s + after, 0),
            (5 * s, 4 * s, length - before - s, length - before + 4 * s, before + s, before),
        ):
            longer = tuple(n + more * (a == axis) for a, n in enumerate(shape))
            other = np.moveaxis(_CONTRAST * noise((1, channels, *longer), seed=more), 2 + axis, 0)
            other[there : there + count] = one[here : here + count]
            other[middle + shift : middle + shift + cell] = one[middle : middle + cell]
            theirs = _along(segmenter, other, axis)
            for a, b in ((here + at, there + at), (middle + before, middle + shift + before)):
                size = max(float(np.abs(mine[a : a + s]).max()), 1e-6)
                error = float(np.abs(mine[a : a + s] - theirs[b : b + s]).max()) / size
                worst = max(worst, error if np.isfinite(error) else math.inf)
    return worst


def _along(segmenter: Segmenter, strip: Floats, axis: int) -> Floats:
    """Scores of a strip; in both its own axis comes first."""
    return np.moveaxis(segmenter(np.ascontiguousarray(np.moveaxis(strip, 0, 2 + axis))), 2 + axis, 0)


def _strip(segmenter: Segmenter, channels: int, stride: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    """The shape of a strip of this length, as thin as the network takes it: a few want more than a cell, to pad it.

    Raises ModelError where it takes none.
    """
    for thickness in (1, 16, 32, 64, 128, 256):
        shape = tuple(length if a == axis else -(-thickness // s) * s for a, s in enumerate(stride))
        short = tuple(min(n, max(4 * s, -(-thickness // s) * s)) for n, s in zip(shape, stride, strict=True))
        try:
            segmenter(noise((1, channels, *short)))
        except ModelError as error:
            reason = error
        else:
            return shape
    raise ModelError(f"the network takes no strip of {length} pixels, so that it cannot be probed: {reason}")


def _reach(
    network: Network, channels: int, sizes: Sizes, stride: tuple[int, ...]
) -> tuple[Sides | None, tuple[str, ...]]:
    """How far the outputs of a cell see, per axis and side; or None, and the layers that see everything."""
    if sizes.fixed:
        marked = _marked(sizes.shape, stride, (0,))
        return None, network.flooding(marked) or (f"it takes images of {sizes}, which nothing can be cut out of",)
    found = []
    for axis, s in enumerate(stride):
        # Always the longest strip: what looks far through wide gaps jumps over the ends of a short one.
        length = _LONGEST[len(stride)] // (2 * s) * 2 * s
        start = length // 2
        marked = _marked(_strip(network, channels, stride, axis, length), stride, (axis,))
        seen = _extents(network.footprint(marked))[axis]
        if seen is None:
            return None, (_HIDDEN,)
        if seen[0] == 0 or seen[1] == length - 1:
            return None, network.flooding(marked) or (f"it sees {length // 2} pixels or more",)
        # Outputs behind the marked cell see what lies before them, and the other way round.
        found.append((max(0, seen[1] - (start + s - 1)), max(0, start - seen[0])))
    return _look_around(network, channels, stride, tuple(found))


def _look_around(
    network: Network, channels: int, stride: tuple[int, ...], reach: Sides
) -> tuple[Sides | None, tuple[str, ...]]:
    """The reach, widened by what is seen of a cell in the middle of a square: strips are blind for diagonals."""
    low, high = _SQUARE[len(stride)]
    furthest = max(side for sides in reach for side in sides)
    shape = tuple(-(-min(max(low, 2 * furthest + 4 * s), high) // s) * s for s in stride)
    centre = tuple(n // s // 2 * s for n, s in zip(shape, stride, strict=True))
    marked = _marked(shape, stride, tuple(range(len(shape))))
    wider = []
    for seen, c, s, n, (before, after) in zip(
        _extents(network.footprint(marked)), centre, stride, shape, reach, strict=True
    ):
        if seen is None:
            return None, (_HIDDEN,)
        further = (seen[1] - (c + s - 1), c - seen[0])
        if (seen[0] == 0 and after < c) or (seen[1] == n - 1 and before < n - c - s):
            return None, (f"it sees {c} pixels or more, not along its axes",)
        wider.append((max(before, further[0]), max(after, further[1])))
    return tuple(wider), ()


def _extents(marks: NDArray[np.bool_]) -> list[tuple[int, int] | None]:
    """The first and the last marked pixel along each axis."""
    found: list[tuple[int, int] | None] = []
    for axis in range(marks.ndim):
        seen = np.flatnonzero(marks.any(axis=tuple(a for a in range(marks.ndim) if a != axis)))
        found.append((int(seen[0]), int(seen[-1])) if seen.size else None)
    return found


def _marked(shape: tuple[int, ...], stride: tuple[int, ...], axes: tuple[int, ...]) -> NDArray[np.bool_]:
    """Marks on the cell in the middle of an image along these axes, and from end to end along the others."""
    marks = np.zeros(shape, bool)
    starts = (n // s // 2 * s for n, s in zip(shape, stride, strict=True))
    cell = (slice(a, a + s) for a, s in zip(starts, stride, strict=True))
    marks[tuple(part if axis in axes else slice(None) for axis, part in enumerate(cell))] = True
    return marks


def first_taken(
    network: Callable[[Floats], Floats], shapes: Iterable[tuple[int, ...]], otherwise: str
) -> tuple[Floats, Floats]:
    """Noise of the first of these shapes (N, C, *spatial) that a network takes, and its scores.

    A network of many levels wants a large image. Raises ModelError where it takes none: what that means `otherwise`,
    and why; and MemoryShortageError, which says nothing of the network.
    """
    fault: ModelError | None = None
    for shape in shapes:
        image = noise(shape)
        try:
            return image, network(image)
        except MemoryShortageError:
            raise
        except ModelError as error:
            fault = error
    raise ModelError(f"{otherwise}: {fault}") from fault


def noise(shape: tuple[int, ...], seed: int = 0) -> Floats:
    """Normal noise of mean 0 and deviation 1, the same for the same shape and seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
