"""Tiles on dask: hands out batches of tile indices, a few at a time, and counts what comes back.

Only indices and small reports travel; a worker reads its pixels itself and writes its labels to scratch. The driver
never holds a graph of the scene: it keeps a bounded number of batches in flight and submits the next when one ends.

When a worker dies, nobody knows which of its tiles killed it. So all of them are suspects, and each is tried again with
nothing else under way, of no scene: the one that kills twice is the poison, and the others are innocent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from uuid import uuid4

from distributed import Client, Future, KilledWorker, Scheduler

from segcore.cluster import ClusterFile, check_address, is_cluster_file, local_cluster
from segcore.errors import (
    LateError,
    ModelError,
    PlanError,
    PoisonError,
    SceneError,
    SegcoreError,
    StoppedError,
    one_line,
)
from segcore.plan import Index
from segcore.spec import usable_cores
from segcore.tile import Labeller
from segcore.worker import Bench, Recipe, TileReport, label_batch, stop_pass, work_once

#: A batch of tiles should be worth this long (seconds), so that scheduling (some 4 ms) stays in the noise.
BATCH_SECONDS = 0.5
#: A tile is tried this often before its scene fails.
ATTEMPTS = 3
#: A tile is poison when it has killed its worker so often with nothing else under way.
DEATHS = 2
#: Seconds in which a scheduler must answer.
_ANSWER = 15.0
#: Seconds in which a worker that died should be back, on a machine however busy; and that one is given to start again.
_REVIVAL, _RESTART = 120.0, 60.0
#: Seconds after a death in which nothing is submitted: a worker that dies while it is started is late to be back.
_SETTLE = 2.0
#: Seconds that a tile under way is given to end: when its scene failed, and when the run is to stop.
_PATIENCE, _HURRY = 60.0, 6.0
#: Scenes whose statistics or products are made at once.
_AT_DESK = 2
#: Seconds between two looks at whether the run is to stop.
_LOOK = 0.5

T = TypeVar("T")


class Gate:
    """Lets batches of all scenes through, or one suspect alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside, self._waiting, self._closed = 0, 0, False

    def enter(self) -> bool:
        """Go through, unless somebody is alone or wants to be."""
        with self._changed:
            if self._closed or self._waiting:
                return False
            self._inside += 1
            return True

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until something changes, at most so long."""
        with self._changed:
            if self._closed or self._waiting:
                self._changed.wait(seconds)

    @contextlib.contextmanager
    def alone(self, keep_on: Callable[[], None]) -> Iterator[None]:
        """With nobody else inside; `keep_on` raises where waiting is of no use any more."""
        with self._changed:
            self._waiting += 1
            try:
                while self._inside or self._closed:
                    self._changed.wait(_LOOK)
                    keep_on()
                self._closed = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


class Workers:
    """A connection to the workers that label tiles: of this process, or of a cluster. A context manager.

    Several threads may label scenes with it at once. `drain` ends them all: no new tile is begun.
    """

    def __init__(self, where: str | None = None, processes: int = 0) -> None:
        """`where`: address of a dask scheduler or a cluster file; None for `processes` of this machine, or threads of
        this process (0). Raises PlanError where none answers.
        """
        self._cluster: Any = None
        self.processes = where is not None or processes > 0
        self._here = where is None
        self.gate, self._draining = Gate(), threading.Event()
        # Statistics and products are made in this process: of few scenes at once, so that memory stays bounded.
        self.desk = threading.Semaphore(_AT_DESK)
        address = where
        try:
            if where is None:
                self._cluster = local_cluster(processes)
            elif is_cluster_file(where):
                self._cluster = ClusterFile.read(where).start()
            else:
                check_address(where)  # a client that never was takes half a minute to go
            self.client = Client(self._cluster or address, timeout=_ANSWER, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            self.close()
            raise PlanError(
                f"no dask scheduler answers at {where} ({one_line(error)}); start one with `dask scheduler`, or leave "
                f"--cluster out"
            ) from error
        try:
            if where is not None and not self.client.scheduler_info()["workers"]:
                self.client.wait_for_workers(1, timeout=60 if self._cluster is None else 600)
            self.client.run_on_scheduler(_blame_at_once)
            threads = None if where is not None else max(1, usable_cores() // max(1, processes))
            self.client.register_plugin(Bench(threads, self.processes))
            if self.processes:
                self.client.forward_logging("segcore", logging.INFO)
        except Exception as error:  # whatever a worker of another make raises
            self.close()
            raise PlanError(
                f"the workers of {where or 'this process'} cannot run segflow ({one_line(error)}); install the same "
                f"version there, and start at least one worker"
            ) from error

    @property
    def threads(self) -> int:
        """Tiles that the workers can have under way at once."""
        return sum(self.client.nthreads().values()) or 1

    @property
    def devices(self) -> int:
        """Worker processes: each has one inference under way."""
        return len(self.client.nthreads()) or 1

    def drain(self) -> None:
        """End all that is under way, from whatever thread: what waits for tiles raises StoppedError."""
        self._draining.set()

    @property
    def draining(self) -> bool:
        return self._draining.is_set()

    def keep_on(self) -> None:
        """Raises StoppedError when the run is to end."""
        if self._draining.is_set():
            raise StoppedError("stopped; finished tiles are kept: run the same command again to go on")

    @property
    def lost(self) -> bool:
        """Whether nobody is there any more to label a tile."""
        try:
            return self.client.status != "running" or not self.client.nthreads()
        except Exception:  # whatever a client raises whose scheduler is gone
            return True

    def settle(self, keep_on: Callable[[], None] | None = None) -> None:
        """After a death: wait until a worker is back. Raises ModelError where none comes, and what `keep_on` raises."""
        time.sleep(_SETTLE)
        until = time.monotonic() + _REVIVAL
        while not self.client.nthreads():
            (keep_on or self.keep_on)()
            if time.monotonic() > until:
                raise _nobody_left()
            time.sleep(_LOOK)

    def end(self, addresses: list[str]) -> None:
        """End the processes of workers that do not end a tile; their nannies start others."""
        if not self.processes:
            return
        with contextlib.suppress(OSError):
            if self._here:
                for pid in self.client.run(os.getpid, workers=addresses).values():
                    os.kill(pid, signal.SIGKILL)
            else:
                self.client.restart_workers(addresses, timeout=_RESTART, raise_for_error=False)
        self.settle()

    def close(self) -> None:
        if hasattr(self, "client"):
            with contextlib.suppress(Exception):  # it may have lost its scheduler
                self.client.close(timeout=5)
        if self._cluster is not None:
            with contextlib.suppress(Exception):
                self._cluster.close(timeout=10)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nobody_left() -> ModelError:
    return ModelError("all workers died and none came back; finished tiles are kept: run again", retryable=True)


def _blame_at_once(dask_scheduler: Scheduler) -> None:
    """Runs on the scheduler: whose worker died comes back to us at once, rather than to kill the next worker."""
    dask_scheduler.allowed_failures = 0


def label_tiles(
    recipe: Recipe,
    todo: Iterable[Index],
    workers: Workers,
    tile_seconds: float | None = None,
    scene_seconds: float | None = None,
) -> Iterator[TileReport]:
    """Label the tiles and store them in the recipe's scratch; reports come as tiles end, in any order.

    A batch that fails is tried again tile by tile, unless its error says that this is of no use. `tile_seconds` and
    `scene_seconds` are deadlines. Raises the error of a tile that failed for good, after every tile under way has
    ended: PoisonError for one that killed its worker twice and alone; LateError at the deadline of the scene;
    StoppedError when the run ends.
    """
    with _Pass(recipe, workers, tile_seconds, scene_seconds) as one:
        yield from one.label(todo)


class _Pass:
    """One way through the tiles of one scene."""

    def __init__(
        self, recipe: Recipe, workers: Workers, tile_seconds: float | None, scene_seconds: float | None
    ) -> None:
        self._key, self._packed, self._workers = uuid4().hex, pickle.dumps(recipe), workers
        self._uri = recipe.source.uri
        self._tile_seconds, self._scene_seconds = tile_seconds, scene_seconds
        self._until = None if scene_seconds is None else time.monotonic() + scene_seconds
        self._running: dict[Future, list[Index]] = {}
        self._ended: SimpleQueue[Future] = SimpleQueue()
        self._again: deque[Index] = deque()
        self._suspects: deque[Index] = deque()
        self._attempts: Counter[Index] = Counter()
        self._lonely: list[Future] = []
        self._next_look = 0.0
        self._alone_since: float | None = None
        self._size = 1

    def label(self, todo: Iterable[Index]) -> Iterator[TileReport]:
        """See `label_tiles`."""
        rest, most = iter(todo), self._workers.threads + 1
        while True:
            while len(self._running) < most and self._submit(rest):
                pass
            if self._running:
                yield from self._next_reports()
            elif self._suspects:
                yield self._label_alone(self._suspects.popleft())
            elif self._again or (following := next(rest, None)) is None:
                if not self._again:
                    return
                self._wait_at_gate()
            else:
                self._again.append(following)
                self._wait_at_gate()

    def _wait_at_gate(self) -> None:
        """Somebody's suspect is alone inside."""
        self._workers.gate.wait(_LOOK)
        self._keep_on()

    def _submit(self, rest: Iterator[Index]) -> bool:
        """Submit a batch: what failed before goes first, and in a batch of its own."""
        if not self._workers.gate.enter():
            return False
        batch = [self._again.popleft()] if self._again else list(islice(rest, self._size))
        if not batch:
            self._workers.gate.leave()
            return False
        future = self._send(batch)
        self._running[future] = batch
        future.add_done_callback(self._ended.put)
        return True

    def _send(self, batch: list[Index]) -> Future:
        return self._workers.client.submit(label_batch, self._key, self._packed, batch, self._tile_seconds, pure=False)

    def _next_reports(self) -> Iterator[TileReport]:
        """Wait for a batch to end."""
        try:
            future = self._ended.get(timeout=_LOOK)
        except Empty:
            self._keep_on()
            self._look_for_workers()
            return
        self._keep_on()
        batch = self._running.pop(future)
        self._workers.gate.leave()
        try:
            reports: list[TileReport] = future.result()
        except KilledWorker:
            self._suspects.extend(batch)
            self._workers.settle(self._keep_on)
        except (Exception, CancelledError) as error:
            self._failed(batch, error)
            self._again.extend(batch)
        else:
            seconds = sum(report.seconds for report in reports) / max(1, len(reports))
            self._size = min(256, max(1, round(BATCH_SECONDS / max(seconds, 1e-6))))
            yield from reports

    def _label_alone(self, index: Index) -> TileReport:
        """Label a suspect with nothing else under way. Raises PoisonError when it kills its worker again and again."""
        deaths = 0
        with self._workers.gate.alone(self._keep_on):
            while True:
                began = time.monotonic()
                try:
                    (report,) = self._wait_for(self._send([index]))
                except KilledWorker as error:
                    deaths += 1
                    late = self._tile_seconds is not None and time.monotonic() - began >= self._tile_seconds
                    self._workers.settle(self._keep_on)
                    if deaths == DEATHS:
                        how = f"was not labelled in {self._tile_seconds:g} s" if late else "killed its worker"
                        raise PoisonError(
                            f"{self._uri}: tile {index} {how}, {deaths} times with nothing else under way; look at its "
                            f"pixels there, or try a smaller --tile, and run with --retry-failed"
                        ) from error
                except (Exception, CancelledError) as error:
                    self._failed([index], error)
                else:
                    return report

    def work(self, work: Callable[[Labeller], T]) -> T:
        """See `run_once`."""
        while True:
            try:
                future = self._workers.client.submit(work_once, self._key, self._packed, work, pure=False)
                found: T = self._wait_for(future)
            except KilledWorker as error:
                self._failed([()], error)
                self._workers.settle(self._keep_on)
            except (Exception, CancelledError) as error:
                self._failed([()], error)
            else:
                return found

    def _wait_for(self, future: Future) -> Any:
        """What a batch of its own comes to."""
        self._lonely.append(future)
        ended = threading.Event()
        future.add_done_callback(lambda _: ended.set())
        while not ended.wait(_LOOK):
            self._keep_on()
            self._look_for_workers()
        self._lonely.remove(future)
        return future.result()

    def _look_for_workers(self) -> None:
        """Raises ModelError when there has been no worker for long: what was submitted would wait for ever."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _REVIVAL / 10
        if self._workers.client.nthreads():
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > _REVIVAL:
            raise _nobody_left()

    def _failed(self, batch: list[Index], error: BaseException) -> None:
        """Counts an attempt. Raises where another is of no use."""
        for index in batch:
            self._attempts[index] += 1
            what = f"tile {index}" if index else "what is measured on the scene"
            _refuse_hopeless(what, self._attempts[index], error)
        time.sleep(0.2)

    def _keep_on(self) -> None:
        self._workers.keep_on()
        if self._until is not None and time.monotonic() > self._until:
            raise LateError(
                f"{self._uri} was not labelled in {self._scene_seconds:g} s, the time that a scene is given; finished "
                f"tiles are kept: give it longer (--scene-timeout) and run again"
            )

    def __enter__(self) -> _Pass:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Stop what still runs, and say so where the scheduler was lost."""
        client = self._workers.client
        with contextlib.suppress(Exception):  # what went wrong before matters more
            client.cancel([*self._running, *self._lonely])
            hurry = self._workers.draining or (kind is not None and not issubclass(kind, Exception))
            self._wait_until_stopped(_HURRY if hurry or isinstance(error, SceneError) else _PATIENCE)
        for _future in self._running:
            self._workers.gate.leave()
        if isinstance(error, Exception) and not isinstance(error, SegcoreError) and client.status != "running":
            raise ModelError(
                "lost the dask scheduler; finished tiles are kept: start it again, or leave --cluster out, and run "
                "again",
                retryable=True,
            ) from error

    def _wait_until_stopped(self, timeout: float) -> None:
        """Wait, at most `timeout` seconds, until no worker is inside a tile of this pass.

        A tile cannot be stopped half-way, and nobody may remove what it writes to before it ends; after that time the
        process that works on it is ended, where it is one of its own.
        """
        client, until = self._workers.client, time.monotonic() + timeout
        while busy := [address for address, tiles in client.run(stop_pass, self._key).items() if tiles]:
            if time.monotonic() > until:
                if not self._workers.draining:
                    self._workers.end(busy)
                return
            time.sleep(0.05)


def run_once(recipe: Recipe, workers: Workers, work: Callable[[Labeller], T]) -> T:
    """Run a piece of work on one worker, which has scene and model open as for its tiles.

    It is tried again as tiles are. Raises its error when it failed for good, or ModelError with a lost scheduler.
    """
    with _Pass(recipe, workers, None, None) as one:
        return one.work(work)


def _refuse_hopeless(what: str, attempts: int, error: BaseException) -> None:
    """Raises when something is not to be tried again."""
    if isinstance(error, SegcoreError) and (not error.retryable or attempts >= ATTEMPTS):
        raise error
    if attempts >= ATTEMPTS:
        raise ModelError(
            f"{what} failed {attempts} times, at last with {type(error).__name__}: {one_line(error)}",
            retryable=isinstance(error, (KilledWorker, CancelledError, OSError, MemoryError)),
        ) from error
