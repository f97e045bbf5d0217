"""What runs on a worker: open scenes, loaded networks, batches of tiles. Shares dask with `execute` and `cluster`."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pickle
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from distributed import Worker, WorkerPlugin, get_worker

from segcore.box import Box
from segcore.errors import MemoryShortageError, ModelError, SegcoreError
from segcore.io.scratch import Scratch
from segcore.io.source import Source
from segcore.machine import keep_heap_small, release_memory
from segcore.model import load_segmenter
from segcore.model.card import Model
from segcore.model.quantise import Quantised
from segcore.model.segmenter import Floats, Segmenter
from segcore.plan import TILES_IN_FLIGHT, Index, Plan
from segcore.scaling import Scaling
from segcore.spec import Engine, Precision
from segcore.tile import Labeller

PLUGIN = "segflow"

_LOG = logging.getLogger(__name__)
#: Pixels after which memory that was freed is given back: some eight large tiles.
_TIDY = 2**25

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a worker has to know to label tiles of one scene.

    `quantised`: the network in int8 that is run; `engine`: what else runs it, in this `precision`.
    """

    plan: Plan
    model: Model
    source: Source
    scaling: Scaling
    scratch: Scratch
    quantised: Quantised | None = None
    engine: Engine = "auto"
    precision: Precision = "fp32"


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


class _Once(Generic[T]):
    """A value that is made by whoever asks first, while others wait for it and for nothing else."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: list[T] = []

    def value(self) -> T:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


class _Sharing:
    """A network that shares the device with the others of a process, and the memory that is planned for one of them.

    Whichever was run before (`last`) gives back what it keeps.
    """

    def __init__(self, segmenter: Segmenter, device: threading.Lock, last: list[Segmenter]) -> None:
        self.device, self.engine, self.batch = device, segmenter.engine, segmenter.batch
        self._segmenter, self._last = segmenter, last

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        if self._last != [self._segmenter]:
            _give_back(self._last)
            self._last.append(self._segmenter)
        return self._segmenter(batch, wanted)

    def release(self) -> None:
        self._segmenter.release()


def _give_back(last: list[Segmenter]) -> None:
    """Have the network that was run last, if any, give back what it keeps."""
    while last:
        last.pop().release()
    release_memory()


class Bench(WorkerPlugin):  # type: ignore[misc]
    """What a worker process keeps between tiles: open scenes and loaded networks, a few of each.

    `engine_threads`: CPU threads of the engine, None for as many as the worker has. `own_process`: whether a tile that
    is late may end the process.
    """

    name = PLUGIN

    def __init__(self, engine_threads: int | None, own_process: bool) -> None:
        self._engine_threads, self._own_process = engine_threads, own_process

    def setup(self, worker: Worker) -> None:
        # Dask looks at all threads a hundred times a second to draw where time goes. In CPython 3.11 a garbage
        # collection in the middle of that look waits, with the GIL, for a lock that is held: the process stands still.
        for name in ("profile", "profile-cycle"):
            if callback := worker.periodic_callbacks.pop(name, None):
                callback.stop()
        self._threads = self._engine_threads or worker.state.nthreads
        self._lock = threading.Lock()
        self._segmenters: OrderedDict[str, _Once[Segmenter]] = OrderedDict()
        self._recipes: OrderedDict[str, _Once[Recipe]] = OrderedDict()
        self._stopped: set[str] = set()
        self._active: Counter[str] = Counter()
        self._deadlines: dict[int, float] = {}
        self._labelled = 0
        self._thrifty = False
        # Scenes of different size have plans, and networks, of their own.
        self._device, self._last = threading.Lock(), list[Segmenter]()
        self._nowhere = Path(os.devnull).open("w")  # noqa: SIM115 (as long as the process)
        # The plan counts on so many tiles at once, however many threads the worker has.
        self.places = threading.Semaphore(TILES_IN_FLIGHT)

    def teardown(self, worker: Worker) -> None:
        self._nowhere.close()

    def recipe(self, key: str, packed: bytes) -> Recipe:
        """The recipe as this process opened it first, so that its files are opened once."""
        with self._lock:
            shelved = _recent(self._recipes, key, lambda: _Once(lambda: _open(packed)), keep=8)
        return shelved.value()

    def segmenter(self, recipe: Recipe) -> Segmenter:
        """The network of a recipe, loaded on first use."""
        how = recipe.quantised.sha256 if recipe.quantised else (recipe.plan.staging, recipe.engine, recipe.precision)
        key = f"{recipe.model.digest} {how}"

        def load() -> Segmenter:
            with self._device:  # loading takes memory, too
                _give_back(self._last)
                return _Sharing(_load(recipe, self._threads), self._device, self._last)

        with self._lock:
            shelved = _recent(self._segmenters, key, lambda: _Once(load), keep=2)
        return shelved.value()

    def labeller(self, recipe: Recipe) -> Labeller:
        """What labels the tiles of a recipe here."""
        segmenter = self.segmenter(recipe)
        self._thrifty = self._thrifty or recipe.plan.thrifty
        return Labeller(recipe.plan, recipe.model.card, recipe.source, recipe.scaling, segmenter)

    def tidy(self, pixels: int) -> None:
        """Now and then, as pixels are labelled, give back what the heap keeps: over many tiles it would grow."""
        with self._lock:
            self._labelled += pixels
            due, self._labelled = divmod(self._labelled, _TIDY)
        if due:
            release_memory()

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

    @contextlib.contextmanager
    def in_time(self, seconds: float | None) -> Iterator[None]:
        """End this process if what follows takes longer: what hangs in a library hears of nothing else."""
        if seconds is None or not self._own_process:
            yield
            return
        thread = threading.get_ident()
        with self._lock:
            self._deadlines[thread] = time.monotonic() + seconds
            self._set_alarm()
        try:
            yield
        finally:
            with self._lock:
                del self._deadlines[thread]
                self._set_alarm()

    def _set_alarm(self) -> None:
        """The alarm is a thread of C: it rings although a library holds the GIL."""
        faulthandler.cancel_dump_traceback_later()
        if self._deadlines:
            left = min(self._deadlines.values()) - time.monotonic()
            faulthandler.dump_traceback_later(max(0.01, left), exit=True, file=self._nowhere)

    def stopped(self, key: str) -> bool:
        """Whether this pass is to end after the tile under way."""
        return key in self._stopped

    def stop(self, key: str) -> int:
        """End a pass; returns how many of its batches are still under way.

        Where memory is tight, and no other pass is under way, the network gives back what it keeps: products are
        written next, and often by this process.
        """
        with self._lock:
            self._stopped.add(key)
            self._recipes.pop(key, None)
            active, busy = self._active[key], any(self._active.values())
        if self._thrifty and not busy and self._device.acquire(blocking=False):
            try:
                with contextlib.suppress(ModelError):  # which is told where the network is run next
                    _give_back(self._last)
            finally:
                self._device.release()
        return active


def _open(packed: bytes) -> Recipe:
    recipe: Recipe = pickle.loads(packed)
    if recipe.plan.thrifty:
        keep_heap_small()
    return recipe


def _load(recipe: Recipe, threads: int) -> Segmenter:
    model, staging = recipe.model, recipe.plan.staging
    segmenter = load_segmenter(model, threads, staging, recipe.quantised, recipe.engine, recipe.precision)
    _LOG.info("%s %s runs in %s", model.card.name, model.card.version, segmenter.engine)
    return segmenter


@contextlib.contextmanager
def _sentence_only() -> Iterator[None]:
    """Our errors travel without what caused them: some of GDAL's cannot be unpickled, and would take all with them."""
    try:
        yield
    except SegcoreError as error:
        error.__cause__ = error.__context__ = None
        raise


def label_batch(key: str, packed: bytes, batch: list[Index], tile_seconds: float | None) -> list[TileReport]:
    """Label tiles of the pass `key`, whose recipe is `packed`. Raises SegcoreError."""
    bench: Bench = get_worker().plugins[PLUGIN]
    reports: list[TileReport] = []
    with bench.working(key), _sentence_only():
        if bench.stopped(key):
            return reports
        recipe = bench.recipe(key, packed)
        labeller = bench.labeller(recipe)
        for index in batch:
            if bench.stopped(key):
                break
            with bench.places, bench.in_time(tile_seconds):
                reports.append(_label_one(labeller, index, recipe.scratch))
            bench.tidy(reports[-1].valid)
    return reports


def work_once(key: str, packed: bytes, work: Callable[[Labeller], T]) -> T:
    """Do a piece of work with scene and model open as for tiles."""
    bench: Bench = get_worker().plugins[PLUGIN]
    with bench.working(key), _sentence_only(), bench.places:
        return work(bench.labeller(bench.recipe(key, packed)))


def stop_pass(key: str, dask_worker: Worker) -> int:
    """End a pass on this worker; returns how many of its batches are still under way."""
    return dask_worker.plugins[PLUGIN].stop(key) if PLUGIN in dask_worker.plugins else 0


def _label_one(labeller: Labeller, index: Index, scratch: Scratch) -> TileReport:
    tile = labeller.plan.tile(index)
    try:
        result = labeller(tile)
    except MemoryError as error:
        raise MemoryShortageError(
            f"tile {index} with a core of {tile.core.shape} pixels does not fit in memory"
        ) from error
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


def _recent(shelf: OrderedDict[str, T], key: str, make: Callable[[], T], keep: int) -> T:
    """The thing under this key, made if it is not there; only the last `keep` that were asked for stay."""
    if key not in shelf:
        shelf[key] = make()
    shelf.move_to_end(key)
    while len(shelf) > keep:
        shelf.popitem(last=False)
    return shelf[key]
