"""Tiles on dask: bounded, retried, counted; on this process and on a cluster of others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import psutil
import pytest
import rasterio
from conftest import save_local_unet
from distributed import Scheduler
from rasterio._err import CPLE_BaseError
from rasterio.transform import from_origin

from segcore.box import Box
from segcore.cluster import ClusterFile
from segcore.crew import Crew
from segcore.errors import ModelError, PlanError, SceneError, StoppedError
from segcore.execute import ATTEMPTS, Workers, label_tiles
from segcore.io.memory import ArrayScene
from segcore.io.scratch import Scratch
from segcore.model.card import load_card
from segcore.plan import make_plan
from segcore.scaling import fit_scaling
from segcore.spec import Job
from segcore.worker import Recipe

RNG = np.random.default_rng(2)


class Flaky(ArrayScene):
    """A scene that fails to read one place, `left` times: a scene is pickled, so the count is kept by its class."""

    left = 0
    error: Exception = OSError("the share was away")

    def read(self, box: Box) -> np.ndarray:
        # Statistics take the scene whole; only tiles meet the bad place.
        if box.size < self.grid.size and box.start[0] <= 40 < box.stop[0] and Flaky.left > 0:
            Flaky.left -= 1
            raise Flaky.error
        return super().read(box)


def recipe(tmp_path: Path, scene: ArrayScene, core: int = 16) -> Recipe:
    model = load_card(str(save_local_unet(tmp_path / "unet", "yx")))
    plan = make_plan(scene.grid, scene.grid.shape, model.card.sight(), model.card.cost(), 2**40, core=(core, core))
    scratch = Scratch.create(tmp_path / uuid4().hex, scene.grid, plan.core, 255, None)
    return Recipe(plan, model, scene, fit_scaling(model.card.scaling, scene), scratch)


def scene(kind: type[ArrayScene] = ArrayScene) -> ArrayScene:
    return kind(RNG.standard_normal((1, 70, 50)).astype(np.float32), "yx")


def executing(dask_worker: object) -> int:
    return dask_worker.state.executing_count  # type: ignore[attr-defined, no-any-return]


def test_every_tile_is_labelled_once_and_stored(tmp_path: Path, workers: Workers) -> None:
    made = recipe(tmp_path, scene())
    reports = list(label_tiles(made, made.plan.indices(), workers))
    assert sorted(report.index for report in reports) == sorted(made.plan.indices())
    assert made.scratch.done() == set(made.plan.indices())
    assert all(report.windows == 1 and report.valid > 0 for report in reports)
    assert "openvino" in reports[0].engine


def test_few_tiles_are_under_way_at_once(tmp_path: Path, workers: Workers) -> None:
    made, taken = recipe(tmp_path, scene(), core=2), []

    def counted() -> Iterator[tuple[int, ...]]:
        for index in made.plan.indices():
            taken.append(index)
            yield index

    tiles = label_tiles(made, counted(), workers)
    next(tiles)
    assert len(made.plan) == 875
    assert len(taken) < 700  # the first batches hold one tile, then what half a second is worth
    tiles.close()
    assert not any(workers.client.run(executing).values())


def test_tiles_that_fail_for_a_while_are_tried_again(tmp_path: Path, workers: Workers) -> None:
    flaky = scene(Flaky)
    made = recipe(tmp_path, flaky)
    Flaky.left, Flaky.error = ATTEMPTS - 1, OSError("the share was away")
    reports = list(label_tiles(made, made.plan.indices(), workers))
    assert len(reports) == len(made.plan)
    assert Flaky.left == 0


def test_tiles_that_keep_failing_are_named(tmp_path: Path, workers: Workers) -> None:
    flaky = scene(Flaky)
    made = recipe(tmp_path, flaky)
    Flaky.left, Flaky.error = 10**6, OSError("the share was away")
    with pytest.raises(
        ModelError, match=r"tile \([12], \d\) failed 3 times, at last with OSError: the share was away"
    ) as e:
        list(label_tiles(made, made.plan.indices(), workers))
    assert e.value.retryable


def test_errors_that_retrying_cannot_mend_end_the_scene_at_once(tmp_path: Path, workers: Workers) -> None:
    flaky = scene(Flaky)
    made = recipe(tmp_path, flaky)
    Flaky.left, Flaky.error = 10**6, SceneError("the file is truncated")
    Flaky.error.__cause__ = CPLE_BaseError(1, 1, "cannot be unpickled")  # as GDAL's own are
    with pytest.raises(SceneError, match="truncated"):
        list(label_tiles(made, made.plan.indices(), workers))
    assert 10**6 - Flaky.left <= workers.threads + 1
    assert not any(workers.client.run(executing).values())


def test_nothing_listens_beyond_this_machine(workers: Workers) -> None:
    listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    assert set(listening) <= {"127.0.0.1", "::1"}


def test_a_clock_that_is_set_loses_no_worker_of_this_process(workers: Workers) -> None:
    """Dask gives up a worker whose heart did not beat for five minutes, by the clock on the wall."""

    async def five_minutes_later(dask_scheduler: Scheduler) -> None:
        for worker in dask_scheduler.workers.values():
            worker.last_seen -= 400
        if "worker-ttl" in dask_scheduler.periodic_callbacks:
            await dask_scheduler.check_worker_ttl()

    workers.client.run_on_scheduler(five_minutes_later)
    assert not workers.lost


def test_no_scheduler_is_said_in_a_line() -> None:
    with pytest.raises(PlanError, match="dask scheduler"):
        Workers("tcp://127.0.0.1:9")


@pytest.fixture
def cluster() -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """A scheduler and two worker processes on loopback."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    start = lambda *words: subprocess.Popen(  # noqa: E731
        [sys.executable, "-m", "distributed.cli." + words[0], *words[1:]], stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    processes = [start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")]
    assert processes[0].stderr is not None
    for line in processes[0].stderr:
        if found := re.search(r"Scheduler at:\s+(tcp://\S+)", line):
            break
    address = found.group(1)
    processes += [
        start("dask_worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny", "--memory-limit", "0")
        for _ in range(2)
    ]
    yield address, processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_cluster_survives_the_death_of_a_worker(
    tmp_path: Path, workers: Workers, cluster: tuple[str, list[subprocess.Popen[str]]]
) -> None:
    address, processes = cluster
    here = recipe(tmp_path, scene())
    list(label_tiles(here, here.plan.indices(), workers))
    there = Recipe(here.plan, here.model, here.source, here.scaling,
                   Scratch.create(tmp_path / "there", here.source.grid, here.plan.core, 255, None))  # fmt: skip
    with Workers(address) as remote:
        remote.client.wait_for_workers(2, timeout=60)
        assert remote.threads == 2
        tiles = label_tiles(there, there.plan.indices(), remote)
        reports = [next(tiles)]
        processes[1].send_signal(signal.SIGKILL)
        reports += list(tiles)
    assert there.scratch.done() == set(there.plan.indices())
    assert {report.index for report in reports} == set(there.plan.indices())
    whole = here.source.grid.box
    assert np.array_equal(here.scratch.read(whole), there.scratch.read(whole))


@pytest.mark.slow
def test_a_lost_scheduler_is_said_and_tiles_are_kept(
    tmp_path: Path, cluster: tuple[str, list[subprocess.Popen[str]]]
) -> None:
    address, processes = cluster
    first, second = recipe(tmp_path, scene(), core=4), recipe(tmp_path, scene())
    with Workers(address) as remote:
        tiles = label_tiles(first, first.plan.indices(), remote)
        next(tiles)
        processes[0].kill()
        with pytest.raises(ModelError, match="lost the dask scheduler") as error:
            list(tiles)
        assert error.value.retryable
        with pytest.raises(ModelError, match="lost the dask scheduler"):
            list(label_tiles(second, second.plan.indices(), remote))
    assert first.scratch.done()


@pytest.mark.parametrize("address", ["somewhere", "tcp://somewhere", "http://somewhere:80"])
def test_what_is_no_address_is_said_at_once(address: str) -> None:
    with pytest.raises(PlanError, match=f"no dask scheduler answers at {address}"):
        Workers(address)


@pytest.mark.parametrize(("text", "said"), [
    ("", "it needs `kind`"),
    ("kind: [a]\nworkers: 1", r"kind \['a'\] must be one of local"),
    ("kind: local\nworkers: [", "is no YAML in line 2"),
    ("kind: local\nworkers: two", "must be whole numbers"),
    ("kind: local\nworkers: 1\noptions: {n_workers: 0}", "say it as `workers`"),
    ("kind: local\nworkers: 1\nworker: 2", "unknown keys worker"),
])  # fmt: skip
def test_a_cluster_file_that_is_wrong_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(PlanError, match=rf"cluster\.yaml.*{said}"):
        ClusterFile.read(str(tmp_path / "cluster.yaml"))


def test_an_option_that_a_worker_does_not_know_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("kind: local\nworkers: 1\noptions: {nix: 3}")
    with pytest.raises(PlanError, match="nix"):
        ClusterFile.read(str(tmp_path / "cluster.yaml")).start()


@pytest.mark.slow
def test_a_run_whose_scheduler_is_gone_stops_before_every_scene_has_failed(
    tmp_path: Path, cluster: tuple[str, list[subprocess.Popen[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, processes = cluster
    monkeypatch.setattr("segcore.execute._ANSWER", 0.5)
    model = str(save_local_unet(tmp_path / "unet", "yx"))
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", count=1, height=60, width=50, dtype="float32",
                       crs="EPSG:32616", transform=from_origin(452475, 3408645, 30, 30)) as file:  # fmt: skip
        file.write(RNG.random((1, 60, 50)).astype(np.float32))
    job = Job("a", str(tmp_path / "a.tif"), model, str(tmp_path / "out"))
    with Crew(address) as crew:
        processes[0].kill()
        processes[0].wait()
        for _ in range(ATTEMPTS - 1):
            with pytest.raises(ModelError, match="lost the dask scheduler"):
                crew.label(job, lambda *_: None)
        with pytest.raises(StoppedError, match="no workers are left: no dask scheduler answers at"):
            crew.label(job, lambda *_: None)
        with pytest.raises(StoppedError):
            crew.label(job, lambda *_: None)
