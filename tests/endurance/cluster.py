"""A dask cluster of this machine whose parts are killed, one after the other."""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from endurance import material
from endurance.findings import Findings
from endurance.process import SEGFLOW, Running, run, running

_SCENES, _SIDE, _TILE, _WORKERS, _THREADS = 4, 600, 24, 3, 2
#: What a batch of tiles is worth (seconds), and how far its size may be from that.
_BATCH, _SLACK = 0.5, 3


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


@dataclass(slots=True)
class Cluster:
    """A scheduler and workers, each a process that can be killed and started again."""

    place: Path
    port: int
    parts: dict[str, Running] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)
    starts: int = 0

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start what is not there."""
        dask = Path(sys.executable).with_name("dask")
        if "scheduler" not in self.parts:
            self._add("scheduler", [dask, "scheduler", "--host", "127.0.0.1", "--port", self.port, "--no-dashboard",
                                    "--dashboard-address", "127.0.0.1:0"])  # fmt: skip
        for i in range(_WORKERS):
            if f"worker{i}" not in self.parts:
                self._add(f"worker{i}", [dask, "worker", self.address, "--no-nanny", "--nthreads", _THREADS, "--host",
                                         "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0",
                                         "--memory-limit", 0, "--local-directory", self.place / "dask"])  # fmt: skip

    def _add(self, name: str, command: list[object]) -> None:
        self.starts += 1
        self.parts[name] = self.stack.enter_context(running(command, self.place / f"{name}-{self.starts}"))

    def kill(self, name: str) -> None:
        self.parts.pop(name).kill()

    def kill_all(self) -> None:
        for name in list(self.parts):
            self.kill(name)


@contextmanager
def started(place: Path) -> Iterator[Cluster]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = Cluster(place, port)
    with cluster.stack:
        cluster.start()
        yield cluster


class Watch:
    """Counts how often every tile of scratch is written: a tile that is written again is another file (inode, time)."""

    def __init__(self, out: Path) -> None:
        self.versions: dict[str, set[tuple[int, int]]] = {}
        self._out, self._over = out, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.1):
            for files in material.tiles(self._out).values():
                for path in files:
                    try:
                        status = path.stat()
                    except FileNotFoundError:
                        continue
                    self.versions.setdefault(str(path), set()).add((status.st_ino, status.st_mtime_ns))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    @property
    def twice(self) -> int:
        """Tiles beyond the first time."""
        return sum(len(versions) - 1 for versions in self.versions.values())


def trial(options: argparse.Namespace, place: Path, found: Findings) -> None:
    """A scheduler and three workers; a worker, the driver and the scheduler are killed in the middle: the same bytes.

    Tiles labelled twice are counted by their files in scratch, looked at ten times a second. At most the tiles may be
    that were under way: one batch of some half second for every thread of the cluster, and one more.
    """
    model = material.model(place / "unet", width=8, poolings=2)
    for i in range(_SCENES):
        material.write(place / f"scenes/s{i}.tif", material.cut(i, _SIDE))
    total = _SCENES * (-(-_SIDE // _TILE)) ** 2
    with started(place) as cluster:

        def command(out: Path) -> list[object]:
            return [*SEGFLOW, "run", place / "scenes", "-m", model, "-o", out, "--no-prefect", "--json", "--scores",
                    "--memory", "1GiB", "--tile", _TILE, "--cluster", cluster.address]  # fmt: skip

        with Watch(place / "whole") as watch:
            ended = run(command(place / "whole"), place / "whole-log")
        found.expect(ended.process.returncode == 0, f"undisturbed: {ended.process.returncode} {ended.said}")
        whole = material.products(place / "whole")
        most = _under_way(place / "whole")
        found.note("undisturbed", f"{ended.summary.get('counts')} in {ended.summary.get('seconds')} s, {total} tiles")
        found.note("tiles under way at most", most)
        found.expect(watch.twice == 0, f"undisturbed: {watch.twice} tiles were labelled twice")

        def disturbed(name: str, strike: Callable[[Running], None], *codes: int) -> None:
            """Strike when a third of the tiles is there; then let it end, or run it again."""
            out = place / name
            with Watch(out) as watch, running(command(out), place / f"{name}-log") as process:
                if not _wait_for(out, total // 3, process):
                    found.expect(False, f"{name}: ended before a third was labelled: {process.said}")
                    return
                strike(process)
                ended = process.wait(240)
                kept = sum(len(files) for files in material.tiles(out).values())
                done = len(material.manifests(out))
                found.expect(ended is not None, f"{name}: the driver did not end in 240 s: {process.said[-1000:]}")
                found.expect(not codes or ended in codes, f"{name}: exit code {ended} and not {codes}: {process.said}")
                found.note(f"{name}: exit code", f"{ended}; {_told(process)}")
                process.kill()
                if "scheduler" not in cluster.parts:  # workers end, too, when theirs is away
                    cluster.kill_all()
                cluster.start()
                again = run(command(out), place / f"{name}-again")
            found.expect(again.process.returncode == 0, f"{name}: again {again.process.returncode} {again.said}")
            found.expect(material.products(out) == whole, f"{name}: products differ from the undisturbed ones")
            found.expect(not (left := material.strays(out)), f"{name}: left behind {left}")
            resumed = sum(s["details"].get("tiles_kept", 0) for s in again.summary.get("scenes", []))
            # Workers that have lost their driver, and not their lives, still store the batches that they are in.
            found.expect(
                done == _SCENES or kept <= resumed <= kept + most,
                f"{name}: {kept} tiles were there, {resumed} were kept",
            )
            found.note(
                f"{name}: labelled twice",
                f"{watch.twice} of {total}; {done} products were there, {resumed} tiles were kept",
            )
            found.expect(watch.twice <= most, f"{name}: {watch.twice} tiles labelled twice, and {most} were under way")

        def worker(_: Running) -> None:
            cluster.kill("worker1")
            time.sleep(1)
            cluster.start()

        disturbed("worker", worker, 0)
        disturbed("driver", lambda process: process.kill(), -9)
        # 75 where none comes back while there are scenes that were not begun.
        disturbed("scheduler", lambda _: cluster.kill("scheduler"), 1, 75)

        def everything(process: Running) -> None:
            cluster.kill_all()
            process.kill()

        disturbed("everything", everything, -9)


def _wait_for(out: Path, count: int, process: Running) -> bool:
    """Wait until so many tiles are in scratch."""
    until = time.monotonic() + 300
    while sum(len(files) for files in material.tiles(out).values()) < count:
        if process.wait(0.02) is not None or time.monotonic() > until:
            return False
    return True


def _under_way(out: Path) -> int:
    """Tiles that may be under way at once, by what a tile took, as the manifests say."""
    seconds, count = 0.0, 0
    for manifest in material.manifests(out).values():
        facts = json.loads(manifest.read_text())["properties"]
        seconds += sum(
            facts["segflow:seconds"][stage] for stage in ("read_and_scale", "infer", "blend_and_label", "store")
        )
        count += facts["segflow:tiles"]["total"]
    batch = min(256, round(_BATCH / max(seconds / max(1, count), 1e-6)))
    # Three scenes are labelled side by side, each with a batch for every thread and one more.
    return _SLACK * batch * (_WORKERS * _THREADS + 1)


def _told(process: Running) -> str:
    reasons = {s["reason"] for s in process.summary.get("scenes", []) if s["reason"]}
    return "; ".join(sorted(reasons)) or process.said.strip()[-300:] or "nothing said"
