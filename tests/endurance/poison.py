"""Many small scenes, one in twenty of them poison."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import rasterio.shutil

from endurance import material
from endurance.findings import Findings
from endurance.process import WICKED, Running, Sampler, running
from segcore.ledger import LEDGER_FILE, Ledger
from segcore.publish import faults

#: How a scene of each kind ends.
KINDS = {
    "torn": "failed",
    "junk": "failed",
    "empty": "failed",
    "bands": "failed",
    "nodata": "failed",
    "units": "failed",
    "kill": "quarantined",
    "hang": "quarantined",
    "vanish": "failed",
    "pixel": "failed",
}
_EVERY, _FIRST, _SIDE = 20, 13, 128


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scenes", type=int, nargs="?", default=2000)


def trial(options: argparse.Namespace, place: Path, found: Findings) -> None:
    """Many small real scenes, one in twenty poison of ten kinds: every scene ends as it should, memory stays flat."""
    scenes, out, model = place / "scenes", place / "out", material.model(place / "unet")
    kinds = {write(scenes, number): kind_of(number) for number in range(options.scenes)}
    command = [*WICKED, "run", scenes, "-m", model, "-o", out, "--no-prefect", "--json", "--memory", "1GiB",
               "--tile-timeout", "10s"]  # fmt: skip
    with running(command, place / "first") as first, Sampler(first.process.pid) as sampler:
        while not (out / LEDGER_FILE).exists() and first.wait(0.1) is None:
            pass
        for name, kind in kinds.items():
            if kind == "vanish":
                (scenes / f"{name}.tif").unlink()
        code = _end(first, found)
    wall = time.monotonic() - first.began
    said = first.summary
    expected = {name: KINDS[kind] if kind else "done" for name, kind in kinds.items()}
    found.note("scenes", f"{options.scenes}, of which {sum(bool(k) for k in kinds.values())} poison")
    found.expect(code == 1, f"exit code {code} and not 1: {first.said[-2000:]}")
    _compare(expected, out, found)
    found.note("states", said.get("counts"))
    _reasons(kinds, out, found)
    found.note("warnings", said.get("warnings"))
    found.note("wall", f"{wall:.1f} s, {wall / options.scenes:.3f} s a scene")
    found.note("CPU, driver and workers", f"{first.cpu:.1f} s, {first.cpu / options.scenes:.3f} s a scene")
    quarters = sampler.quarters()
    for name, column in (("driver", 0), ("workers", 1), ("most of all", 2)):
        found.note(f"memory by quarter, {name}", ", ".join(f"{q[column]:.0f}" for q in quarters) + " MiB")
    found.expect(
        len(quarters) == 4 and quarters[3][0] < 1.15 * quarters[1][0] + 20,
        "the driver's memory grows from quarter 2 to 4",
    )
    found.note("worker starts seen", len(sampler.workers))
    found.note("report.html", f"{(out / 'report.html').stat().st_size / 1024:.0f} KiB")
    found.note("said on stderr", f"{len(first.said)} characters: {first.said[:300]!r}")
    with running(command, place / "again") as again:
        code = _end(again, found)
    rest = {name: "up to date" if state == "done" else state for name, state in expected.items()}
    found.expect(code == 1, f"the rerun: exit code {code} and not 1: {again.said[-2000:]}")
    if code == 1:
        _compare(rest | {name: "failed" for name, kind in kinds.items() if kind == "vanish"}, out, found, gone=kinds)
    found.note(
        "rerun", f"{again.summary.get('counts')} in {time.monotonic() - again.began:.1f} s, CPU {again.cpu:.1f} s"
    )


def kind_of(number: int) -> str:
    """Kind of poison of a scene; empty for a good one."""
    return list(KINDS)[number // _EVERY % len(KINDS)] if number % _EVERY == _FIRST else ""


def write(scenes: Path, number: int) -> str:
    """Write a scene, and return its name."""
    kind = kind_of(number)
    name = f"s{number:05d}" + (f"_{kind}" if kind else "")
    path, values = scenes / f"{name}.tif", material.cut(number, _SIDE)
    draw = np.random.default_rng(number)
    if kind == "junk":
        path.write_bytes(draw.bytes(20_000))
        return name
    changed = {
        "bands": values[:2],
        "nodata": np.full_like(values, np.nan),
        "units": values * 10_000,
        "pixel": values[:, :1, :1],
    }.get(kind, values)
    material.write(path, changed)
    if kind in ("torn", "empty"):
        if kind == "torn":  # a copy has its directory in front: it opens, and lacks pixels
            rasterio.shutil.copy(path, scenes / "whole", driver="GTiff")
            os.replace(scenes / "whole", path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 6 // 10] if kind == "torn" else b"")
    return name


def _end(process: Running, found: Findings) -> int | None:
    code = process.wait(max(1.0, found.until - time.monotonic()))
    found.expect(code is not None, f"it did not end in time: {process.said[-2000:]}")
    return code


def _compare(expected: dict[str, str], out: Path, found: Findings, gone: dict[str, str] | None = None) -> None:
    """Every scene is in its state, and has a whole product exactly if it should."""
    ledger = Ledger(out / LEDGER_FILE)
    states = {name: ledger[name].state if name in ledger else "unknown" for name in expected}
    # What vanished before the second run is not found by it, and keeps its state.
    odd = {name: (state, expected[name]) for name, state in states.items() if state != expected[name]}
    for name, (state, wanted) in odd.items():
        reason = ledger[name].reason if name in ledger else ""
        found.expect(False, f"{name} is {state} and not {wanted}: {reason}")
    found.expect(set(ledger) <= set(expected), f"scenes that nobody named: {sorted(set(ledger) - set(expected))}")
    present = material.manifests(out)
    for name, state in expected.items():
        there = name in present and not faults(present[name])
        found.expect(there == (state in ("done", "up to date")), f"{name}: {state}, product whole: {there}")
    if gone is None:
        found.note("states that are wrong", len(odd))


def _reasons(kinds: dict[str, str], out: Path, found: Findings) -> None:
    """One reason of every kind of poison."""
    ledger, told = Ledger(out / LEDGER_FILE), Counter[str]()
    for name, kind in kinds.items():
        if kind and not told[kind] and name in ledger:
            found.note(f"reason of {kind}", ledger[name].reason.replace(str(out.parent), "") or ledger[name].state)
        told[kind] += 1
