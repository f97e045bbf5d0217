"""How labelling goes faster with more workers of a dask cluster."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from distributed import Client

from benchmarks import models, scenes, segflow
from benchmarks.measure import environment, in_turn, start_up
from benchmarks.table import markdown

_DASK = str(Path(sys.executable).with_name("dask"))


def arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--side", type=int, default=4000, help="of the mosaic, in pixels")
    parser.add_argument("--workers", default="1,2,4", help="numbers of them, with commas")
    parser.add_argument("--tile", type=int, default=512, help="side of a tile in pixels, so that all have work")
    parser.add_argument("--runs", type=int, default=1)


def table(options: argparse.Namespace) -> Iterator[str]:
    """1, 2 and 4 dask workers of one thread each on this machine: Mpx/s from file to product, and of tiles alone.

    More workers than cores cannot help: read it where there are enough.
    """
    model, scene = models.small_unet((16, 16, 32)), scenes.mosaic(options.side)
    mpx = options.side**2 / 1e6
    start_up()
    rates = []
    for count in map(int, options.workers.split(",")):
        with tempfile.TemporaryDirectory() as place, _cluster(Path(place), count) as address:
            given = (model, Path(place) / "out", "--cluster", address, "--tile", options.tile)
            # Once before, untimed: workers load the network when they first need it.
            segflow.label(scenes.mosaic(2000), *given)
            (found,) = in_turn({f"{count} workers": partial(segflow.label, scene, *given)}, options.runs).values()
        rates.append((count, mpx / found.wall, mpx / found.said["segflow:seconds"]["label"]))
    _, whole, tiles = rates[0]
    lines = [[str(count), f"{a:.2f}", f"{a / whole:.2f}", f"{b:.2f}", f"{b / tiles:.2f}"] for count, a, b in rates]
    yield markdown([f"workers, {options.side} x {options.side} pixels", "Mpx/s, file to product", "ratio",
                    "Mpx/s, tiles alone", "ratio"], lines)  # fmt: skip


@contextlib.contextmanager
def _cluster(folder: Path, count: int) -> Iterator[str]:
    """A scheduler on loopback with so many workers of one thread; its address."""
    where = folder / "scheduler.json"
    here = ["--host", "127.0.0.1"]
    commands = [[_DASK, "scheduler", *here, "--port", "0", "--no-dashboard", "--scheduler-file", str(where)]]
    commands += [
        [_DASK, "worker", *here, "--scheduler-file", str(where), "--nthreads", "1", "--no-nanny", "--no-dashboard",
         "--memory-limit", "0", "--local-directory", str(folder / f"worker{i}")] for i in range(count)
    ]  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            started.append(subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL))  # fmt: skip
            _wait_for(where)
        address = str(json.loads(where.read_text())["address"])
        with Client(address, timeout=30, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=120)
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(path: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            raise RuntimeError(f"{path} did not appear within {seconds:.0f} s: the dask scheduler did not start")
        time.sleep(0.1)
