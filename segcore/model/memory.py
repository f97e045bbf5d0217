"""How much memory a network takes, measured in a process of its own."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from segcore.errors import ModelError
from segcore.model import load_segmenter
from segcore.model.card import load_card
from segcore.model.probe import Sighting
from segcore.spec import usable_cores


def bytes_per_pixel(model: str, channels: int, found: Sighting, window: tuple[int, ...] | None = None) -> float:
    """What the engine holds for each pixel of a window, in bytes, at its peak; measured in a process of its own.

    `model`: a built-in name or a folder; `window`: its card's, for one that is not local. Two sizes are run, and the
    second counts, by what it holds over the process at rest or over the first, whichever is more: heaps keep what they
    had, and a prediction should be no less than the truth. Where the peak of a process cannot be set back (on Linux it
    can), the larger image comes last. Raises ModelError.
    """
    shapes = [found.sizes.shape, found.sizes.shape]
    if found.reach is None and window is not None:
        shapes = [window, window]
    elif not found.sizes.fixed:
        side = {2: 512, 3: 64}[len(found.stride)]
        small = tuple(max(1, side // s) * s for s in found.stride)
        shapes = [small, tuple(2 * n for n in small)]
    request = json.dumps({"model": model, "channels": channels, "shapes": shapes})
    child = subprocess.run(
        [sys.executable, "-P", "-m", "segcore.model.memory"], input=request, capture_output=True, text=True, check=False
    )
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"])[-1]
        raise ModelError(f"cannot measure the memory of {model}: {reason}")
    first, second = (float(held) for held in json.loads(child.stdout))
    pixels = math.prod(shapes[1])
    steeper = 0.0 if shapes[0] == shapes[1] else (second - first) / (pixels - math.prod(shapes[0]))
    return max(4.0 * channels, steeper, max(first, second) / pixels)


def _measure_memory() -> None:
    """The child of `bytes_per_pixel`: what is held at the peak over the process at rest, in bytes, for each shape."""
    request = json.load(sys.stdin)
    segmenter = load_segmenter(load_card(request["model"]), usable_cores(), engine="onnxruntime")
    # As many as are run side by side.
    count = segmenter.batch
    images = [np.full((count, request["channels"], *shape), 0.5, np.float32) for shape in request["shapes"]]
    rest, peaks = _held("VmRSS"), []
    for image in images:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        segmenter(image)
        peaks.append((_held("VmHWM") - rest) / count)
    sys.stdout.write(json.dumps(peaks))


def _held(key: str) -> int:
    """Bytes that this process holds now (`VmRSS`) or held at its peak (`VmHWM`); without /proc always the latter."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    _measure_memory()
