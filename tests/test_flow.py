"""The Prefect flow on a real embedded server: runs, retries, artifacts, schedules; no network, no telemetry."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import rasterio
from conftest import save_local_unet
from rasterio.transform import from_origin

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


def write(path: Path, seed: int, count: int = 1) -> Path:
    with rasterio.open(path, "w", driver="GTiff", count=count, height=60, width=50, dtype="float32",
                       crs="EPSG:32616", transform=from_origin(452475, 3408645, 30, 30)) as file:  # fmt: skip
        file.write(np.random.default_rng(seed).random((count, 60, 50)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all tests of this file: making it takes longer than using it."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def run_script(prefect_home: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a script in a process of its own with Prefect's embedded server; it prints one JSON object last."""

    def run(script: str, *arguments: object, **environment: str) -> dict[str, Any]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        # As `flows` has it, for scripts that import it after Prefect.
        clean["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "180"
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
            env=clean | {"PREFECT_HOME": str(prefect_home)} | environment,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-4000:]
        assert "elemetry" not in ended.stderr
        document: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
        return document

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_local_unet(tmp_path / "unet", "yx")


def test_a_flow_labels_scenes_and_says_what_it_did(
    tmp_path: Path, model: Path, run_script: Callable[..., dict[str, Any]]
) -> None:
    write(tmp_path / "a.tif", 1)
    write(tmp_path / "b.tif", 2, count=3)
    write(tmp_path / "c.tif", 3)
    told = run_script(
        """
        import json, sys
        from flows.segment import segment
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.sorting import ArtifactSort
        folder, model = sys.argv[1:]
        scenes = [f"{folder}/{name}.tif" for name in "abc"]
        state = segment(scenes, model, f"{folder}/out", return_state=True)
        again = segment(scenes[:1], model, f"{folder}/out", return_state=True)
        with get_client(sync_client=True) as client:
            tables = client.read_artifacts(sort=ArtifactSort.CREATED_DESC)
            runs = client.read_task_runs()
            flow_runs = client.read_flow_runs()
        import socket
        assert all({f"segflow-host:{socket.gethostname()}"} < set(run.tags) for run in flow_runs), flow_runs
        print(json.dumps({
            "state": [state.type.value, state.message], "again": [again.type.value, again.message],
            "tables": [json.loads(a.data) for a in tables if a.key == "segflow-run"],
            "shown": sorted({a.key for a in tables if a.key}),
            "tasks": sorted((r.name, r.state_name, r.run_count) for r in runs),
        }))
        """,
        tmp_path, model,
    )  # fmt: skip
    assert told["state"][0] == "FAILED"
    assert told["state"][1].startswith("1 of 3 scenes failed")
    assert told["again"] == ["COMPLETED", "1 up to date"]
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made >= {"a", "c", "run.json", "events.jsonl", "failures.csv", "report.html", "metrics.prom"}
    # A scene that cannot succeed is not tried again: every task ran once.
    assert [tuple(task) for task in told["tasks"]] == [
        ("a", "Completed", 1), ("a", "Completed", 1), ("b", "Failed", 1), ("c", "Completed", 1)
    ]  # fmt: skip
    assert told["shown"] == ["product-a", "product-c", "quicklook-a", "quicklook-c", "segflow-run"]
    rows = [{row["scene"]: row["state"] for row in table} for table in told["tables"]]
    assert rows == [{"a": "up to date"}, {"a": "done", "b": "failed", "c": "done"}]


def test_a_task_is_tried_again_only_where_that_may_help(
    tmp_path: Path, run_script: Callable[..., dict[str, Any]]
) -> None:
    told = run_script(
        """
        import json
        from prefect import flow
        from prefect.utilities.annotations import quote
        from flows import segment as module
        from segcore.errors import InUseError, SceneError, StoppedError
        calls = []
        class Crew:
            def label(self, job, progress):
                calls.append(job.uri)
                raise {"held": InUseError, "stopped": StoppedError}.get(job.uri, SceneError)(
                    "no", retryable=job.uri != "broken"
                )
        task = module.label_scene.with_options(retry_delay_seconds=0)
        job = {"name": "n", "model": "m", "out": "o", "settings": {"bands": None}, "alone": True}
        @flow
        def both():
            for uri in ("away", "broken", "held", "stopped"):
                task(uri, {**job, "uri": uri}, quote(Crew()), None, return_state=True)
            return True
        both()
        print(json.dumps({"calls": calls}))
        """
    )
    assert told["calls"] == ["away", "away", "away", "broken", "held", "stopped"]


def test_the_command_runs_the_flow_and_the_engine_alike(
    tmp_path: Path, model: Path, prefect_home: Path, run_segflow: Run
) -> None:
    scene = write(tmp_path / "a.tif", 1)
    flow = run_segflow("run", scene, "-m", model, "-o", tmp_path / "flow", "--prefect", "--scores",
                       env={"PREFECT_HOME": str(prefect_home)})  # fmt: skip
    engine = run_segflow("run", scene, "-m", model, "-o", tmp_path / "engine", "--scores")
    assert (flow.returncode, engine.returncode) == (0, 0), flow.stderr + engine.stderr
    for name in ("a_mask.tif", "a_scores.tif", "a_quicklook.png"):
        assert (tmp_path / "flow" / "a" / name).read_bytes() == (tmp_path / "engine" / "a" / name).read_bytes()
    broken = run_segflow("run", scene, "-m", model, "-o", tmp_path / "flow", "--prefect", "--cluster",
                         "tcp://127.0.0.1:9", env={"PREFECT_HOME": str(prefect_home)})  # fmt: skip
    assert broken.returncode == 2, "what an older run.json says is not what this run did"
    assert "no dask scheduler answers" in broken.stderr
    assert "Traceback" not in broken.stderr
    bad = run_segflow("run", write(tmp_path / "b.tif", 1, count=2), "-m", model, "-o", tmp_path / "flow", "--prefect",
                      env={"PREFECT_HOME": str(prefect_home)})  # fmt: skip
    assert bad.returncode == 1
    assert "lacks value" in bad.stderr
    assert "Traceback" not in bad.stderr


@pytest.fixture(autouse=True)
def _no_server_left(prefect_home: Path) -> Iterator[None]:
    yield
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "prefect.server.api.server:create_app" in process.cmdline():
                left.append(process.environ().get("PREFECT_HOME"))
    assert str(prefect_home) not in left, "an embedded server was left running"
