"""Whether time and memory follow the size of the scene: time should, memory should not."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks import models, scenes, segflow
from benchmarks.measure import in_turn, start_up
from benchmarks.table import Row
from benchmarks.table import table as markdown_table

#: The side that the others are compared with.
REFERENCE = 4000


def arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--sides", default="2000,4000,8000,16000,40000", help="in pixels, with commas")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--runs", type=int, default=1)


def table(options: argparse.Namespace) -> Iterator[str]:
    """A small U-Net over mosaics of growing size under one budget: seconds per Mpx and peak memory, start-up left out.

    The largest default takes as long as all the others five times over, and 20 GB on the disk while its mosaic is
    made; `--sides 2000,4000,8000` is a minute or two.
    """
    model = models.small_unet()
    start_up()
    rows = []
    for side in map(int, options.sides.split(",")):
        scene, name = scenes.mosaic(side), f"{side} x {side}"
        with tempfile.TemporaryDirectory() as place:
            run = partial(segflow.label, scene, model, Path(place), "--memory", options.memory)
            (found,) = in_turn({name: run}, options.runs).values()
        predicted = found.said["segflow:plan"]["predicted_memory_bytes"] / 2**20
        counts = " x ".join(map(str, found.said["segflow:plan"]["counts"]))
        rows.append(Row(name, found, side**2 / 1e6, {"predicted MiB": f"{predicted:.0f}", "tiles": counts}))
    reference = next((row for row in rows if row.name.startswith(f"{REFERENCE} ")), rows[0])
    yield markdown_table(f"U-Net of {model.name[5:]} channels, --memory {options.memory}", rows, reference)
