"""A plan of a million tiles: what it costs before the first of them is done."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import models, scenes, segflow
from benchmarks.measure import in_turn, measure, start_up
from benchmarks.table import markdown

TILE = 64


def arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--side", type=int, default=64_000, help="of the scene, which is a header alone, in pixels")
    parser.add_argument("--runs", type=int, default=1)


def table(options: argparse.Namespace) -> Iterator[str]:
    """`segflow plan` of a million tiles, and `segflow run` until the first of them is finished, which stops it.

    Takes less than a minute.
    """
    model, scene = models.idle(), scenes.sparse(options.side)
    start = start_up()
    with tempfile.TemporaryDirectory() as place:
        common = (scene, "-m", model, "--tile", TILE, "-o", Path(place))
        found = in_turn(
            {
                "start-up of Python": lambda: measure([sys.executable, "-c", "import flows.command, segcore.scene"]),
                "`segflow plan`": lambda: measure([segflow.COMMAND, "plan", *common]),
                "`segflow run` until its first tile": lambda: measure(
                    [segflow.COMMAND, "run", "--no-prefect", *common], lambda: _first_tile(Path(place) / ".segflow")
                ),
            },
            options.runs,
        )
    tiles = (-(-options.side // TILE)) ** 2
    lines = [
        [name, f"{each.wall:.2f}", f"{each.wall - start.wall:.2f}", f"{each.peak:.0f}"] for name, each in found.items()
    ]
    yield markdown([f"{tiles} tiles of {TILE} x {TILE}", "seconds", "without start-up", "peak MiB"], lines)


def _first_tile(folder: Path) -> bool:
    """Whether scratch holds a chunk: a file of labels that has its final name."""
    return any("/labels/" in f"{path}/" and any(map(str.isdigit, files)) for path, _, files in os.walk(folder))
