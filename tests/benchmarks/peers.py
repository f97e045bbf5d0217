"""Whole processes against the models' own programs, on the same input, in turn: seconds, peak memory, and their ratios.

    make benchmark

Clouds: the real Sentinel-2 chip, 1947 x 1933 pixels, six bands, from files to a mask on disk. ukis-csmask gets the
array that segflow reads, at its own overlap of 0.2; segflow runs at that of its card (0.5), and at 0.25, the multiple
of the stride that is nearest to 0.2. Brain: the real T1 of 176 x 256 x 256 voxels.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from segcore import demo

RUNS = 3
CSMASK = """
import sys, numpy as np
from segcore.io import open_scene
from segcore.model.card import load_card
from segcore.survey import wanted_by
from segcore.spec import Settings
from ukis_csmask.mask import CSmask
source = open_scene(sys.argv[1], wanted_by(load_card("ukis-csmask-6b-l1c").card), Settings())
image = np.ascontiguousarray(np.nan_to_num(source.read(source.grid.box)).transpose(1, 2, 0))
np.save(sys.argv[2], CSmask(image, list(source.channels)).csm)
"""
DEEPBET = """
import sys
from deepbet import run_bet
run_bet([sys.argv[1]], mask_paths=[sys.argv[2] + ".nii.gz"], no_gpu=True)
"""


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory (MiB) of a process, the kernel's own count of its high water."""
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, int(status.partition("VmHWM:")[2].split()[0]))
            except (OSError, IndexError):
                pass
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read().decode()
    return seconds, peak / 1024


def main() -> None:
    print(f"{len(os.sched_getaffinity(0))} cores; median of {RUNS} runs each, in turn; start-up of Python included")
    segflow = [str(Path(sys.executable).with_name("segflow")), "run", "--no-prefect"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        scene, head = demo.sentinel_item(folder), demo.head_mri()
        groups = {
            "ukis-csmask (overlap 0.2)": [sys.executable, "-c", CSMASK, str(scene), str(folder / "theirs")],
            "segflow, overlap 0.25": [*segflow, str(scene), "-m", demo.CLOUD_MODEL, "--overlap", "64"],
            "segflow, overlap 0.5": [*segflow, str(scene), "-m", demo.CLOUD_MODEL],
        }, {
            "deepbet (two networks)": [sys.executable, "-c", DEEPBET, str(head), str(folder / "brain")],
            "segflow, its first network": [*segflow, str(head), "-m", demo.BRAIN_MODEL],
        }  # fmt: skip
        for group in groups:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in group}
            for turn in range(RUNS):
                for number, (name, command) in enumerate(group.items()):
                    out = ["-o", str(folder / f"out{turn}-{number}")] if "segflow" in name else []
                    found[name].append(measure(command + out))
            medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)]
                       for name, runs in found.items()}  # fmt: skip
            reference = next(iter(medians.values()))
            print(f"\n{'':30}{'seconds':>9}{'ratio':>8}{'MiB':>8}{'ratio':>8}")
            for name, (seconds, peak) in medians.items():
                ratios = seconds / reference[0], peak / reference[1]
                print(f"{name:30}{seconds:9.1f}{ratios[0]:8.2f}{peak:8.0f}{ratios[1]:8.2f}")


if __name__ == "__main__":
    main()
