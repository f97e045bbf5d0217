"""Leases: one run at a time for a scene, where `flock` does not carry: several hosts, or outputs in object storage.

A lease is a record in a register (`segcore.register`) that its holder renews three times in its time to live. Whoever
else wants the scene looks at the record, and takes it over once it has not changed for that time by the *looker's own*
monotonic clock; so no two clocks are ever compared, and a clock that is wrong or jumps does nothing. A take-over is one
conditional write: of all who try, one succeeds, and none if the holder renewed first.

What remains: a holder makes sure of its lease right before it commits, and a commit is a few renames. A process that is
stopped between the two, and for longer than the time to live, still does these when it wakes. The manifest's checksums
tell if that hit another's product.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from segcore.errors import InUseError, PlanError, ProductError
from segcore.lock import Guard, Guarding, Holder, Lock, locked
from segcore.register import LONGEST_TTL, Entry, Record, Register, Version, open_register

#: How long a lease lives without being renewed, in seconds.
TTL_SECONDS = 60.0

Clock = Callable[[], float]
"""Seconds that never go back; only differences count."""


class Lease:
    """A scene that this process holds, against all who look into the same register. A guard.

    A thread renews it. `lost` is set once another has taken it, or once it could not be renewed for its time to live.
    """

    def __init__(
        self, register: Register, key: str, record: Record, version: Version, confirmed: float, clock: Clock
    ) -> None:
        self.lost = threading.Event()
        self._register, self._key, self._clock = register, key, clock
        self._record, self._version, self._confirmed = record, version, confirmed
        self._reason = ""
        self._turn, self._ended = threading.Lock(), threading.Event()
        self._renewer = threading.Thread(target=self._renew_always, name=f"lease of {key}", daemon=True)
        self._renewer.start()

    def holds(self) -> bool:
        """Whether the lease cannot be another's yet: it was renewed within its time to live, by the clock here."""
        return not self.lost.is_set() and self._clock() < self._confirmed + self._record.ttl

    def check(self) -> None:
        """Renew the lease now, so that nobody else can have it for its time to live.

        Raises ProductError where it was lost, or where storage is away.
        """
        if not self.lost.is_set():
            try:
                self._renew()
            except ProductError as error:
                raise ProductError(
                    f"cannot make sure that {self._key} is still this run's alone: {error}", retryable=error.retryable
                ) from error
        if self.lost.is_set():
            raise ProductError(
                f"the lease on {self._key} was lost: {self._reason}; nothing was committed: run again", retryable=True
            )

    def release(self) -> None:
        """Give the scene free, if it is still held. What cannot be written now is dead after the time to live."""
        self._ended.set()
        self._renewer.join()
        with self._turn:
            if not self.lost.is_set():
                with contextlib.suppress(ProductError):
                    self._register.release(self._key, self._record, self._version)
                self._lose("it was given free")

    def _renew(self) -> None:
        """One conditional write. Sets `lost` where the record is another's. Raises ProductError where storage is away.

        It may come late: as long as the record is ours nobody has taken it, and nobody can from now on.
        """
        with self._turn:
            if self.lost.is_set() or self._ended.is_set():
                return
            began = self._clock()
            record = self._record.renewed()
            version = self._register.replace(self._key, record, self._version)
            if version is None:
                # Another's, or an earlier write of ours whose answer was lost.
                found = self._register.read(self._key)
                if found is not None and found.record.token == record.token:
                    record = found.record.renewed()
                    version = self._register.replace(self._key, record, found.version)
                if version is None:
                    self._lose(f"it was taken by {_holder(found)}" if found else "its record was removed")
                    return
            self._record, self._version, self._confirmed = record, version, began

    def _renew_always(self) -> None:
        pause = self._record.ttl / 3
        while not self._ended.wait(pause) and not self.lost.is_set():
            try:
                self._renew()
                pause = self._record.ttl / 3
            except ProductError as error:
                pause = self._record.ttl / 10  # storage is away: not much time is left
                if not self.holds():
                    self._lose(f"it could not be renewed for {self._record.ttl:g} s: {error}")

    def _lose(self, reason: str) -> None:
        self._reason = reason
        self.lost.set()


class Leases:
    """The leases of one run in one register. Remembers what it saw, so that a later look can tell that a lease is dead.

    `run`: the name of the run, for the messages of others. Safe for threads.
    """

    def __init__(
        self, register: Register, run: str, ttl_seconds: float = TTL_SECONDS, clock: Clock = time.monotonic
    ) -> None:
        if not 0 < ttl_seconds <= LONGEST_TTL:
            raise PlanError(f"a lease of {ttl_seconds:g} s cannot work; its time to live is 0 to {LONGEST_TTL:g} s")
        self._register, self._run, self._ttl, self._clock = register, run, ttl_seconds, clock
        self._seen: dict[str, tuple[str, int, float]] = {}
        self._turn = threading.Lock()

    @classmethod
    def at(cls, url: str, run: str, ttl_seconds: float = TTL_SECONDS) -> Leases:
        """The leases under a URL: `s3://bucket/prefix`, `gs://`, `az://`, `file://` or a path. One for each output.

        Raises ProductError where they cannot be kept there, PlanError.
        """
        return cls(open_register(url, ttl_seconds / 6), run, ttl_seconds)

    @contextlib.contextmanager
    def hold(self, key: str, wait_seconds: float = 0.0) -> Iterator[Lease]:
        """Hold the scene of this key; with `wait_seconds` 0 the call does not wait for another run.

        Raises InUseError where another run has it for longer, ProductError where storage is away or refuses.
        """
        lease = self._take(key, wait_seconds)
        try:
            yield lease
        finally:
            lease.release()

    def _take(self, key: str, wait_seconds: float) -> Lease:
        until, token, tried = self._clock() + wait_seconds, uuid4().hex, 0
        while True:
            began, found = self._clock(), None
            try:
                found = self._register.read(key)
                if found is None or self._may_take(key, found, token, began):
                    beat = found.record.beat + 1 if found else 1
                    record = Record(token, beat, self._ttl, Holder.here(self._run))
                    version = (
                        self._register.replace(key, record, found.version)
                        if found
                        else self._register.create(key, record)
                    )
                    if version is not None:
                        return Lease(self._register, key, record, version, began, self._clock)
                    tried += 1
                    if tried < 3:
                        continue  # another was faster, or the answer to a write of ours was lost: look again
            except ProductError as error:
                if not error.retryable or self._clock() >= until:
                    raise
            if self._clock() >= until:
                raise InUseError(f"{key} is in use by {_holder(found)}; wait for it to end")
            time.sleep(min(1.0, self._ttl / 10))

    def _may_take(self, key: str, found: Entry, token: str, now: float) -> bool:
        """Whether this record stands in nobody's way: free, ours, or seen unchanged for its time to live.

        `now` was before the record was read, and what is remembered is after: so the time between is never too long.
        """
        record = found.record
        if record.free or record.token == token:
            return True
        with self._turn:
            seen = self._seen.get(key)
            if seen is None or seen[:2] != (record.token, record.beat):
                self._seen[key] = (record.token, record.beat, self._clock())
                return False
            return now - seen[2] >= record.ttl


@contextlib.contextmanager
def leased(
    url: str, key: str, owner: str, ttl_seconds: float = TTL_SECONDS, wait_seconds: float = 0.0
) -> Iterator[Lease]:
    """One lease under a URL, for a run called `owner`. Who holds many asks one `Leases`, which remembers what it saw.

    Raises InUseError where another has it for longer than `wait_seconds`, ProductError, PlanError.
    """
    with Leases.at(url, owner, ttl_seconds).hold(key, wait_seconds) as lease:
        yield lease


def guarding(run: str, wait_seconds: float, leases: Leases | None = None) -> Guarding:
    """How a run holds its scenes: by a lock and, where there are leases, by both.

    The key of a lease is the name of the folder, which is the scene's. The lease comes first: only who has it touches
    the folder.
    """

    @contextlib.contextmanager
    def hold(folder: Path) -> Iterator[Guard]:
        if leases is None:
            with locked(folder, wait_seconds, run) as lock:
                yield lock
        else:
            with leases.hold(folder.name, wait_seconds) as lease, locked(folder, wait_seconds, run) as lock:
                yield _Both(lock, lease)

    return hold


class _Both:
    """A guard that holds as long as lock and lease do."""

    def __init__(self, lock: Lock, lease: Lease) -> None:
        self._lock, self._lease = lock, lease

    def holds(self) -> bool:
        return self._lease.holds() and self._lock.holds()

    def check(self) -> None:
        self._lock.check()
        self._lease.check()


def _holder(found: Entry | None) -> str:
    holder = found.record.holder if found else None
    return str(holder) if holder else "another run"
