"""Tiles on dask: hands out batches of tile indices, a few at a time, and counts what comes back. Dask's only home.

Only indices and small reports travel; a worker reads its pixels itself and writes its labels to scratch. The driver
never holds a graph of the scene: it keeps a bounded number of batches in flight and submits the next when one ends.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar
from uuid import uuid4

import psutil
from distributed import Client, Future, KilledWorker, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker

from segcore.errors import ModelError, PlanError, SegcoreError, one_line
from segcore.io.scratch import Scratch
from segcore.io.source import Source
from segcore.model import load_segmenter
from segcore.model.card import Model
from segcore.model.quantise import Quantised
from segcore.model.segmenter import Segmenter
from segcore.plan import TILES_IN_FLIGHT, Index, Plan
from segcore.scaling import Scaling
from segcore.spec import usable_cores
from segcore.tile import Labeller

#: A batch of tiles should be worth this long (seconds), so that scheduling (some 4 ms) stays in the noise.
BATCH_SECONDS = 0.5
#: A tile is tried this often before its scene fails.
ATTEMPTS = 3
_PLUGIN = "segflow"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a worker has to know to label tiles of one scene; `quantised`: the network in int8 that is run."""

    plan: Plan
    model: Model
    source: Source
    scaling: Scaling
    scratch: Scratch
    quantised: Quantised | None = None


@dataclass(frozen=True, slots=True)
class TileReport:
    """What became of one tile: valid pixels, windows inferred, seconds in each stage, and the engine that ran it."""

    index: Index
    valid: int
    windows: int
    read_seconds: float
    infer_seconds: float
    label_seconds: float
    write_seconds: float
    engine: str

    @property
    def seconds(self) -> float:
        """Without those that were spent waiting for the device."""
        return self.read_seconds + self.infer_seconds + self.label_seconds + self.write_seconds


class Bench(WorkerPlugin):  # type: ignore[misc]
    """What a worker process keeps between tiles: open scenes and loaded networks, a few of each."""

    name = _PLUGIN

    def __init__(self, engine_threads: int | None) -> None:
        self._engine_threads = engine_threads

    def setup(self, worker: Worker) -> None:
        self._threads = self._engine_threads or worker.state.nthreads
        self._lock = threading.Lock()
        self._segmenters: OrderedDict[str, Segmenter] = OrderedDict()
        self._recipes: OrderedDict[str, Recipe] = OrderedDict()
        self._stopped: set[str] = set()
        self._active: Counter[str] = Counter()
        # The plan counts on so many tiles at once, however many threads the worker has.
        self.places = threading.Semaphore(TILES_IN_FLIGHT)

    def recipe(self, key: str, packed: bytes) -> Recipe:
        """The recipe as this process opened it first, so that its files are opened once."""
        with self._lock:
            return _recent(self._recipes, key, lambda: pickle.loads(packed), keep=8)

    def segmenter(self, model: Model, quantised: Quantised | None) -> Segmenter:
        """The network of a model, loaded on first use."""
        key = f"{model.digest} {quantised.sha256 if quantised else 'fp32'}"
        with self._lock:
            return _recent(self._segmenters, key, lambda: load_segmenter(model, self._threads, quantised), keep=2)

    def labeller(self, recipe: Recipe) -> Labeller:
        """What labels the tiles of a recipe here."""
        segmenter = self.segmenter(recipe.model, recipe.quantised)
        return Labeller(recipe.plan, recipe.model.card, recipe.source, recipe.scaling, segmenter)

    @contextlib.contextmanager
    def working(self, key: str) -> Iterator[None]:
        """Says that a batch of this pass is under way."""
        with self._lock:
            self._active[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._active[key] -= 1

    def stopped(self, key: str) -> bool:
        """Whether this pass is to end after the tile under way."""
        return key in self._stopped

    def stop(self, key: str) -> int:
        """End a pass; returns how many of its batches are still under way."""
        with self._lock:
            self._stopped.add(key)
            return self._active[key]


class Workers:
    """A connection to the workers that label tiles: of this process, or of a cluster. A context manager."""

    def __init__(self, url: str | None = None) -> None:
        """`url`: address of a dask scheduler, None for threads of this process. Raises PlanError if none answers."""
        self._cluster: LocalCluster | None = None
        try:
            if url is None:
                self._cluster = LocalCluster(
                    n_workers=1,
                    threads_per_worker=TILES_IN_FLIGHT,
                    processes=False,
                    # Dask always serves its metrics; on loopback only, on any free port, and without its dashboard.
                    dashboard_address="127.0.0.1:0",
                    worker_dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                    memory_limit=0,
                    silence_logs=logging.CRITICAL,
                )
            self.client = Client(self._cluster or url, timeout=15, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise PlanError(
                f"no dask scheduler answers at {url} ({one_line(error)}); start one with `dask scheduler`, or leave "
                f"--cluster out"
            ) from error
        try:
            if url is not None and not self.client.scheduler_info()["workers"]:
                self.client.wait_for_workers(1, timeout=60)
            self.client.register_plugin(Bench(usable_cores() if url is None else None))
        except Exception as error:  # whatever a worker of another make raises
            self.close()
            raise PlanError(
                f"the workers of {url or 'this process'} cannot run segflow ({one_line(error)}); install the same "
                f"version there, and start at least one worker"
            ) from error

    @property
    def threads(self) -> int:
        """Tiles that the workers can have under way at once."""
        return sum(self.client.nthreads().values()) or 1

    def close(self) -> None:
        with contextlib.suppress(Exception):  # it may have lost its scheduler
            self.client.close(timeout=5)
        if self._cluster is not None:
            self._cluster.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def label_tiles(recipe: Recipe, todo: Iterable[Index], workers: Workers) -> Iterator[TileReport]:
    """Label the tiles and store them in the recipe's scratch; reports come as tiles end, in any order.

    A batch that fails is tried again tile by tile, unless its error says that this is of no use. Raises the error of
    a tile that failed for good, after every tile under way has ended.
    """
    key, packed = uuid4().hex, pickle.dumps(recipe)
    rest, size = iter(todo), 1
    again: deque[Index] = deque()
    attempts: Counter[Index] = Counter()
    running: dict[Future, list[Index]] = {}
    ended = as_completed(loop=workers.client.loop)

    def fill() -> None:
        """Submit until enough is under way: what failed before goes first, and alone."""
        while len(running) < most and (batch := [again.popleft()] if again else list(islice(rest, size))):
            future = workers.client.submit(_label_batch, key, packed, batch, pure=False)
            running[future] = batch
            ended.add(future)

    with _connected(workers, key, running):
        most = workers.threads + 1
        fill()
        while running:
            future = next(ended)
            batch = running.pop(future)
            try:
                reports: list[TileReport] = future.result()
            except (Exception, CancelledError) as error:
                for index in batch:
                    attempts[index] += 1
                    _refuse_hopeless(f"tile {index}", attempts[index], error)
                again.extend(batch)
                time.sleep(0.2)
            else:
                seconds = sum(report.seconds for report in reports) / max(1, len(reports))
                size = min(256, max(1, round(BATCH_SECONDS / max(seconds, 1e-6))))
                yield from reports
            fill()


def run_once(recipe: Recipe, workers: Workers, work: Callable[[Labeller], T]) -> T:
    """Run a piece of work on one worker, which has scene and model open as for its tiles.

    It is tried again as tiles are. Raises its error when it failed for good, or ModelError with a lost scheduler.
    """
    key, packed = uuid4().hex, pickle.dumps(recipe)
    running: list[Future] = []
    with _connected(workers, key, running):
        for attempt in range(1, ATTEMPTS + 1):
            running[:] = [workers.client.submit(_work_once, key, packed, work, pure=False)]
            try:
                found: T = running[0].result()
            except (Exception, CancelledError) as error:
                _refuse_hopeless("what is measured on the scene", attempt, error)
                time.sleep(0.2)
            else:
                return found
    raise AssertionError("the last attempt raises")


def _work_once(key: str, packed: bytes, work: Callable[[Labeller], T]) -> T:
    """Runs on a worker."""
    bench: Bench = get_worker().plugins[_PLUGIN]
    with bench.working(key), bench.places:
        return work(bench.labeller(bench.recipe(key, packed)))


@contextlib.contextmanager
def _connected(workers: Workers, key: str, running: Collection[Future]) -> Iterator[None]:
    """While a pass is under way: says so when the scheduler is lost, and stops what still runs when it ends."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SegcoreError) or workers.client.status == "running":
            raise
        raise ModelError(
            "lost the dask scheduler; finished tiles are kept: start it again, or leave --cluster out, and run again",
            retryable=True,
        ) from error
    finally:
        with contextlib.suppress(Exception):  # what went wrong before matters more
            workers.client.cancel(list(running))
            _wait_until_stopped(workers, key)


def _wait_until_stopped(workers: Workers, key: str, timeout: float = 60) -> None:
    """Wait (at most `timeout` seconds) until no worker is inside a tile of this pass.

    A tile cannot be stopped half-way; nobody may remove what it writes to before it ends.
    """
    until = time.monotonic() + timeout
    while time.monotonic() < until and any(workers.client.run(_stop, key).values()):
        time.sleep(0.05)


def _stop(key: str, dask_worker: Worker) -> int:
    """Runs on every worker."""
    return dask_worker.plugins[_PLUGIN].stop(key) if _PLUGIN in dask_worker.plugins else 0


def free_memory() -> int:
    """Bytes that this machine could give without swapping."""
    return int(psutil.virtual_memory().available)


def _label_batch(key: str, packed: bytes, batch: list[Index]) -> list[TileReport]:
    """Runs on a worker."""
    bench: Bench = get_worker().plugins[_PLUGIN]
    reports = []
    with bench.working(key):
        recipe = bench.recipe(key, packed)
        labeller = bench.labeller(recipe)
        for index in batch:
            if bench.stopped(key):
                break
            with bench.places:
                reports.append(_label_one(labeller, index, recipe.scratch))
    return reports


def _label_one(labeller: Labeller, index: Index, scratch: Scratch) -> TileReport:
    tile = labeller.plan.tile(index)
    result = labeller(tile)
    began = time.perf_counter()
    scratch.write(index, tile.core, result.labels, result.scores)
    return TileReport(
        index,
        result.valid,
        result.windows,
        result.read_seconds,
        result.infer_seconds,
        result.label_seconds,
        time.perf_counter() - began,
        labeller.segmenter.engine,
    )


def _refuse_hopeless(what: str, attempts: int, error: BaseException) -> None:
    """Raises when something is not to be tried again."""
    if isinstance(error, SegcoreError) and (not error.retryable or attempts >= ATTEMPTS):
        raise error
    if attempts >= ATTEMPTS:
        raise ModelError(
            f"{what} failed {attempts} times, at last with {type(error).__name__}: {one_line(error)}",
            retryable=isinstance(error, (KilledWorker, CancelledError, OSError, MemoryError)),
        ) from error


def _recent(shelf: OrderedDict[str, T], key: str, make: Callable[[], T], keep: int) -> T:
    """The thing under this key, made if it is not there; only the last `keep` that were asked for stay."""
    if key not in shelf:
        shelf[key] = make()
    shelf.move_to_end(key)
    while len(shelf) > keep:
        shelf.popitem(last=False)
    return shelf[key]
