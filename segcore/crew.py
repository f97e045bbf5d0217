"""A crew: workers that are replaced when they are lost, and scenes that are labelled with them."""

from __future__ import annotations

import threading

from segcore.errors import ModelError, SegcoreError, StoppedError
from segcore.execute import ATTEMPTS, Workers
from segcore.lock import Guarding
from segcore.scene import Deadlines, Outcome, Progress, segment_scene
from segcore.spec import Job


class Crew:
    """Labels scenes, several at once if several threads ask. A context manager.

    `where`, `processes`: see `Workers`; `guarding`: what holds a scene against other runs, None for locks that wait.
    Raises PlanError where there are no workers to begin with.
    """

    def __init__(
        self,
        where: str | None = None,
        processes: int = 0,
        deadlines: Deadlines | None = None,
        guarding: Guarding | None = None,
    ) -> None:
        self._where, self._processes, self._guarding = where, processes, guarding
        self._deadlines = deadlines or Deadlines()
        self._lock, self._replacing, self._draining = threading.Lock(), threading.Lock(), threading.Event()
        self._workers = Workers(where, processes)
        self._others: list[Workers] = []
        self._in_vain = 0

    @property
    def in_this_process(self) -> bool:
        """Whether a tile that kills its worker kills this process."""
        return not self._workers.processes

    def label(self, job: Job, progress: Progress) -> Outcome:
        """Label one scene. Raises SegcoreError; when all workers were lost, the next scene finds others.

        Raises StoppedError, for this scene and all others, when no others come.
        """
        workers = self._present()
        try:
            return segment_scene(job, workers, progress, self._deadlines, self._guarding)
        except ModelError:
            if workers.lost:
                self._replace(workers)
            raise

    def label_alone(self, job: Job, progress: Progress) -> Outcome:
        """Label one scene with a worker of its own, in a process of its own: it may have killed one."""
        with Workers(None, 1) as workers:
            with self._lock:
                self._others.append(workers)
                if self._draining.is_set():
                    workers.drain()
            try:
                return segment_scene(job, workers, progress, self._deadlines, self._guarding)
            finally:
                with self._lock:
                    self._others.remove(workers)

    def drain(self) -> None:
        """End all that is under way: what waits for tiles raises StoppedError."""
        self._draining.set()
        with self._lock:
            for workers in (self._workers, *self._others):
                workers.drain()

    def _present(self) -> Workers:
        with self._lock:
            return self._workers

    def _replace(self, lost: Workers) -> None:
        """May take minutes, in which `drain` must not wait for it.

        Raises StoppedError where none came so often in a row: else every scene of an archive would fail in its turn.
        """
        with self._replacing:
            if self._present() is not lost or self._draining.is_set():
                return
            lost.close()
            try:
                others = Workers(self._where, self._processes)
            except SegcoreError as error:
                self._in_vain += 1
                if self._in_vain < ATTEMPTS:  # the next scene tries again
                    return
                self.drain()
                raise StoppedError(f"stopped, no workers are left: {error}") from error
            self._in_vain = 0
            with self._lock:
                self._workers = others
                if self._draining.is_set():
                    others.drain()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()
