"""Markdown tables of what was measured, and the line that says on what machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.measure import ROOT, Measured

_PACKAGES = ("torch", "onnxruntime", "monai", "rasterio", "distributed")


@dataclass(frozen=True, slots=True)
class Row:
    """One line: a name, what was measured, how many million pixels that was for, and columns of its own."""

    name: str
    measured: Measured
    mpx: float
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def pace(self) -> float:
        """Seconds for a million pixels."""
        return self.measured.wall / self.mpx


def table(title: str, rows: Sequence[Row], reference: Row | None = None, unit: str = "Mpx") -> str:
    """Seconds, CPU seconds and peak memory, and the ratios of pace and memory to the reference (the first row's)."""
    first = reference or rows[0]
    more = list(dict.fromkeys(key for row in rows for key in row.more))
    head = [title, "seconds", f"s/{unit}", "ratio", "CPU s", "peak MiB", "ratio", *more]
    lines = [
        [
            row.name,
            f"{row.measured.wall:.1f}",
            f"{row.pace:.3g}",
            f"{row.pace / first.pace:.2f}",
            f"{row.measured.cpu:.1f}",
            f"{row.measured.peak:.0f}",
            f"{row.measured.peak / first.measured.peak:.2f}",
            *(row.more.get(key, "") for key in more),
        ]
        for row in rows
    ]
    return markdown(head, lines)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as Markdown has it."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def machine() -> str:
    """Cores, processor, graphics card, and the versions of what was measured."""
    cores = len(os.sched_getaffinity(0))
    parts = [f"{cores} cores ({_processor()})", *_graphics(), f"Python {platform.python_version()}", _segflow()]
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    return ", ".join(parts)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.machine()


def _graphics() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return ["no GPU"]
    found = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip().splitlines() or ["no GPU"]


def _segflow() -> str:
    """The version, and the commit where it is a checkout."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return f"segflow {version('segflow')} {commit.stdout.strip()}".strip()
