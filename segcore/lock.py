"""Locks: one run at a time in the hidden folder of a scene, on one host or wherever `flock` carries.

What holds a scene is a guard. A lock is one, a lease (`segcore.lease`) another, for where `flock` does not carry.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from segcore.errors import InUseError, ProductError

#: In a locked folder, who holds it. For messages alone: a run that was killed leaves it behind.
NOTE = "holder.json"
#: Seconds between two attempts at a lock.
PAUSE_SECONDS = 0.2


class Guard(Protocol):
    """What a run has of a scene that it holds."""

    def holds(self) -> bool:
        """Whether the scene is still held, as far as is known without asking anyone. Cheap."""

    def check(self) -> None:
        """Make sure of it, right before a commit. Raises ProductError where the scene is not held any more."""


Guarding = Callable[[Path], AbstractContextManager[Guard]]
"""Holds the hidden folder of a scene. Raises InUseError where another run has it, and ProductError."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a scene in work, in the words of a message. `since`: UTC, ISO 8601, by the holder's own clock."""

    run: str
    host: str
    pid: int
    since: str

    @classmethod
    def here(cls, run: str) -> Holder:
        """The process that asks, for the run of this name."""
        return cls(run, platform.node(), os.getpid(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))

    @classmethod
    def from_json(cls, fields: Any) -> Holder:
        """Raises KeyError, TypeError, ValueError."""
        return cls(str(fields["run"]), str(fields["host"]), int(fields["pid"]), str(fields["since"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        who = f"run {self.run}" if self.run else "another run"
        return f"{who} on host {self.host} (process {self.pid}) since {self.since}"


class Lock:
    """A folder that this process has locked."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder, self._descriptor = folder, descriptor

    def holds(self) -> bool:
        """Whether the locked folder is still the one under that name: someone may have removed it by hand."""
        return _is_at(self._descriptor, self._folder)

    def check(self) -> None:
        """Raises ProductError where the folder was removed or replaced."""
        if not self.holds():
            raise ProductError(f"{self._folder} was removed while this run worked in it; run again", retryable=True)


@contextlib.contextmanager
def locked(folder: Path, wait_seconds: float, run: str = "") -> Iterator[Lock]:
    """Hold a folder, which is made, against other runs; the lock goes with the process, however that ends.

    `wait_seconds`: how long to wait for another run; with 0, not at all. `run`: its name, for the messages of others.
    Raises InUseError where another run has it for longer, and ProductError.
    """
    until = time.monotonic() + wait_seconds
    while (descriptor := _lock(folder)) is None:
        if time.monotonic() >= until:
            raise InUseError(f"{folder} is in use by {noted(folder) or 'another run'}; wait for it to end")
        time.sleep(min(PAUSE_SECONDS, wait_seconds))
    holder = Holder.here(run)
    try:
        _write_note(folder, holder)
        yield Lock(folder, descriptor)
    finally:
        # That a disk has become read-only is said by whoever wrote on it, and not by the end of the lock.
        with contextlib.suppress(OSError):
            if noted(folder) == holder:  # where flock does not carry, it may be the note of another host
                (folder / NOTE).unlink(missing_ok=True)
        # Empty it is of no use; removed while it is locked, so that no other run can be in it.
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(descriptor)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def held(folder: Path) -> bool:
    """Whether a run has locked this folder. Nothing is made; a folder that is not there is not held.

    Asked with a shared lock, so that two that ask do not take each other for a run. Raises ProductError.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ProductError(f"cannot look at {folder}: {error.strerror or error}; check its permissions") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        raise ProductError(f"cannot lock {folder}: {error.strerror or error}; choose another --out") from error
    finally:
        os.close(descriptor)
    return False


def noted(folder: Path) -> Holder | None:
    """Who noted to hold this folder; None without a note that can be read. Means nothing unless the folder is held."""
    try:
        return Holder.from_json(json.loads((folder / NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def empty(folder: Path) -> None:
    """Remove what is in a locked folder, and not the folder, which is the lock, nor its note; what cannot go, stays."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != NOTE:
            with contextlib.suppress(OSError):
                path.unlink()


def _lock(folder: Path) -> int | None:
    """A locked descriptor of the folder, which is made; None while another run holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        # Another run removed it, or the folder above it, between two steps of this. Where it went between two steps of
        # mkdir, mkdir takes it for something that is not a folder.
        if isinstance(error, FileNotFoundError) or (isinstance(error, FileExistsError) and _gone(Path(error.filename))):
            return None
        raise ProductError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another run may have ended, and removed the folder, since it was opened.
        if _is_at(descriptor, folder):
            return descriptor
    except BlockingIOError:
        pass
    except OSError as error:
        os.close(descriptor)
        raise ProductError(f"cannot lock {folder}: {error.strerror or error}; choose another --out") from error
    os.close(descriptor)
    return None


def _gone(path: Path) -> bool:
    """Whether what was in the way of a new folder is no longer there, or a folder again."""
    return path.is_dir() or not os.path.lexists(path)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False


def _write_note(folder: Path, holder: Holder) -> None:
    """Say who holds the folder. A note is a courtesy: that it cannot be written stops no run."""
    with contextlib.suppress(OSError):
        (folder / NOTE).unlink(missing_ok=True)  # of a run that was killed
        (folder / NOTE).write_text(json.dumps(holder.to_json()), encoding="utf-8")
