"""Leases: in a folder, in memory, and in a server that speaks enough of S3 to be away, refuse, and lose its answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
from conftest import save_local_unet
from obstore.store import MemoryStore
from rasterio.transform import from_origin

from segcore.errors import InUseError, PlanError, ProductError
from segcore.execute import Workers
from segcore.lease import Lease, Leases, guarding, leased
from segcore.lock import locked
from segcore.register import Folder, Objects, Record, Register, Version, open_register
from segcore.scene import segment_scene
from segcore.spec import Job, Settings


class Storage(ThreadingHTTPServer):
    """Objects with ETags and conditional writes, as S3 has them; faults on request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.objects: dict[str, bytes] = {}
        self.turn = threading.Lock()
        self.status = 0  #: answered to everything, if set
        self.lost_answers = 0  #: so many writes are done, and their answers lost
        self.ignores_conditions = False


class Answer(BaseHTTPRequestHandler):
    server: Storage
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, content: bytes = b"", tag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        with self.server.turn:
            content = self.server.objects.get(self.path)
        if self.server.status:
            self.answer(self.server.status)
        elif content is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self.answer(200, content, tag_of(content))

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status:
            return self.answer(self.server.status)
        with self.server.turn:
            old, wanted = self.server.objects.get(self.path), self.headers.get("If-Match")
            if not self.server.ignores_conditions and (
                (self.headers.get("If-None-Match") == "*" and old is not None)
                or (wanted and (old is None or wanted != tag_of(old)))
            ):
                return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            self.server.objects[self.path] = content
            lost = self.server.lost_answers > 0
            self.server.lost_answers -= lost
        if lost:
            self.close_connection = True
            return None
        return self.answer(200, tag=tag_of(content))

    def do_POST(self) -> None:  # the removal of several objects
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"<DeleteResult/>")

    def log_message(self, *_: object) -> None:
        pass


def tag_of(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    server = Storage()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, value in {
        "AWS_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["memory", "folder", "s3"])
def register(request: pytest.FixtureRequest, tmp_path: Path) -> Register:
    if request.param == "s3":
        request.getfixturevalue("storage")
        return open_register("s3://bucket/prefix", 2)
    return Objects(MemoryStore(), "memory://") if request.param == "memory" else Folder(tmp_path / "leases")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Crowd:
    """A register whose first writes wait for each other, so that all who write have read the same."""

    def __init__(self, register: Register, writers: int) -> None:
        self.url, self._register = register.url, register
        self._barrier, self._turn, self._left = threading.Barrier(writers), threading.Lock(), writers
        self.read, self.release = register.read, register.release

    def _wait(self) -> None:
        with self._turn:
            self._left -= 1
            first = self._left >= 0
        if first:
            self._barrier.wait(60)

    def create(self, key: str, record: Record) -> Version | None:
        self._wait()
        return self._register.create(key, record)

    def replace(self, key: str, record: Record, version: Version) -> Version | None:
        self._wait()
        return self._register.replace(key, record, version)


def abandon(register: Register, key: str, ttl: float) -> None:
    """What a holder that was killed leaves: a record that nobody renews."""
    assert register.create(key, Record("dead", 7, ttl)) is not None


def test_one_holds_the_others_are_told_who(register: Register) -> None:
    first, second = Leases(register, "first"), Leases(register, "second")
    with first.hold("scene") as lease:
        assert lease.holds()
        lease.check()
        with pytest.raises(InUseError, match=r"scene is in use by run first on host .* \(process \d+\) since 2"):
            second.hold("scene").__enter__()
        with second.hold("another scene"):
            pass
    assert lease.lost.is_set()
    with second.hold("scene") as lease, pytest.raises(InUseError, match="in use by run second"):
        first.hold("scene").__enter__()
    with first.hold("scene"), pytest.raises(InUseError, match="in use by run first"):
        second.hold("scene").__enter__()


def test_a_dead_lease_is_taken_when_it_was_seen_unchanged_for_its_time_to_live(register: Register) -> None:
    clock = Clock()
    leases = Leases(register, "run", 60, clock)
    abandon(register, "scene", 50)
    for now in (1000, 1030, 1049.9):
        clock.now = now
        with pytest.raises(InUseError):
            leases.hold("scene").__enter__()
    with pytest.raises(InUseError):
        Leases(register, "run", 60, clock).hold(
            "scene"
        ).__enter__()  # who looks for the first time has seen nothing yet
    clock.now = 1050
    with leases.hold("scene") as lease:
        lease.check()


def test_wrong_clocks_do_nothing(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, wrong = Clock(), SimpleNamespace(**vars(time))
    for module in ("lease", "lock"):  # and not in dask, which is in this process, too
        monkeypatch.setattr(f"segcore.{module}.time", wrong)
    monkeypatch.setattr(
        "segcore.lock.datetime", SimpleNamespace(now=lambda zone: datetime.fromtimestamp(wrong.time(), zone))
    )
    leases = Leases(register, "run", 60, clock)
    abandon(register, "scene", 60)
    for jump in (0.0, 1e9, -1e9, 4e9):
        wrong.time = lambda jump=jump: jump
        with pytest.raises(InUseError):
            leases.hold("scene").__enter__()
    clock.now += 60
    with leases.hold("scene") as lease:
        wrong.time = lambda: 9e9
        lease.check()
        assert lease.holds()


def test_a_renewed_lease_is_never_taken(register: Register) -> None:
    """The lookers' clock runs a thousand times faster than the holder's, and still: it sees that the record changes."""
    clock = Clock()
    leases = Leases(register, "greedy", 60, clock)
    with Leases(register, "holder", 60, Clock()).hold("scene") as lease:
        for _ in range(20):
            lease.check()  # renews
            with pytest.raises(InUseError):
                leases.hold("scene").__enter__()
            clock.now += 1000
        assert lease.holds()


def test_a_lease_renews_itself(register: Register) -> None:
    with Leases(register, "holder", 0.9).hold("scene") as lease:
        with pytest.raises(InUseError):
            Leases(register, "other", 0.9).hold("scene", 2.5).__enter__()
        assert lease.holds()


def test_one_of_twenty_threads_takes_over(register: Register) -> None:
    clock = Clock()
    abandon(register, "scene", 60)
    together = Crowd(register, 20)
    crowd = [Leases(together, f"run {i}", 60, clock) for i in range(20)]
    for leases in crowd:
        with pytest.raises(InUseError):
            leases.hold("scene").__enter__()
    clock.now += 60
    won: list[Lease] = []

    def take(leases: Leases) -> None:
        with contextlib.suppress(InUseError):
            won.append(leases._take("scene", 0))

    threads = [threading.Thread(target=take, args=(leases,)) for leases in crowd]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].check()
    won[0].release()


def test_one_of_twenty_threads_is_the_first(register: Register) -> None:
    together, won = Crowd(register, 20), []

    def take(leases: Leases) -> None:
        with contextlib.suppress(InUseError):
            won.append(leases._take("scene", 0))

    threads = [threading.Thread(target=take, args=(Leases(together, f"run {i}"),)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].release()


HOLD = """
import sys
from segcore.errors import InUseError
from segcore.lease import leased
url, name, ttl, wait = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
try:
    with leased(url, "scene", name, float(ttl), float(wait)) as lease:
        print("won", flush=True)
        sys.stdin.readline()
        lease.check()
        print("committed", flush=True)
except InUseError:
    print("in use", flush=True)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that waits for a line, wants the lease, waits for a line, and checks it."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, *map(str, arguments)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_one_of_eight_processes_takes_over_from_a_killed_one(
    where: str, tmp_path: Path, storage: Storage, start: Callable[..., subprocess.Popen[str]]
) -> None:
    url = tmp_path.as_uri() if where == "folder" else "s3://bucket/leases"
    crowd = [start(url, i, 1.5, 4 if i else 0) for i in range(9)]
    assert [hear(process) for process in crowd] == ["ready"] * 9
    say(crowd[0])
    assert hear(crowd[0]) == "won"
    crowd[0].kill()
    for process in crowd[1:]:
        say(process)
    heard = [hear(process) for process in crowd[1:]]
    assert sorted(heard) == ["in use"] * 7 + ["won"]
    winner = crowd[1 + heard.index("won")]
    say(winner)
    assert hear(winner) == "committed"
    assert winner.wait() == 0
    if where == "folder":
        assert not list(tmp_path.glob("*.lease"))


def test_a_holder_that_was_stopped_does_not_commit_what_another_has_taken(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    paused = start(tmp_path.as_uri(), "paused", 1, 0)
    say(paused)
    assert [hear(paused), hear(paused)] == ["ready", "won"]
    paused.send_signal(signal.SIGSTOP)
    with leased(str(tmp_path), "scene", "taker", 1, 30):
        paused.send_signal(signal.SIGCONT)
        output, errors = paused.communicate("\n", timeout=30)
    assert "committed" not in output
    assert "the lease on scene was lost: it was taken by run taker on host" in errors


def test_a_holder_that_was_stopped_goes_on_with_what_nobody_has_taken(register: Register) -> None:
    clock = Clock()
    with Leases(register, "run", 60, clock).hold("scene") as lease:
        clock.now += 1000  # as after a sleep of the machine
        assert not lease.holds()
        lease.check()
        assert lease.holds()


def test_a_record_that_is_taken_or_removed_is_a_lost_lease(tmp_path: Path) -> None:
    clock = Clock()
    store = Folder(tmp_path)
    with Leases(store, "first", 60, Clock()).hold("scene") as lease:
        other = Leases(store, "second", 60, clock)
        with pytest.raises(InUseError):
            other.hold("scene").__enter__()
        clock.now += 60
        with other.hold("scene") as taken:
            with pytest.raises(ProductError, match="lost: it was taken by run second") as lost:
                lease.check()
            assert lost.value.retryable
            assert lease.lost.is_set()
            assert not lease.holds()
            lease.release()
            taken.check()  # what was given up was not what another holds
            shutil.rmtree(tmp_path / "scene.lease")
            with pytest.raises(ProductError, match="its record was removed"):
                taken.check()


def test_storage_that_is_away_too_long_loses_the_lease(storage: Storage) -> None:
    with Leases.at("s3://bucket/p", "run", 1.5).hold("scene") as lease:
        storage.status = 503
        with pytest.raises(
            ProductError, match="cannot make sure that scene is still this run's alone: cannot reach"
        ) as e:
            lease.check()
        assert e.value.retryable
        assert lease.lost.wait(20)
        with pytest.raises(ProductError, match="lost: it could not be renewed for"):
            lease.check()
        storage.status = 0


def test_storage_that_comes_back_keeps_the_lease(storage: Storage) -> None:
    with Leases.at("s3://bucket/p", "run", 60).hold("scene") as lease:
        storage.status = 503
        with pytest.raises(ProductError, match="cannot make sure"):
            lease.check()
        storage.status = 0
        lease.check()


def test_a_lost_answer_is_no_lost_lease(storage: Storage) -> None:
    leases = Leases.at("s3://bucket/p", "run", 60)
    storage.lost_answers = 1
    with leases.hold("scene", 10) as lease:
        assert storage.lost_answers == 0
        for _ in range(3):
            storage.lost_answers = 1
            with contextlib.suppress(ProductError):  # whether storage is asked again at once is not our choice
                lease.check()
            assert storage.lost_answers == 0
            assert not lease.lost.is_set()
            lease.check()


@pytest.mark.parametrize(
    ("status", "said", "retryable"),
    [(403, "no permission to read and write s3://bucket/p", False), (401, "no permission", False),
     (404, "is not there", False), (503, "cannot reach s3://bucket/p", True)],
)  # fmt: skip
def test_storage_that_refuses_or_is_away_says_so(storage: Storage, status: int, said: str, retryable: bool) -> None:
    storage.status = status
    with pytest.raises(ProductError, match=said) as refused:
        Leases.at("s3://bucket/p", "run")
    assert refused.value.retryable is retryable
    assert "\n" not in str(refused.value)


def test_nobody_there_is_retryable(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ProductError, match="cannot reach") as refused:
        Leases.at("s3://bucket/p", "run", 1)
    assert refused.value.retryable


def test_storage_that_ignores_conditions_is_refused(storage: Storage) -> None:
    storage.ignores_conditions = True
    with pytest.raises(ProductError, match="does not keep to conditional writes"):
        Leases.at("s3://bucket/p", "run")


@pytest.mark.parametrize("url", ["nonsense://bucket", "ftp://host/x"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ProductError, match=url) as refused:
        Leases.at(url, "run")
    assert not refused.value.retryable


def test_what_is_no_record_is_refused(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "scene.lease").mkdir()
    with Leases.at(str(tmp_path), "run").hold("scene"):
        pass  # an empty folder, of a holder that was killed while it gave the scene free, is in nobody's way
    (tmp_path / "scene.lease").mkdir()
    (tmp_path / "scene.lease" / "odd").touch()
    storage.objects["/bucket/p/scene.lease.json"] = b"{}"
    for url in (str(tmp_path), "s3://bucket/p"):
        with pytest.raises(ProductError, match="is no record of a lease") as refused:
            Leases.at(url, "run").hold("scene").__enter__()
        assert not refused.value.retryable


def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProductError, match="check the URL of the leases"):
        Leases.at(str(tmp_path / "file"), "run").hold("scene").__enter__()
    with pytest.raises(PlanError, match="time to live"):
        Leases.at(str(tmp_path), "run", 0)


def test_nothing_is_left_in_a_folder(tmp_path: Path) -> None:
    for _ in range(3):
        with leased(str(tmp_path), "scène 1", "run"):
            assert (tmp_path / "scène 1.lease").is_dir()
    assert [path.name for path in tmp_path.rglob("*")] == ["who"]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = save_local_unet(tmp_path / "unet", "yx")
    with rasterio.open(tmp_path / "scene.tif", "w", driver="GTiff", count=1, height=96, width=96, dtype="uint8",
                       crs="EPSG:32616", transform=from_origin(452475, 3408645, 30, 30)) as file:  # fmt: skip
        file.write(np.random.default_rng(1).integers(1, 255, (1, 96, 96)).astype(np.uint8))
        file.set_band_description(1, "value")
    return Job("scene", str(tmp_path / "scene.tif"), str(model), str(tmp_path / "out"), Settings(tile=32))


def test_a_scene_under_a_lease_is_labelled_and_given_free(job: Job, tmp_path: Path, workers: Workers) -> None:
    leases = Leases.at(str(tmp_path / "leases"), "run")
    with leases.hold("scene"), pytest.raises(InUseError, match="scene is in use by run run"):
        segment_scene(job, workers, guarding=guarding("run", 0, leases))
    with locked(tmp_path / "out" / ".segflow" / "scene", 0, "a run without leases"):
        with pytest.raises(InUseError, match="in use by run a run without leases"):
            segment_scene(job, workers, guarding=guarding("run", 0, leases))
        with pytest.raises(InUseError, match="in use by run a run without leases"):
            segment_scene(job, workers, guarding=guarding("run", 0))
    assert segment_scene(job, workers, guarding=guarding("run", 0, leases)).state == "done"
    assert not list((tmp_path / "leases").glob("*.lease"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scene"}


@pytest.mark.parametrize("when", ["while it labels", "right before the commit"])
def test_a_scene_whose_lease_is_lost_is_not_committed(
    job: Job, tmp_path: Path, workers: Workers, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, register = Clock(), Folder(tmp_path / "leases")
    other = Leases(register, "other", 60, clock)
    taken: list[Lease] = []

    def take() -> None:
        if not taken:
            with pytest.raises(InUseError):
                other.hold("scene").__enter__()
            clock.now += 60
            taken.append(other._take("scene", 0))

    late = 9 if when == "right before the commit" else 3

    def progress(name: str, done: int, total: int) -> None:
        if done == late:
            take()
            mine.now += 60  # its own clock tells it that the lease may be another's

    mine = Clock()
    segment_scene(job, workers)
    before = (tmp_path / "out" / "scene" / "scene.json").read_bytes()
    (tmp_path / "scene.tif").touch()  # a new product is due
    with pytest.raises(ProductError, match="was lost: it was taken by run other"):
        segment_scene(job, workers, progress, guarding=guarding("run", 0, Leases(register, "run", 60, mine)))
    assert (tmp_path / "out" / "scene" / "scene.json").read_bytes() == before
    taken[0].check()
    taken[0].release()
    assert segment_scene(job, workers, guarding=guarding("run", 0, other)).tiles_kept >= 2, "its tiles are not lost"
    assert json.loads((tmp_path / "out" / "scene" / "scene.json").read_text())["id"] == "scene"
