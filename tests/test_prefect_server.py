"""A real Prefect server and worker on loopback, with the deployments of `deploy/prefect.yaml`.

A run comes by itself and shows its artifacts; another is cancelled, and goes on. The server keeps its data in SQLite,
or in an empty database that is named: `SEGFLOW_TEST_DATABASE=postgresql+asyncpg://user:password@127.0.0.1/prefect`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from conftest import save_local_unet
from rasterio.transform import from_origin

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def write(path: Path, side: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", count=1, height=side, width=side, dtype="float32",
                       crs="EPSG:32616", transform=from_origin(452475, 3408645, 30, 30)) as file:  # fmt: skip
        file.write(np.random.default_rng(side).random((1, side, side)).astype(np.float32))
    return path


class Server:
    """A server and a worker, ended with the context; `api` asks the server."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}/api", folder / "log.txt"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PYTHONPATH": str(ROOT),
        }
        if database := os.environ.get("SEGFLOW_TEST_DATABASE"):
            self.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> None:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *command], env=self.environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)

    def do(self, *command: str, **options: Any) -> str:
        ended = subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", *command], env=self.environment,
                               capture_output=True, text=True, timeout=180, check=False, **options)  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def wait(self, what: Callable[[], Any], seconds: float = 240) -> Any:
        until = time.monotonic() + seconds
        while True:
            try:
                if found := what():
                    return found
            except OSError:
                pass
            assert time.monotonic() < until, self.log.read_text()[-6000:]
            time.sleep(0.5)

    def close(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    try:
        running.start("server", "start", "--host", "127.0.0.1", "--port", str(running.port))
        running.wait(lambda: running.api("/health"))
        yield running
    finally:
        running.close()


def test_a_scheduled_run_comes_by_itself_and_another_is_cancelled_and_goes_on(server: Server, tmp_path: Path) -> None:
    model = save_local_unet(tmp_path / "unet", "yx", width=16, poolings=2)
    scene, large, out = write(tmp_path / "in" / "a.tif", 60), write(tmp_path / "large.tif", 2400), tmp_path / "out"
    described = yaml.safe_load((ROOT / "deploy" / "prefect.yaml").read_text())
    described["pull"][0]["prefect.deployments.steps.set_working_directory"]["directory"] = str(ROOT)
    wanted = [d for d in described["deployments"] if d["name"] in ("nightly", "on-demand")]
    for deployment in wanted:
        deployment["parameters"] |= {"model": str(model), "out": str(out), "memory": "2GiB"}
        deployment["entrypoint"] = str(ROOT / "flows" / "segment.py") + ":segment"
    nightly = next(d for d in wanted if d["name"] == "nightly")
    nightly["parameters"]["scenes"] = [str(scene.parent)]
    nightly["schedules"] = [{"interval": 20, "active": True}]  # who tests cannot wait for the night
    described = {key: described[key] for key in ("name", "pull")} | {"deployments": wanted}
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(described))
    server.do("work-pool", "create", "segflow", "--type", "process")
    server.do("deploy", "--prefect-file", str(tmp_path / "prefect.yaml"), "--all", cwd=ROOT)
    server.start("worker", "start", "--pool", "segflow", "--name", "here")

    def runs(deployment: str, *states: str) -> list[dict[str, Any]]:
        wanted = {"deployments": {"name": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": states}}}}
        found: list[dict[str, Any]] = server.api("/flow_runs/filter", wanted)
        return found

    # A scheduled run comes by itself, and shows what it did.
    done = server.wait(lambda: runs("nightly", "COMPLETED", "FAILED", "CRASHED"))[0]
    assert done["state_type"] == "COMPLETED", done["state"]
    assert done["auto_scheduled"]
    assert "segflow-host:" + socket.gethostname() in done["tags"]
    assert (out / "a" / "a.json").is_file()
    keys = {artifact["key"] for artifact in server.api("/artifacts/filter", {})}
    assert {"segflow-run", "quicklook-a", "product-a"} <= keys
    paused = server.api("/deployments/name/segflow/nightly")["id"]
    request = urllib.request.Request(f"{server.url}/deployments/{paused}/pause_deployment", b"", method="POST")
    urllib.request.urlopen(request, timeout=30).close()

    # One that is cancelled stops its tiles, and leaves what it has finished.
    on_demand = server.api("/deployments/name/segflow/on-demand")["id"]
    given = {"parameters": {"scenes": [str(large)], "tile": 32}, "state": {"type": "SCHEDULED"}}
    run_id = server.api(f"/deployments/{on_demand}/create_flow_run", given)["id"]

    def tiles() -> int:
        return len(list((out / ".segflow" / "large").glob("*/labels/c/*/*")))

    server.wait(lambda: tiles() > 50)
    # What `prefect flow-run cancel` asks for, without its start, which takes seconds: a quick machine was done by then.
    server.api(f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
    server.wait(lambda: server.api(f"/flow_runs/{run_id}")["state_type"] in ("CANCELLED", "CRASHED"))
    assert not (out / "large").exists()
    kept = tiles()
    time.sleep(2)
    assert tiles() == kept < 75 * 75

    # And the same run again goes on with that.
    run_id = server.api(f"/deployments/{on_demand}/create_flow_run", given)["id"]
    server.wait(lambda: server.api(f"/flow_runs/{run_id}")["state_type"] in ("COMPLETED", "FAILED", "CRASHED"))
    manifest = json.loads((out / "large" / "large.json").read_text())
    assert manifest["properties"]["segflow:tiles"]["kept_of_an_interrupted_run"] == kept
