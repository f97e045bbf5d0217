"""What is asked for, and what the planner has to know about a network: plain values, checked when made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from segcore.errors import PlanError

Mode = Literal["auto", "exact", "blend"]
Weights = Literal["cosine", "gaussian", "constant"]
"""How windows are blended."""
Precision = Literal["fp32", "bf16", "int8"]
"""In which numbers the network computes."""
Engine = Literal["auto", "onnxruntime", "openvino"]
"""What is to run an ONNX file in float32."""
Runner = Literal["onnxruntime", "openvino", "torch"]
"""What runs a network."""
Sides = tuple[tuple[int, int], ...]
"""Pixels before and after, one pair per axis."""

#: GDAL's own block cache takes a share of all memory unless it is bounded (bytes).
GDAL_CACHE = 64 * 2**20
#: Difference of scores that counts as none (law 2): engines may choose their arithmetic by the size of a window.
SAME_SCORES = 1e-4
#: Windows that an engine has under way at once, each on its share of the threads, where they are small.
STREAMS = 2

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes from a text such as `4GiB`, `500MB` or `2g` (a bare letter counts in powers of 1024).

    Raises PlanError for anything else, and for amounts that are not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?\s*", text.upper())
    if match is None or not 0 < float(match[1]) < 2**60:
        raise PlanError(f"--memory {text!r} is no amount of memory; give a positive number with a unit, such as 4GiB")
    scale = _DECIMAL[match[2]] if match[2] and match[3] == "B" else _UNITS[match[2]]
    return int(float(match[1]) * scale)


def parse_seconds(option: str, text: str) -> float:
    """Seconds from a text such as `6h`, `90m`, `45s` or `45`. Raises PlanError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise PlanError(f"{option} {text!r} is no time; give a positive number with a unit: 45s, 90m, 6h or 2d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def format_seconds(seconds: float) -> str:
    """A duration as a person says it: `42 s`, `7 min`, `3 h 12 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def format_bytes(count: float) -> str:
    """`9.7 GiB` and the like."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def times(shape: Iterable[object]) -> str:
    """`603 x 627` and the like."""
    return " x ".join(map(str, shape))


@dataclass(frozen=True, slots=True)
class Sight:
    """How a network looks at its input: all that tiling has to know, in pixels of the grid that the network sees.

    `stride`: total downsampling per axis. `reach`: how far the outputs of a cell of `stride` pixels see past its
    ends, before and after it, per axis (`symmetric` makes it of one number each); None where the network is not
    local. `window`: the size that it is run at in blend mode, None for any size (the whole scene at once); `fixed`:
    whether it accepts no other size than `window`; `overlap`: pixels that neighbouring windows share; `weights`: how
    these are blended. Raises PlanError where these contradict each other.
    """

    stride: tuple[int, ...]
    reach: Sides | None
    window: tuple[int, ...] | None = None
    overlap: tuple[int, ...] | None = None
    fixed: bool = False
    weights: Weights = "cosine"

    def __post_init__(self) -> None:
        if any(s < 1 for s in self.stride):
            raise PlanError(f"stride {self.stride} must be 1 or more on every axis")
        if self.reach is not None and any(r < 0 for sides in self.reach for r in sides):
            raise PlanError(f"reach {self.reach} must not be negative")
        if self.window is None:
            if self.fixed or self.overlap is not None:
                raise PlanError("a fixed window or an overlap needs a window size")
            return
        if any(w < 1 or w % s for w, s in zip(self.window, self.stride, strict=True)):
            raise PlanError(f"window {self.window} must be a multiple of the stride {self.stride}")
        for o, w in zip(self.overlap or (0,) * len(self.window), self.window, strict=True):
            if not 0 <= o < w:
                raise PlanError(f"overlap {o} does not fit a window of {w}: it must be 0 to {w - 1} pixels")

    @property
    def local(self) -> bool:
        return self.reach is not None

    @property
    def halo(self) -> Sides:
        """What a window must show around its target: the reach, rounded up to the stride; none if it sees all."""
        reach = self.reach or ((0, 0),) * len(self.stride)
        rounded = (tuple(-(-side // s) * s for side in sides) for sides, s in zip(reach, self.stride, strict=True))
        return tuple((before, after) for before, after in rounded)

    @property
    def step(self) -> tuple[int, ...]:
        """Distance of neighbouring windows, in pixels per axis."""
        assert self.window is not None
        overlap = self.overlap or (0,) * len(self.window)
        return tuple(w - o for w, o in zip(self.window, overlap, strict=True))


def in_words(sides: Sides) -> str:
    """`96 x 96`, or `96+32 x 8` where what lies before and after differs."""
    return times(str(before) if before == after else f"{before}+{after}" for before, after in sides)


def symmetric(reach: Iterable[int]) -> Sides:
    """The same reach before and after, per axis."""
    return tuple((r, r) for r in reach)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one pixel costs the planner. Bytes are those that windows hold while they are inferred, per input pixel.

    `runner`: what the network is run in; `weights`: bytes of its file; `proof_bytes_per_pixel`: held while shorter
    numbers are compared with fp32; `shortness`: what its arrays take of the same in float32; `scores`: whether they are
    published, too.
    """

    channels: int
    classes: int
    engine_bytes_per_pixel: float
    runner: Runner = "onnxruntime"
    weights: int = 0
    proof_bytes_per_pixel: float = 0.0
    shortness: float = 1.0
    scores: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """The choices of a run. Those in `pixels()` may change a pixel of the product; the others never do.

    `memory`: bytes, None for half of what is free; `tile`: side of a core in pixels, None to let the plan choose;
    `overlap`, `weights`: pixels that windows share in blend mode and how they are blended, None for the card's;
    `tolerance`: how far scores may be from those of the whole image, so that a shorter halo will do (None: not at
    all); `precision`: in which numbers the network computes; `engine`: what runs it in float32; `agreement`: share of
    labels that must be those of fp32 in other numbers; `bands`: names of the bands of a raster that does not name them,
    in file order; `scale`, `offset`: of a raster that carries none, stored x scale + offset.
    """

    memory: int | None = None
    tile: int | None = None
    mode: Mode = "auto"
    overlap: int | None = None
    weights: Weights | None = None
    tolerance: float | None = None
    precision: Precision = "fp32"
    engine: Engine = "auto"
    agreement: float = 0.995
    scores: bool = False
    bands: tuple[str, ...] | None = None
    scale: float | None = None
    offset: float | None = None

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 1:
            raise PlanError(f"--tile {self.tile} must be 1 pixel or more")
        if self.memory is not None and self.memory < 1:
            raise PlanError(f"--memory {self.memory} must be positive")
        if self.mode not in ("auto", "exact", "blend"):
            raise PlanError(f"--mode {self.mode!r} must be auto, exact or blend")
        if self.overlap is not None and self.overlap < 0:
            raise PlanError(f"--overlap {self.overlap} must not be negative")
        if self.weights not in (None, "cosine", "gaussian", "constant"):
            raise PlanError(f"--weights {self.weights!r} must be cosine, gaussian or constant")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise PlanError(f"--tolerance {self.tolerance} must be a difference of scores between 0 and 1")
        if self.tolerance is not None and self.mode == "blend":
            raise PlanError("--tolerance shortens the halo of tiles that do not blend; leave it or --mode blend out")
        if self.precision not in ("fp32", "bf16", "int8"):
            raise PlanError(f"--precision {self.precision!r} must be fp32, bf16 or int8")
        if self.engine not in ("auto", "onnxruntime", "openvino"):
            raise PlanError(f"--engine {self.engine!r} must be auto, onnxruntime or openvino")
        if self.precision != "fp32" and self.engine == "onnxruntime":
            raise PlanError(
                f"--precision {self.precision} is run in OpenVINO; leave --engine onnxruntime or --precision "
                f"{self.precision} out"
            )
        if not 0 < self.agreement <= 1:
            raise PlanError(f"--agreement {self.agreement} must be a share of the labels, more than 0 and at most 1")
        if self.scale is not None and (self.scale == 0 or not isfinite(self.scale)):
            raise PlanError(f"--scale {self.scale} must be a number other than 0")
        if self.offset is not None and not isfinite(self.offset):
            raise PlanError(f"--offset {self.offset} must be a number")

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Settings:
        """Settings from their fields as JSON has them. Raises PlanError, TypeError."""
        return cls(**fields | {"bands": tuple(fields["bands"]) if fields["bands"] else None})

    def pixels(self) -> dict[str, Any]:
        """The settings that a product depends on, as JSON values: part of its fingerprint.

        With a tolerance the tiles are among them: then, and only then, a pixel may depend on where they end. The limit
        of agreement never is: it decides whether there is a product, not what it is. Nor is the engine: it differs by
        rounding alone, as its versions do, and as processors. Products of fp32 are known by
        what they were before there were other precisions.
        """
        kept = asdict(self)
        del kept["memory"], kept["agreement"], kept["engine"]
        if self.precision == "fp32":
            del kept["precision"]
        if self.tolerance is None:
            del kept["tile"]
        return kept


@dataclass(frozen=True, slots=True)
class Job:
    """One scene to label: name of its product, URI, model (name or folder), output folder and settings.

    `alone`: whether no other scene is labelled beside it, by the same processes.
    """

    name: str
    uri: str
    model: str
    out: str
    settings: Settings = field(default_factory=Settings)
    alone: bool = True


def usable_cores() -> int:
    """How many CPU cores this process may use; in a container, those of its quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)
