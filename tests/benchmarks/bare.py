"""segflow against one bare forward pass of the same engine: what reading, tiling, joining and writing cost."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from benchmarks import models, scenes, segflow
from benchmarks.measure import Measured, in_turn, peer, start_up
from benchmarks.table import Row
from benchmarks.table import table as markdown_table


def arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--side", type=int, default=2000, help="of the mosaic, in pixels")
    parser.add_argument("--pass-side", type=int, default=2048, help="of the bare pass, in pixels, a multiple of 16")
    parser.add_argument(
        "--cube", type=int, help="in 3-D instead: side of the volume, and of the pass; a multiple of 16"
    )
    parser.add_argument("--memory", help="segflow's budget; default: its own")
    parser.add_argument("--runs", type=int, default=1)


def table(options: argparse.Namespace) -> Iterator[str]:
    """segflow from file to file against one pass of the same network in the same engine, over noise.

    By default 2 000 x 2 000 pixels, against a pass over 2 048 x 2 048. What is proved of the network, once on a
    machine, was proved before.
    """
    if options.cube:
        model, scene = models.basic_unet("zyx"), scenes.volume(options.cube)
        shape = of = (options.cube,) * 3
    else:
        model, scene = models.basic_unet(), scenes.mosaic(options.side)
        shape, of = (options.side,) * 2, (options.pass_side,) * 2
    settings = ("--memory", options.memory) if options.memory else ()
    start_up()
    with tempfile.TemporaryDirectory() as place:
        segflow.label(scene, model, Path(place) / "proved", *settings)
        found = in_turn(
            {
                f"one bare pass over {' x '.join(map(str, of))}": lambda: peer("forward", model, *of),
                f"segflow, {' x '.join(map(str, shape))}": lambda: segflow.label(
                    scene, model, Path(place) / "timed", *settings
                ),
            },
            options.runs,
        )
    (name, bare), (ours, measured) = found.items()
    engine = str(measured.said["segflow:model"]["engine"])
    rows = [*passes(name, bare, prod(of) / 1e6), Row(ours, measured, prod(shape) / 1e6, {"engine": engine})]
    yield markdown_table("MONAI BasicUNet", rows, unit="Mvoxel" if options.cube else "Mpx")


def passes(name: str, measured: Measured, mpx: float) -> list[Row]:
    """The rows of a bare pass: once it is warm, and the first one of its process.

    That takes its memory from the system, as a run of segflow does.
    """
    more, first = {"engine": str(measured.said["engine"])}, measured.said["first"]
    taking = replace(measured, wall=first["seconds"], cpu=first["cpu"], peak=first["peak"])
    return [Row(name, measured, mpx, more), Row("the first such pass of its process", taking, mpx, more)]
