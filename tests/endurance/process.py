"""Processes that are watched and killed: segflow with all that it starts."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
SEGFLOW: tuple[str, ...] = (sys.executable, "-c", "from flows import main; main()")
#: The same, with scenes that kill and hang.
WICKED: tuple[str, ...] = (sys.executable, "-c", "from endurance.wicked import main; main()")


def environment() -> dict[str, str]:
    """This checkout first, no Prefect server, no GPU."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return kept | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(slots=True)
class Running:
    """A process in a session of its own, and what it says in two files."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path
    began: float
    cpu: float = 0.0

    def kill(self) -> None:
        """SIGKILL for it and everything that it started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait(60)

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None where it has not ended by then. Adds up its CPU seconds, its children's included."""
        until = time.monotonic() + seconds
        while self.process.returncode is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu = usage.ru_utime + usage.ru_stime
            elif time.monotonic() > until:
                return None
            else:
                time.sleep(0.02)
        return self.process.returncode

    @property
    def said(self) -> str:
        return self.err.read_text(errors="replace")

    @property
    def summary(self) -> dict[str, Any]:
        """What `--json` printed; empty where it did not come to that."""
        with suppress(ValueError):
            found = json.loads(self.out.read_text())
            return found if isinstance(found, dict) else {}
        return {}


@contextmanager
def running(command: Sequence[object], log: Path) -> Iterator[Running]:
    """Start a program; at the end of the block nothing of it is left. `log`: files beside it take what it says."""
    log.parent.mkdir(parents=True, exist_ok=True)
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(list(map(str, command)), stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL,
                                   env=environment(), cwd=ROOT, start_new_session=True)  # fmt: skip
    found = Running(process, out, err, time.monotonic())
    try:
        yield found
    finally:
        found.kill()


def run(command: Sequence[object], log: Path, seconds: float = 900) -> Running:
    """Run a program to its end. Raises TimeoutError where that does not come."""
    with running(command, log) as found:
        if found.wait(seconds) is None:
            raise TimeoutError(f"{' '.join(map(str, command))} did not end in {seconds:.0f} s: {found.said}")
        return found


class Sampler:
    """Looks at a process and its children: memory (MiB) of the driver, of the workers, and of all; worker starts."""

    def __init__(self, pid: int, every: float = 0.5) -> None:
        self.samples: list[tuple[float, float, float]] = []
        self.workers: set[int] = set()
        self._pid, self._every, self._over = pid, every, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        began = time.monotonic()
        while not self._over.wait(self._every):
            with suppress(psutil.Error):
                driver = psutil.Process(self._pid)
                own, workers = driver.memory_info().rss / 2**20, 0.0
                for child in driver.children(recursive=True):
                    with suppress(psutil.Error):
                        if "spawn_main" in " ".join(child.cmdline()):
                            workers += child.memory_info().rss / 2**20
                            self.workers.add(child.pid)
                self.samples.append((time.monotonic() - began, own, workers))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    def quarters(self) -> list[tuple[float, float, float]]:
        """For each quarter of the time: median of the driver, of the workers, and the most that both held (MiB)."""
        if not self.samples:
            return []
        end = self.samples[-1][0] + 1e-9
        parts: list[list[tuple[float, float, float]]] = [[], [], [], []]
        for sample in self.samples:
            parts[int(4 * sample[0] / end)].append(sample)
        return [
            (
                statistics.median(s[1] for s in part),
                statistics.median(s[2] for s in part),
                max(s[1] + s[2] for s in part),
            )
            for part in parts
            if part
        ]
