"""What a tile costs beyond being read and inferred, where there are many, small ones."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from math import ceil, sqrt
from pathlib import Path

from benchmarks import models, scenes, segflow
from benchmarks.measure import in_turn, peer, start_up
from benchmarks.table import markdown

TILE = 64


def arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--tiles", type=int, default=20_000, help="at least so many")
    parser.add_argument("--runs", type=int, default=1)


def table(options: argparse.Namespace) -> Iterator[str]:
    """A network that does nothing, over 20 000 small tiles: what one costs beyond reading and inference.

    Takes some two minutes on two cores.
    """
    side = TILE * ceil(sqrt(options.tiles))
    tiles = (side // TILE) ** 2
    model, scene = models.idle(), scenes.sparse(side)
    start_up()
    with tempfile.TemporaryDirectory() as place:
        loop, ours = in_turn(
            {
                "a loop that reads and runs": lambda: peer("loop", scene, model, TILE),
                "segflow": lambda: segflow.label(scene, model, Path(place), "--tile", TILE),
            },
            options.runs,
        ).values()
    stages = {
        name: seconds for name, seconds in ours.said["segflow:seconds"].items() if isinstance(seconds, (int, float))
    }

    def line(name: str, seconds: float, cpu: float | None = None) -> list[str]:
        return [name, f"{1000 * seconds / tiles:.3f}", "" if cpu is None else f"{1000 * cpu / tiles:.3f}"]

    lines = [
        line("a loop that reads and runs, one tile after the other", loop.wall, loop.cpu),
        line("segflow, file to product, start-up left out", ours.wall, ours.cpu),
        line("beyond the loop", ours.wall - loop.wall, ours.cpu - loop.cpu),
        line("tiles alone (the manifest's `label`) beyond the loop", stages["label"] - loop.wall),
        *(line(f"stage {name}, as the manifest adds it up", seconds) for name, seconds in stages.items()),
    ]
    yield markdown([f"{tiles} tiles of {TILE} x {TILE}", "ms per tile", "CPU ms per tile"], lines)
