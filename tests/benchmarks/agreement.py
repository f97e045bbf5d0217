"""How far masks and scores are those of the whole image, looked at in boxes: all of it, or places that are enough."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segcore.box import Box
from segcore.io import open_scene
from segcore.io.source import Wanted
from segcore.spec import Settings

#: Pixels around a box that the reference sees: more than a network of reach 94, and a multiple of its stride.
MARGIN = 128
#: What the reference may see at once, in pixels of an image and voxels of a volume.
_WHOLE = {2: 2048 * 2048, 3: 160**3}
_BOX = {2: 512, 3: 32}


def boxes_of(shape: Sequence[int]) -> list[Box]:
    """The whole image where it can be run at once; else a corner of it, and places far from its borders in 2-D."""
    shape, dims = tuple(shape), len(shape)
    if prod(shape) <= _WHOLE[dims]:
        return [Box.of(shape)]
    side = _BOX[dims]
    # In 3-D a box with its margin on both sides is too large already.
    shares = (0.0, 0.2, 0.4, 0.6, 0.8) if dims == 2 else (0.0,)
    starts = [tuple(min(int(share * n), n - side) // 16 * 16 for n in shape) for share in shares]
    return [Box(start, tuple(a + side for a in start)) for start in starts]


def format_boxes(boxes: Sequence[Box]) -> str:
    return json.dumps([[box.start, box.stop] for box in boxes])


def parse_boxes(text: str) -> list[Box]:
    return [Box(tuple(start), tuple(stop)) for start, stop in json.loads(text)]


def keep(path: Path, scores: Sequence[NDArray[np.float32]]) -> None:
    """Scores of boxes, (K, *box) each."""
    np.savez(path, *scores)


def kept(path: Path) -> list[NDArray[np.float32]]:
    with np.load(path) as file:
        return [file[name] for name in file.files]


def read_labels(mask: Path, axes: str, boxes: Sequence[Box]) -> list[NDArray[np.float32]]:
    """Labels of boxes, as a product has them."""
    return [values[0] for values in _read(mask, ("class",), axes, boxes)]


def read_scores(path: Path, classes: int, axes: str, boxes: Sequence[Box]) -> list[NDArray[np.float32]]:
    return _read(path, tuple(f"class {i}" for i in range(classes)), axes, boxes)


def same_labels(labels: Sequence[NDArray[np.float32]], reference: Sequence[NDArray[np.float32]]) -> float:
    """Share of pixels whose label is the whole image's."""
    equal = sum(int((a == b.argmax(0)).sum()) for a, b in zip(labels, reference, strict=True))
    return equal / sum(b[0].size for b in reference)


def change(scores: Sequence[NDArray[np.float32]], reference: Sequence[NDArray[np.float32]]) -> float:
    """The largest difference of a score."""
    return max(float(np.abs(a - b).max()) for a, b in zip(scores, reference, strict=True))


def _read(path: Path, names: tuple[str, ...], axes: str, boxes: Sequence[Box]) -> list[NDArray[np.float32]]:
    with tempfile.TemporaryDirectory() as folder:
        source = open_scene(str(path), Wanted(names, axes), Settings()).stage(Path(folder))
        return [source.read(box) for box in boxes]
