"""What was proved of a network on this machine, so that the next process need not prove it again.

A proof runs the network on noise, the same noise always: with the same network, by the same engine, on the same
processor it ends as it did. Of volumes it takes seconds, as long as many a volume itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from segcore.notes import Notes

#: Raised when other things are proved, or otherwise.
VERSION = 2
#: What decides on what a network computes, and where it can be cut.
_PACKAGES = (
    "segflow",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "torch",
    "monai",
    "segmentation-models-pytorch",
    "torchvision",
)
_NOTES = Notes("proved", 1000)


def prove_once(prove: Callable[[], None], *what: object) -> None:
    """Run a proof that raises where it fails, unless the same one has held here before.

    `what`: all that it depends on beside this machine and what is installed, by its `repr`: the digest of the network,
    the engine, and how it is run. On a GPU, which engines do not name, it is run always.
    """
    if any("CUDA" in str(part) for part in what):
        prove()
        return
    key = hashlib.sha256(repr((*what, *_here())).encode()).hexdigest()
    with contextlib.suppress(KeyError):
        if _NOTES[key] is True:
            return
    prove()
    _NOTES[key] = True


@cache
def _here() -> tuple[str, ...]:
    """What tells this processor from others, for what they compute may differ, and what is installed."""
    lines = list[str]()
    with contextlib.suppress(OSError):  # another system than Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return f"{VERSION}", f"{versions(*_PACKAGES)}", platform.machine(), platform.processor(), *sorted(kinds)


def versions(*packages: str) -> dict[str, str]:
    """Those of these packages that are installed, and in which version."""
    found = dict[str, str]()
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
