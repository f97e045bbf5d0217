"""Where tiles are labelled: threads or processes of this machine, a dask cluster, or one that a file describes.

A cluster file is YAML: a `kind`, a number of `workers` (or `minimum` and `maximum`, between which it adapts), and
`options` that go to the class of that kind as they are:

    kind: slurm            # local, cuda, kubernetes, or a batch system of dask-jobqueue (slurm, pbs, sge, lsf, ...)
    workers: 8
    options: {cores: 4, memory: 16GB, walltime: "04:00:00", queue: normal}
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import yaml
from distributed import LocalCluster, Status
from distributed.comm import parse_address, parse_host_port
from distributed.comm.registry import get_backend
from tornado.ioloop import PeriodicCallback

from segcore.errors import PlanError, one_line
from segcore.plan import TILES_IN_FLIGHT

#: Kinds of clusters: the package that brings the class, and the class.
_KINDS = {
    "local": ("distributed", "LocalCluster"),
    "cuda": ("dask_cuda", "LocalCUDACluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "pbs": ("dask_jobqueue", "PBSCluster"),
    "sge": ("dask_jobqueue", "SGECluster"),
    "lsf": ("dask_jobqueue", "LSFCluster"),
    "oar": ("dask_jobqueue", "OARCluster"),
    "moab": ("dask_jobqueue", "MoabCluster"),
    "htcondor": ("dask_jobqueue", "HTCondorCluster"),
}
#: Kinds whose workers are processes of this machine.
_HERE = ("local", "cuda")
#: What dask does in workers that we do without: looking at all threads all the time (see `Bench.setup`), and trying a
#: batch again whose worker died (suspects are tried alone instead).
_SETTINGS = {"distributed.worker.profile.enabled": False, "distributed.scheduler.allowed-failures": 0}

#: A worker process that dies while it is started is started so often before a run ends.
_STARTS = 3
#: Seconds between two looks at whether all workers of this machine are there.
_KEEP_SECONDS = 5


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """What a cluster file says. Raises PlanError, naming the file, for what it must not say."""

    path: str
    kind: str
    workers: int
    maximum: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in _KINDS:
            raise PlanError(f"{self.path}: kind {self.kind!r} must be one of {', '.join(_KINDS)}")
        numbers = (self.workers, self.workers if self.maximum is None else self.maximum)
        if any(not isinstance(n, int) or isinstance(n, bool) for n in numbers) or not 0 <= numbers[0] <= numbers[1]:
            raise PlanError(f"{self.path}: workers must be whole numbers, minimum <= maximum, and not {numbers}")
        if numbers[1] < 1:
            raise PlanError(f"{self.path}: at least one worker is needed")
        if not isinstance(self.options, dict) or not all(isinstance(key, str) for key in self.options):
            raise PlanError(f"{self.path}: options must be names with values, those of the class of kind {self.kind}")
        if "n_workers" in self.options:
            raise PlanError(f"{self.path}: n_workers is no option here; say it as `workers`")

    @classmethod
    def read(cls, path: str) -> ClusterFile:
        """Raises PlanError where the file is missing, is no YAML or holds other keys."""
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
        except yaml.MarkedYAMLError as error:
            line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise PlanError(f"{path} is no YAML{line}: {error.problem or one_line(error)}") from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise PlanError(f"{path} cannot be read as a cluster file: {one_line(error)}") from error
        if not isinstance(document, dict) or "kind" not in document:
            raise PlanError(f"{path} is no cluster file: it needs `kind`, one of {', '.join(_KINDS)}")
        if unknown := set(document) - {"kind", "workers", "minimum", "maximum", "options"}:
            raise PlanError(f"{path}: unknown keys {', '.join(sorted(map(str, unknown)))}")
        if ("workers" in document) == ("maximum" in document):
            raise PlanError(f"{path} needs either `workers` or `maximum` (and `minimum`)")
        least: Any = document.get("workers", document.get("minimum", 0))
        return cls(path, document["kind"], least, document.get("maximum"), document.get("options") or {})

    def start(self) -> Any:
        """A cluster of this kind, with its workers asked for. Raises PlanError where that does not work."""
        package, name = _KINDS[self.kind]
        try:
            kind = getattr(importlib.import_module(package), name)
        except ImportError as error:
            raise PlanError(
                f"{self.path}: clusters of kind {self.kind} need {package.partition('.')[0]}, and {error.name} is not "
                f"installed; run `pip install {package.partition('.')[0].replace('_', '-')}`"
            ) from error
        options = dict(self.options)
        in_one = self.kind == "local" and not options.get("processes", True)
        if self.kind in _HERE:
            options = {**_loopback(), "host": "127.0.0.1", "n_workers": max(1, self.workers), **options}
            options.setdefault("threads_per_worker", TILES_IN_FLIGHT)
            if self.kind == "local" and not in_one:
                options.setdefault("config", _SETTINGS)  # for workers that are started later
        try:
            with dask.config.set(_settings(in_one)):
                cluster = kind(**options)
                if self.maximum is not None:
                    cluster.adapt(minimum=self.workers, maximum=self.maximum)
                elif self.kind not in _HERE:
                    cluster.scale(self.workers)
        except Exception as error:  # whatever the class of another package raises for options that it does not like
            raise PlanError(f"{self.path}: no cluster of kind {self.kind}: {_reasons(error)}") from error
        if self.kind in _HERE:
            _keep(cluster)
        return cluster


def _reasons(error: BaseException) -> str:
    """What went wrong, and why: dask says of workers only that they did not start."""
    told = [one_line(error)]
    while (cause := error.__cause__) is not None:
        error = cause
        told.append(one_line(error))
    return ": ".join(dict.fromkeys(text.rstrip(".") for text in told))


def check_address(where: str) -> None:
    """Raises ValueError for what is no address of a scheduler, such as a host without a port."""
    scheme, place = parse_address(where)
    get_backend(scheme)
    if scheme != "inproc":
        parse_host_port(place)


def is_cluster_file(where: str) -> bool:
    """Whether `--cluster` names a file rather than an address."""
    return where.lower().endswith((".yaml", ".yml"))


def local_cluster(processes: int) -> LocalCluster:
    """A worker that is threads of this process (0), or so many workers that are processes of their own."""
    for attempt in range(1, _STARTS + 1):
        try:
            cluster = _started(processes)
            break
        except (RuntimeError, OSError) as error:
            if attempt == _STARTS:
                raise PlanError(
                    f"no worker process starts on this machine, tried {attempt} times ({_reasons(error)}); see whether "
                    f"its memory or its number of processes is short, or label with fewer --workers"
                ) from error
    if processes:
        _keep(cluster)
    return cluster


def _started(processes: int) -> LocalCluster:
    with dask.config.set(_settings(in_one=not processes)):
        return LocalCluster(
            n_workers=max(1, processes),
            threads_per_worker=TILES_IN_FLIGHT,
            processes=processes > 0,
            **({"config": _SETTINGS} if processes else {}),  # for workers that are started later
            host="127.0.0.1" if processes else None,
            **_loopback(),
        )


def _settings(in_one: bool) -> dict[str, Any]:
    """Of dask, for a scheduler and workers that are one process, or several.

    In one, a worker cannot be lost. But where the clock is set it seems to have been silent for five minutes, for which
    dask would give it up.
    """
    return _SETTINGS | {"distributed.scheduler.worker-ttl": None} if in_one else _SETTINGS


def _keep(cluster: LocalCluster) -> None:
    """Have all of its workers again whatever happens to them.

    A nanny starts its worker again, but ends when that dies while it is started: others take its place. And where the
    start takes long (a busy machine) dask would give it up, and end it as soon as it is there.
    """
    dask.config.set({"distributed.deploy.lost-worker-timeout": "1 day"})

    def again() -> None:
        for name, nanny in list(cluster.workers.items()):
            if nanny.status in (Status.failed, Status.closed):
                del cluster.workers[name]
        cluster.scale(len(cluster.worker_spec))

    callback = PeriodicCallback(again, _KEEP_SECONDS * 1000)
    cluster.periodic_callbacks["keep"] = callback  # which the cluster stops when it closes
    cluster.loop.add_callback(callback.start)


def _loopback() -> dict[str, Any]:
    """Dask always serves its metrics; on loopback only, on any free port, and without its dashboard."""
    return {
        "dashboard_address": "127.0.0.1:0",
        "worker_dashboard_address": "127.0.0.1:0",
        "scheduler_kwargs": {"dashboard": False},
        "memory_limit": 0,
        "silence_logs": logging.CRITICAL,
    }
