"""The memory of this machine, or of the container that it is for us, and of this process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path

import psutil

from segcore.errors import PlanError
from segcore.spec import format_bytes

_CGROUP = Path("/sys/fs/cgroup")
#: mallopt(3): its parameters, and bytes of an array from which on it is mapped by itself, so that it leaves no hole.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MAPPED, _TRIMMED = -1, -3, 4 * 2**20, 128 * 2**10


def check_memory(budget: int | None) -> None:
    """Raises PlanError where this machine, or its container, has less memory than a budget grants."""
    has = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # no limit is not a number
        has = min(has, int((_CGROUP / "memory.max").read_text()))
    if budget is not None and budget > has:
        raise PlanError(
            f"--memory {format_bytes(budget)} is more than the {format_bytes(has)} that this machine has; give less, "
            f"or leave it out for half of what is free"
        )


def free_memory() -> int:
    """Bytes that this machine could give without swapping; in a container, no more than its limit leaves."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            # Pages of files count as used, and are given back when they are wanted.
            files = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
            free = min(free, max(0, int(limit) - int(used) + (int(files[1]) if files else 0)))
    return free


def release_memory() -> None:
    """Give memory that was freed back to the system: heaps keep it, in pieces that arrays of other sizes do not fit."""
    with contextlib.suppress(AttributeError, OSError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def keep_heap_small() -> None:
    """From now on, this process gives memory back when it is freed, and not when there is much of it.

    By itself glibc raises both limits as it sees arrays, to 32 and 64 MiB, and keeps as much for the next of their
    size. What the environment says is left as it is: dask has its workers give back everything.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):  # a C library other than glibc
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _MAPPED)
        library.mallopt(_TRIM_THRESHOLD, _TRIMMED)
