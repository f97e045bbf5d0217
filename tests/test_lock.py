"""Locks between real processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from segcore.errors import InUseError, ProductError
from segcore.lock import NOTE, Holder, empty, held, locked, noted

HOLD = """
import sys
from pathlib import Path
from segcore.lock import locked
with locked(Path(sys.argv[1]), 0, "first"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder until it is told to end."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_held_folder_is_not_waited_for_and_says_who_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "hidden" / "scene"
    with another(folder) as process:
        assert held(folder)
        with pytest.raises(InUseError) as refused, locked(folder, 0, "second"):
            pass
        holder = noted(folder)
        assert holder is not None
        assert (holder.run, holder.pid) == ("first", process.pid)
        assert f"in use by run first on host {holder.host} (process {process.pid}) since 2" in str(refused.value)
        assert refused.value.retryable
        process.communicate("\n")
        assert process.returncode == 0
    assert not held(folder)
    assert not folder.parent.exists(), "an empty folder is of no use"


def test_a_lock_goes_with_a_killed_process_and_what_it_made_stays(tmp_path: Path) -> None:
    folder = tmp_path / "hidden" / "scene"
    with another(folder) as process:
        (folder / "tile").write_text("done")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not held(folder)
        with locked(folder, 0, "second") as lock:
            assert held(folder)
            assert (noted(folder) or Holder.here("")).run == "second"
            lock.check()
    assert {path.name for path in folder.iterdir()} == {"tile"}


def test_waiting_ends_with_the_other_run(tmp_path: Path) -> None:
    folder = tmp_path / "hidden" / "scene"
    with another(folder) as process:
        threading.Timer(0.3, lambda: process.send_signal(signal.SIGKILL)).start()
        with locked(folder, 60, "second"):
            assert process.wait() == -signal.SIGKILL


def test_of_many_threads_one_at_a_time_is_in_the_folder(tmp_path: Path) -> None:
    folder, inside, most = tmp_path / "hidden" / "scene", [0], [0]

    def work() -> None:
        with locked(folder, 60):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.002)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert not folder.parent.exists()


@pytest.mark.parametrize("which", ["scene", "hidden"])
def test_a_folder_that_goes_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """As when another run ends between mkdir's "it is there" and its look at what is there."""
    folder, mkdir, gone = tmp_path / "hidden" / "scene", os.mkdir, []

    def ends_meanwhile(path: Path, mode: int = 0o777) -> None:
        if Path(path).name == which and not gone:
            gone.append(path)
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", ends_meanwhile)
    with locked(folder, 60) as lock:
        assert lock.holds()
    assert gone


def test_a_folder_that_was_removed_by_hand_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "hidden" / "scene"
    with locked(folder, 0) as lock:
        lock.check()
        shutil.rmtree(folder)
        assert not lock.holds()
        with pytest.raises(ProductError, match="was removed while this run worked in it"):
            lock.check()
        folder.mkdir()
        assert not lock.holds(), "another folder of that name is not the one that was locked"


def test_emptying_spares_the_note(tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    with locked(folder, 0, "mine"):
        (folder / "staged").mkdir()
        (folder / "staged" / "volume").write_text("")
        (folder / "file").write_text("")
        empty(folder)
        assert [path.name for path in folder.iterdir()] == [NOTE]
    assert not folder.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", json.dumps({"run": "x"}), json.dumps(dict.fromkeys("abc"))])
def test_a_damaged_note_stops_nobody(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "scene"
    with another(folder):
        (folder / NOTE).write_text(text)
        with pytest.raises(InUseError, match="in use by another run; wait"), locked(folder, 0):
            pass


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for folder in ("file", "file/x", "file/x/y", "dangling", "dangling/x"):
        with (
            pytest.raises(ProductError, match=r"cannot write to .*; choose another --out"),
            locked(tmp_path / folder, 0),
        ):
            pass
    assert not held(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_the_lock_is_not_inherited(tmp_path: Path) -> None:
    """A child that outlives a run does not hold its scenes."""
    with locked(tmp_path / "scene", 0):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with locked(tmp_path / "scene", 0):
            assert held(tmp_path / "scene")
    finally:
        child.communicate(b"\n")


def test_a_disk_that_became_read_only_hides_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(path))

    folder = tmp_path / "hidden" / "scene"

    def fail() -> None:
        with locked(folder, 0):
            (folder / "tile").write_text("")
            monkeypatch.setattr(Path, "unlink", refuse)
            empty(folder)
            raise ProductError("the disk is full")

    with pytest.raises(ProductError, match="the disk is full"):
        fail()
    assert not held(folder)
