"""A run that is killed, again and again, at any moment."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from endurance import material
from endurance.findings import Findings
from endurance.process import SEGFLOW, run, running
from segcore import ledger

_SCENES, _SIDE, _TILE = 10, 256, 32


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kills", type=int, nargs="?", default=100)


def trial(options: argparse.Namespace, place: Path, found: Findings) -> None:
    """Ten scenes; all processes are killed at a random moment, and started again: the same bytes, and no step back.

    The moment is uniform over the time that an undisturbed run takes, its start included.
    """
    draw, model = random.Random(options.seed), material.model(place / "unet")
    names = [material.write(place / f"scenes/s{i}.tif", material.cut(i, _SIDE)).stem for i in range(_SCENES)]

    def command(out: Path, workers: int) -> list[object]:
        return [*SEGFLOW, "run", place / "scenes", "-m", model, "-o", out, "--no-prefect", "--json", "--scores",
                "--memory", "1GiB", "--tile", _TILE, "--workers", workers]  # fmt: skip

    run(command(place / "first", 1), place / "first-log")  # files are warm from now on
    undisturbed = run(command(place / "whole", 1), place / "whole-log")
    takes = time.monotonic() - undisturbed.began
    whole = material.products(place / "whole")
    found.expect(undisturbed.process.returncode == 0, f"undisturbed: {undisturbed.said}")
    found.expect(sorted(whole) == sorted(names), f"undisturbed products: {sorted(whole)}")
    found.expect(material.products(place / "first") == whole, "two undisturbed runs differ")
    found.note("undisturbed", f"{takes:.1f} s; {_SCENES} scenes of {(_SIDE // _TILE) ** 2} tiles")
    kills = ended = rounds = early = resumed = 0
    out = place / "out0"
    before, tiles = set[str](), dict[str, int]()
    while kills < options.kills and not found.over:
        workers = int(draw.random() < 0.75)  # now and then threads of the one process
        moment = draw.uniform(0, takes)
        with running(command(out, workers), place / f"log-{rounds}") as process:
            code = process.wait(moment)
            process.kill()
        where = f"round {rounds}, kill {kills + 1} after {moment:.2f} s, workers {workers}"
        present = _look(out, whole, before, tiles, found, where)
        early += not (out / ledger.LEDGER_FILE).exists()
        if code is None:
            kills += 1
        else:
            ended += 1
            found.expect(code == 0, f"{where}: ended with {code}: {process.said[-1500:]} {process.summary}")
            resumed += sum(s["details"].get("tiles_kept", 0) > 0 for s in process.summary.get("scenes", []))
        before = present
        if len(present) == _SCENES and (code is not None or draw.random() < 0.5):
            rounds += 1
            _finish(command(out, 1), place / "end-log", out, whole, found, where)
            out, before, tiles = place / f"out{rounds}", set(), {}
        if kills % 10 == 0:
            print(f"  {kills} kills, {ended} ended, {rounds} rounds, {len(found.faults)} faults", flush=True)
    _finish(command(out, 1), place / "end-log", out, whole, found, "at the end")
    found.note("kills", f"{kills} of {options.kills}; {ended} runs ended before their moment came")
    found.note("output folders filled", rounds + 1)
    found.note("killed before the ledger was there", early)
    found.note("scenes that went on with tiles of a killed run", f"{resumed}, in runs that ended")


def _look(
    out: Path,
    whole: dict[str, dict[str, str]],
    before: set[str],
    tiles: dict[str, int],
    found: Findings,
    where: str,
) -> set[str]:
    """What a kill has left: whole products, nothing taken for done that is not, no step back. Returns what is there."""
    for fault in material.wrong(out, whole):
        found.expect(False, f"{where}: {fault}")
    present = set(material.manifests(out))
    found.expect(before <= present, f"{where}: products that were there are gone: {sorted(before - present)}")
    events = list(ledger.read(out / ledger.LEDGER_FILE))
    last = events[-1]["run_id"] if events else ""
    ended = {
        kind: {event["scene"] for event in events if event["run_id"] == last and event["event"] == kind}
        for kind in (ledger.SCENE_DONE, ledger.SCENE_UP_TO_DATE, ledger.SCENE_FAILED, ledger.SCENE_QUARANTINED)
    }
    for kind in (ledger.SCENE_FAILED, ledger.SCENE_QUARANTINED):
        reasons = [e.get("reason") for e in events if e["run_id"] == last and e["event"] == kind]
        found.expect(not ended[kind], f"{where}: {kind} {sorted(ended[kind])}: {reasons}")
    taken = ended[ledger.SCENE_UP_TO_DATE]
    found.expect(taken <= before, f"{where}: taken for done without a manifest: {sorted(taken - before)}")
    claimed = taken | ended[ledger.SCENE_DONE]
    found.expect(claimed <= present, f"{where}: said to be done without a manifest: {sorted(claimed - present)}")
    now = {name: len(files) for name, files in material.tiles(out).items()}
    for name, count in tiles.items():
        there = now.get(name, 0)
        found.expect(name in present or there >= count, f"{where}: {name} had {count} tiles, and has {there}")
    tiles.clear()
    tiles.update(now)
    return present


def _finish(
    command: list[object], log: Path, out: Path, whole: dict[str, dict[str, str]], found: Findings, where: str
) -> None:
    """Let it end: all is done, byte for byte, and nothing else lies about."""
    ended = run(command, log)
    found.expect(
        ended.process.returncode == 0, f"{where}: the last run ended with {ended.process.returncode}: {ended.said}"
    )
    products = material.products(out)
    for name, files in whole.items():
        for file, digest in files.items():
            found.expect(
                products.get(name, {}).get(file) == digest, f"{where}: {name}/{file} is not the undisturbed one"
            )
    found.expect(not (left := material.strays(out)), f"{where}: left behind: {left}")
