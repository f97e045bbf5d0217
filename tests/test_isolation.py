"""Tiles that kill, hang or eat their worker: the guilty one is named, and the innocent are labelled."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import dask
import numpy as np
import pytest
from conftest import save_local_unet
from dask.utils import parse_timedelta
from distributed import Nanny

from segcore.box import Box
from segcore.errors import MemoryShortageError, PlanError, PoisonError, SceneError, StoppedError
from segcore.execute import Workers, label_tiles
from segcore.io.memory import ArrayScene
from segcore.io.scratch import Scratch
from segcore.model.card import load_card
from segcore.model.segmenter import BoxFilter, Floats, Segmenter
from segcore.plan import make_plan
from segcore.scaling import fit_scaling
from segcore.worker import Recipe, _Sharing

RNG = np.random.default_rng(5)


class Evil(ArrayScene):
    """A scene with a bad place: pixel (40, 40). What happens there is said by its name, how often by a file."""

    def read(self, box: Box) -> np.ndarray:
        # Statistics take the scene whole; only tiles meet the bad place.
        if box.size < self.grid.size and Box((40, 40), (41, 41)) in box:
            what, _, place = self.name.partition(":")
            left = Path(place)
            if what == "kill" or (what == "kill-once" and not left.exists()):
                left.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "hang":
                time.sleep(600)
            if what == "eat":
                raise MemoryError
        return super().read(box)


def recipe(tmp_path: Path, what: str = "good") -> Recipe:
    scene = Evil(RNG.standard_normal((1, 70, 50)).astype(np.float32), "yx", name=f"{what}:{tmp_path / 'mark'}")
    model = load_card(str(save_local_unet(tmp_path / "unet", "yx")))
    plan = make_plan(scene.grid, scene.grid.shape, model.card.sight(), model.card.cost(), 2**40, core=(16, 16))
    scratch = Scratch.create(tmp_path / uuid4().hex, scene.grid, plan.core, 255, None)
    return Recipe(plan, model, scene, fit_scaling(model.card.scaling, scene), scratch)


@pytest.fixture(scope="module")
def processes() -> Iterator[Workers]:
    with Workers(processes=1) as workers:
        yield workers


def test_a_worker_that_died_once_costs_its_tiles_a_second_try(tmp_path: Path, processes: Workers) -> None:
    made = recipe(tmp_path, "kill-once")
    reports = list(label_tiles(made, made.plan.indices(), processes))
    assert sorted(report.index for report in reports) == sorted(made.plan.indices())
    assert made.scratch.done() == set(made.plan.indices())


def test_poison_is_named_and_the_innocent_are_labelled(tmp_path: Path, processes: Workers) -> None:
    bad, good = recipe(tmp_path, "kill"), recipe(tmp_path)
    labelled: list[int] = []
    beside = threading.Thread(
        target=lambda: labelled.append(len(list(label_tiles(good, good.plan.indices(), processes))))
    )
    beside.start()
    with pytest.raises(PoisonError, match=r"tile \(2, 2\) killed its worker, 2 times with nothing else under way"):
        list(label_tiles(bad, bad.plan.indices(), processes))
    beside.join(120)
    assert labelled == [len(good.plan)]


def test_a_tile_that_hangs_is_ended_with_its_worker(tmp_path: Path, processes: Workers) -> None:
    made = recipe(tmp_path, "hang")
    began = time.monotonic()
    with pytest.raises(PoisonError, match=r"tile \(2, 2\) was not labelled in 5 s, 2 times"):
        list(label_tiles(made, made.plan.indices(), processes, tile_seconds=5))
    assert time.monotonic() - began < 120


def test_a_scene_that_hangs_is_ended(tmp_path: Path, processes: Workers) -> None:
    made = recipe(tmp_path, "hang")
    with pytest.raises(SceneError, match=r"was not labelled in 4 s"):
        list(label_tiles(made, made.plan.indices(), processes, scene_seconds=4))
    good = recipe(tmp_path)  # the worker that hung is not in the way
    assert len(list(label_tiles(good, good.plan.indices(), processes))) == len(good.plan)


def test_a_worker_that_dask_gave_up_on_is_started_anew(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    with Workers(processes=1) as workers:
        cluster = workers.client.cluster
        (nanny,) = cluster.workers.values()
        cluster.sync(nanny.close)
        assert len(list(label_tiles(made, made.plan.indices(), workers))) == len(made.plan)
        (other,) = cluster.workers.values()
        assert other is not nanny
        assert workers.client.run(profiles) == dict.fromkeys(workers.client.nthreads(), False)


def test_workers_that_die_while_they_start_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    start = Nanny.start_unsafe

    async def unlucky(self: Nanny) -> Nanny:
        begun.append(1)
        if len(begun) <= wrong:
            raise OSError("killed")
        return await start(self)

    monkeypatch.setattr(Nanny, "start_unsafe", unlucky)
    wrong = 2
    with Workers(processes=1) as workers:
        assert workers.threads
    begun.clear()
    wrong = 100
    with pytest.raises(PlanError, match=r"no worker process starts on this machine, tried 3 times .*killed"):
        Workers(processes=1)


def test_one_network_at_a_time_holds_memory() -> None:
    """Scenes of different size have plans, and so networks, of their own."""

    class Keeper(BoxFilter):
        holds = False

        def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
            self.holds = True
            return super().__call__(batch, wanted)

        def release(self) -> None:
            self.holds = False

    device, last = threading.Lock(), list[Segmenter]()
    keepers = Keeper(1), Keeper(2)
    one, two = (_Sharing(keeper, device, last) for keeper in keepers)
    for segmenter, expected in ((one, (True, False)), (two, (False, True)), (two, (False, True)), (one, (True, False))):
        segmenter(np.zeros((1, 1, 8, 8), np.float32))
        assert tuple(keeper.holds for keeper in keepers) == expected
    assert one.device is two.device


def test_a_worker_that_takes_long_to_be_back_is_waited_for() -> None:
    with Workers(processes=1):
        assert parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout")) > 3600


def profiles() -> bool:
    return bool(dask.config.get("distributed.worker.profile.enabled"))


def test_out_of_memory_is_told_from_other_faults(tmp_path: Path, workers: Workers) -> None:
    made = recipe(tmp_path, "eat")
    with pytest.raises(MemoryShortageError, match=r"tile \(2, 2\)"):
        list(label_tiles(made, made.plan.indices(), workers))


def test_a_run_that_is_drained_ends_soon(tmp_path: Path) -> None:
    with Workers() as workers:
        made = recipe(tmp_path)
        made = replace(made, plan=replace(made.plan, core=(1, 1)))
        tiles = label_tiles(made, made.plan.indices(), workers)
        next(tiles)
        workers.drain()
        began = time.monotonic()
        with pytest.raises(StoppedError, match="run the same command again"):
            list(tiles)
        assert time.monotonic() - began < 10


def test_no_profiler_looks_at_the_threads_of_a_worker(workers: Workers, processes: Workers) -> None:
    def callbacks(dask_worker: object) -> list[str]:
        return list(dask_worker.periodic_callbacks)  # type: ignore[attr-defined]

    for pool in (workers, processes):
        for names in pool.client.run(callbacks).values():
            assert names
            assert not {"profile", "profile-cycle"} & set(names)
