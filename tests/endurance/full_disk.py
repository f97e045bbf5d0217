"""Disks that are full or cannot be written, and scenes that go away."""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from endurance import material
from endurance.findings import Findings
from endurance.process import SEGFLOW, Running, run, running

_SIDE, _TILE = 600, 48


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


@contextmanager
def small_disk(place: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of this size in memory, gone at the end. Needs root."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path) -> None:
    """Leave not one byte."""
    with suppress(OSError), (disk / ".ballast").open("ab", buffering=0) as file:
        while True:
            file.write(b"\1" * 4096)


def trial(options: argparse.Namespace, place: Path, found: Findings) -> None:
    """The disk fills in scratch and in publish, is read-only, a scene goes away: clear words, then the same bytes."""
    model = material.model(place / "unet", width=8, poolings=2)
    scene = material.write(place / "scenes/s0.tif", material.cut(1, _SIDE))
    other = material.write(place / "scenes/s1.tif", material.cut(3, _SIDE))

    def command(out: Path, tile: int = _TILE) -> list[object]:
        return [*SEGFLOW, "run", place / "scenes", "-m", model, "-o", out, "--no-prefect", "--json", "--scores",
                "--memory", "1GiB", "--tile", tile]  # fmt: skip

    aside = place / "aside.tif"

    def exchange(_: Path) -> None:
        os.replace(scene, aside)
        material.write(scene, material.cut(5, _SIDE))

    exchange(place)
    run(command(place / "other"), place / "other-log")
    exchanged = material.products(place / "other")
    os.replace(aside, scene)
    ended = run(command(place / "whole"), place / "whole-log")
    whole = material.products(place / "whole")
    found.expect(ended.process.returncode == 0, f"undisturbed: {ended.said}")
    found.expect(len(whole) == 2, f"undisturbed: {sorted(whole)}")

    def disturbed(name: str, moment: str, strike: Callable[[Path], None], mend: Callable[[Path], None],
                  words: tuple[str, ...], codes: tuple[int, ...] = (1,), resumes: bool = False) -> None:  # fmt: skip
        with small_disk(place / name, 200) as disk:
            out = disk / "out"
            with running(command(out), place / f"{name}-log") as process:
                if not _wait_for(out, moment, process):
                    found.expect(False, f"{name}: ended before there was a {moment}: {process.said}")
                    return
                strike(disk)
                code = process.wait(240)
            _words(name, process, code, codes, words, found)
            for fault in material.wrong(out, whole, exchanged):
                found.expect(False, f"{name}: {fault}")
            kept = sum(len(files) for files in material.tiles(out).values())
            mend(disk)
            again = run(command(out), place / f"{name}-again")
            found.expect(again.process.returncode == 0, f"{name}: again {again.process.returncode}: {again.said}")
            found.expect(material.products(out) == whole, f"{name}: products differ from the undisturbed ones")
            found.expect(not (left := material.strays(out)), f"{name}: left behind {left}")
            resumed = sum(s["details"].get("tiles_kept", 0) for s in again.summary.get("scenes", []))
            found.expect(resumed > 0 or not resumes, f"{name}: none of {kept} tiles was kept")
            found.note(f"{name}: then", f"{again.summary.get('counts')}; {kept} tiles were there, {resumed} were kept")

    def free(disk: Path) -> None:
        (disk / ".ballast").unlink()

    full = ("free some space",)  # GDAL does not say why it could not write
    disturbed("full-in-scratch", "tile", fill, free, full)
    disturbed("full-in-publish", "publish", fill, free, full)
    disturbed("full-all-the-time", "run", fill, free, full)
    read_only = ("Read-only file system",)
    disturbed("read-only-in-the-middle", "tile", lambda disk: _remount(disk, "ro"), lambda disk: _remount(disk, "rw"),
              read_only)  # fmt: skip

    with small_disk(place / "read-only", 10) as disk:
        _remount(disk, "ro")
        with running(command(disk / "out"), place / "read-only-log") as process:
            _words("read-only", process, process.wait(120), (2,), ("cannot write", "choose another --out"), found)

    # What was labelled of it is kept, whatever the last words are: those of the retry, which finds nothing to open.
    disturbed("scene-removed", "tile", lambda _: os.replace(scene, aside), lambda _: os.replace(aside, scene) and None,
              (str(scene),), (1,), resumes=True)  # fmt: skip
    # The retry labels the new file as what it is, whole.
    disturbed("scene-exchanged", "tile", exchange, lambda _: os.replace(aside, scene) and None, (), (0, 1))
    found.expect(other.exists(), "the other scene is gone")


def _wait_for(out: Path, moment: str, process: Running) -> bool:
    """Wait for a moment of the run: its file, its first tiles, its first publishing."""
    until = time.monotonic() + 200
    while time.monotonic() < until and process.wait(0) is None:
        if moment == "run" and (out / "run.json").exists():
            return True
        if moment == "tile" and sum(len(files) for files in material.tiles(out).values()) > 20:
            return True
        if moment == "publish" and any((out / ".segflow").glob("*/publish-*/*")):
            return True
        time.sleep(0.002)
    return False


def _words(
    name: str, process: Running, code: int | None, codes: tuple[int, ...], words: tuple[str, ...], found: Findings
) -> None:
    """It has ended with one of these codes, and says what is wrong without a traceback."""
    scenes = process.summary.get("scenes", [])
    said = " | ".join([*(s["reason"] for s in scenes if s["reason"]), process.summary.get("error", "")]).strip(" |")
    warnings = process.summary.get("warnings", [])
    found.note(name, f"exit code {code}, {process.summary.get('counts')}; says: {said or 'nothing'}")
    if warnings:
        found.note(f"{name}: warnings", "; ".join(warnings))
    found.expect(code in codes, f"{name}: exit code {code}, and not one of {codes}: {process.said[-1500:]}")
    everything = process.said + process.out.read_text()
    found.expect("Traceback" not in everything, f"{name}: a traceback: {everything[-3000:]}")
    if code:
        for word in words:
            found.expect(word in said, f"{name}: {word!r} is not in {said!r}")


def _remount(disk: Path, how: str) -> None:
    """Make a disk read-only, or writable again; the system refuses while a file is written."""
    until = time.monotonic() + 20
    while subprocess.run(["mount", "-o", f"remount,{how}", disk], stderr=subprocess.DEVNULL, check=False).returncode:
        if time.monotonic() > until:
            raise TimeoutError(f"{disk} cannot be remounted {how}")
        time.sleep(0.005)
