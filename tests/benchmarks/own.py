"""segflow against the models' own programs, ukis-csmask and deepbet, whole processes from files to files."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks import scenes, segflow
from benchmarks.measure import Measured, in_turn, measure
from benchmarks.table import Row
from benchmarks.table import table as markdown_table
from segcore import demo


def arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--runs", type=int, default=3)
    if name == "csmask":
        parser.add_argument(
            "--side", type=int, default=10980, help="of the large mosaic, which segflow runs once; 0: none"
        )


def table(options: argparse.Namespace) -> Iterator[str]:
    """segflow against the model's own program: whole processes, start-up of Python included, median of three runs.

    csmask: the Sentinel-2 chip of 1947 x 1933 pixels, six bands at 10 and 20 m. ukis-csmask gets the array that segflow
    reads, at its own overlap of 0.2; segflow runs at that, too, and at that of its card (0.5). Then a mosaic as large
    as a Sentinel-2 scene, in 1400 MiB, segflow alone: the array, windows and scores of the other program would need
    some 17 GB. deepbet: the T1 of 176 x 256 x 256 voxels.
    """
    with tempfile.TemporaryDirectory() as place:
        yield from (_clouds if options.what == "csmask" or "side" in options else _brain)(options, Path(place))


def _clouds(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    chip = demo.sentinel_item(folder)
    run = partial(segflow.whole_process, chip, demo.CLOUD_MODEL, folder / "out")
    contestants: dict[str, Callable[[], Measured]] = {
        "ukis-csmask's own program, overlap 0.2": lambda: _program("csmask", chip, folder / "theirs.npy"),
        "segflow, overlap 0.2": lambda: run("--overlap", 51),
        "segflow, overlap 0.5 (the card's)": run,
    }
    rows = [Row(name, found, 1947 * 1933 / 1e6) for name, found in in_turn(contestants, options.runs).items()]
    yield markdown_table("Sentinel-2 chip, 1947 x 1933, 6 bands", rows)
    if options.side:
        scene = scenes.mosaic(options.side, tuple(scenes.BANDS))
        large = partial(
            segflow.whole_process, scene, demo.CLOUD_MODEL, folder / "large", "--overlap", 51, "--memory", "1400MiB"
        )
        (found,) = in_turn({"segflow, overlap 0.2": large}, 1).values()
        row = Row(
            f"segflow, {options.side} x {options.side}, overlap 0.2, --memory 1400MiB", found, options.side**2 / 1e6
        )
        yield markdown_table(f"mosaic of {options.side} x {options.side}, 6 bands", [rows[1], row])


def _brain(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    head = demo.head_mri()
    contestants: dict[str, Callable[[], Measured]] = {
        "deepbet's own program, both networks, mask only": lambda: _program("bet", head, folder / "brain.nii.gz"),
        "segflow, the first of them": lambda: segflow.whole_process(head, demo.BRAIN_MODEL, folder / "out"),
    }
    rows = [Row(name, found, 176 * 256 * 256 / 1e6) for name, found in in_turn(contestants, options.runs).items()]
    yield markdown_table("head MRI, 176 x 256 x 256", rows, unit="Mvoxel")


def _program(name: str, *arguments: object) -> Measured:
    return measure([sys.executable, "-m", f"benchmarks.peers.{name}", *arguments])
