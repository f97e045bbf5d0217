"""A network that was cut into stages: its parts, and where it is cropped. Shares onnx with `segcore.model.graph`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, TensorProto

from segcore.box import Box
from segcore.model.graph import reads
from segcore.model.segmenter import Integers
from segcore.staging import Stages, rising


@dataclass(frozen=True, slots=True)
class Crop:
    """Where a tensor is cropped on its way up: to what rises to a `level`, in `ratio` of its pixels for a cell.

    `risen`: it has been cropped before, further inside, and begins there.
    """

    level: int
    ratio: tuple[int, ...]
    risen: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a network, which is made into an ONNX file when that is wanted.

    All parts share one copy of the weights: nearly every part has nearly all of them.
    """

    graph: ModelProto
    weights: Mapping[str, TensorProto]

    def file(self) -> bytes:
        """The part as an ONNX file, with its weights."""
        whole = ModelProto()
        whole.CopyFrom(self.graph)
        taken = {name for node in self.graph.graph.node for name in reads(node)}
        whole.graph.initializer.extend(self.weights[name] for name in sorted(taken & self.weights.keys()))
        return whole.SerializeToString()


@dataclass(frozen=True, slots=True)
class Cut:
    """A network in stages: what a planner has to know, and the parts, to be run.

    `down[i]` takes (image,) and gives what is pooled; `up[i]` takes what `takes[i]` says of (image, risen) and gives
    what has risen by a level; `inner[n]` is what is inside of n levels, `inner[0]` the network itself. `cropped` is the
    network in one pass, of which a part rises: it takes the image, and for every one of `crops` the first pixel and the
    one behind the last (int64), per axis. It is None where that cannot be.
    """

    stages: Stages
    down: tuple[Piece, ...]
    up: tuple[Piece, ...]
    takes: tuple[tuple[bool, bool], ...]
    inner: tuple[Piece, ...]
    cropped: Piece | None
    crops: tuple[Crop, ...]

    def without_parts(self) -> Cut:
        """What is known of the cut, without any weights."""
        return replace(self, down=(), up=(), inner=(), cropped=None)

    def cropping(self, window: tuple[int, ...], wanted: Box) -> tuple[Box, list[Integers]]:
        """What rises of a window where a box of it is wanted, and what `cropped` takes beside the image for that."""
        levels = self.stages.levels
        rises = [box for _, box in rising(window, wanted, levels)]
        # What has risen to a level begins where it was cropped further inside; within all of that, at its beginning.
        origins = [box.fine(level.factor).start for box, level in zip(rises[1:], levels[1:], strict=True)]
        ends = list[Integers]()
        for crop in self.crops:
            box = rises[crop.level]
            if crop.risen and crop.level < len(origins):
                box = box.shift([-a for a in origins[crop.level]])
            ends += [np.array(end, np.int64) * crop.ratio for end in (box.start, box.stop)]
        return rises[0].fine(levels[0].factor), ends
