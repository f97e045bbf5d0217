"""A piece of work in this process, measured from within."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def measured(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What the work returns; its seconds on the wall and of CPU; and the peak of the process while it ran, in MiB."""
    with suppress(OSError):  # where the kernel cannot, the peak of what came before counts, too
        Path("/proc/self/clear_refs").write_text("5")  # the high water from now on
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    seconds, used = time.perf_counter() - wall, time.process_time() - cpu
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return result, {"seconds": seconds, "cpu": used, "peak": peak}


def say(facts: dict[str, object] | dict[str, float]) -> None:
    """The last line of a peer."""
    print(json.dumps(facts), flush=True)
