"""A process, measured: seconds on the wall, seconds of CPU with its children's, and the most memory that all held."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).parents[2]
#: Seconds between two looks at the process' own high water, which the kernel keeps; and at its children, which cost
#: more to find.
_LOOK, _LOOK_AT_CHILDREN = 0.01, 0.25
#: What `segflow run` imports before it looks at a scene.
_IMPORTS = "import flows.command, segcore.execute, segcore.scene, onnxruntime"


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds on the wall and of CPU, peak memory (MiB), and the JSON object that the process printed last."""

    wall: float
    cpu: float
    peak: float
    said: Mapping[str, Any] = field(default_factory=dict)

    def without(self, start: Measured) -> Measured:
        """The same without the time that a start-up takes; its memory stays."""
        return replace(self, wall=max(0.0, self.wall - start.wall), cpu=max(0.0, self.cpu - start.cpu))


def measure(command: Sequence[object], until: Callable[[], bool] | None = None) -> Measured:
    """Run a program to its end. Raises RuntimeError, with what it said, where it does not end well.

    `until`: asked all the time; once it is true the program gets SIGTERM, and its wall time is the one until then.
    Memory: the high water of one process, or the highest sum of what it and its children held at one time, where
    pages that they share count once.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, env=environment(), cwd=ROOT,
                                   start_new_session=True)  # fmt: skip
        try:
            peak, reached, ended = _watch(process, began, until)
        finally:
            # Nothing may stay behind: its children are in its session.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        status, usage = ended
        if until is None and status != 0:
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {status}:\n{_text(out)}\n{_text(err)}")
        if until is not None and reached is None:
            raise RuntimeError(f"{' '.join(map(str, command))} ended by itself, with {status}:\n{_text(err)}")
        wall = time.perf_counter() - began if reached is None else reached
        return Measured(wall, usage, peak, _last_object(_text(out)))


def _watch(
    process: subprocess.Popen[bytes], began: float, until: Callable[[], bool] | None
) -> tuple[float, float | None, tuple[int, float]]:
    """Peak (MiB), when `until` came true, and exit status with CPU seconds of the process and its children."""
    peak, reached, looked = 0.0, None, 0.0
    while True:
        # Asked first: the numbers of a process that has ended are gone.
        peak = max(peak, _high_water(process.pid))
        if (now := time.perf_counter()) - looked > _LOOK_AT_CHILDREN:
            peak, looked = max(peak, _family(process.pid)), now
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return peak, reached, (process.returncode, usage.ru_utime + usage.ru_stime)
        if reached is None and until is not None and until():
            reached = time.perf_counter() - began
            process.send_signal(signal.SIGTERM)
        time.sleep(_LOOK)


def _high_water(pid: int) -> float:
    """VmHWM in MiB: the most that the process has ever held, as the kernel counts it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError):
        return 0.0


def _family(pid: int) -> float:
    """MiB that a process and its children hold now, shared pages once; 0 where it has none."""
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        if children := parent.children(recursive=True):
            return sum(_own(process) for process in (parent, *children)) / 2**20
    return 0.0


def _own(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0


def environment() -> dict[str, str]:
    """This checkout first, and no Prefect server."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PREFECT_HOME": str(ROOT / "build" / "prefect")}


@cache
def start_up() -> Measured:
    """What Python and segflow's imports take before there is any scene: median of three, files warm."""
    command = [sys.executable, "-c", _IMPORTS]
    measure(command)
    return median([measure(command) for _ in range(3)])


def peer(name: str, *arguments: object) -> Measured:
    """Run one of `peers/`, which says itself what its work took: reading and loading are not the peer's fault."""
    found = measure([sys.executable, "-m", f"benchmarks.peers.{name}", *arguments])
    said = found.said
    return Measured(said.get("seconds", found.wall), said.get("cpu", found.cpu), said.get("peak", found.peak), said)


def median(runs: Sequence[Measured]) -> Measured:
    """Every number for itself; what was said, of the last run."""
    wall, cpu, peak = (statistics.median(getattr(run, name) for run in runs) for name in ("wall", "cpu", "peak"))
    return Measured(wall, cpu, peak, runs[-1].said)


def in_turn(contestants: Mapping[str, Callable[[], Measured]], runs: int) -> dict[str, Measured]:
    """Each contestant in turn, so many times: a machine that slows down slows them all down. Medians."""
    found: dict[str, list[Measured]] = {name: [] for name in contestants}
    for turn in range(runs):
        for name, run in contestants.items():
            found[name].append(run())
            last = found[name][-1]
            print(f"  {turn + 1}/{runs} {name}: {last.wall:.1f} s, {last.peak:.0f} MiB", file=sys.stderr, flush=True)
    return {name: median(each) for name, each in found.items()}


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _last_object(text: str) -> dict[str, Any]:
    """The JSON object that is the whole text, or its last line."""
    for part in (text, text.strip().rpartition("\n")[2]):
        with suppress(ValueError):
            found = json.loads(part)
            if isinstance(found, dict):
                return found
    return {}
