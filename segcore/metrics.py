"""Numbers for monitoring: a file in Prometheus' text format, for the textfile collector of its node exporter.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format, version 0.0.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from segcore.files import save_text
from segcore.ledger import Totals, seconds_of, whole

#: The states that are always there, so that an alert on one finds a 0 rather than nothing.
_STATES = ("done", "up to date", "failed", "quarantined", "waiting")


def write_metrics(path: Path, run: Mapping[str, Any], totals: Totals) -> None:
    """Write what a run (the content of `run.json`) and the ledger (its totals) say, at once. Raises ProductError."""
    save_text(path, metrics_text(run, totals))


def metrics_text(run: Mapping[str, Any], totals: Totals) -> str:
    """The text: counters over all runs of an output folder, gauges of the last run."""
    counts = run.get("counts") or {}
    started, beat = seconds_of(run.get("started")), seconds_of(run.get("heartbeat"))
    ended, code = seconds_of(run.get("ended")), run.get("exit_code")
    under_way = run.get("under_way") or ()
    what = {"version": run.get("segflow", ""), "model": run.get("model", "")}
    blocks = [
        _block("info", "gauge", "What runs here.", [(what, 1)]),
        _block("scenes", "gauge", "Scenes of the last run, by state.",
               [({"state": state.replace(" ", "_")}, whole(counts.get(state))) for state in _STATES]),
        _block("scenes_under_way", "gauge", "Scenes that are being labelled.", [({}, len(under_way))]),
        _block("run_scenes", "gauge", "Scenes of the last run, all states together.", [({}, whole(run.get("total")))]),
        _block("run_seconds", "gauge", "How long the last run has taken.", [({}, run.get("seconds"))]),
        _block("run_exit_code", "gauge", "Exit code of the last run; absent while it runs.", [({}, code)]),
        _block("run_running", "gauge", "Whether the last run has not ended.", [({}, int(code is None))]),
        _block("last_run_timestamp_seconds", "gauge", "When the last run ended, or last gave a sign of life.",
               [({}, ended or beat or started)]),
        _block("last_success_timestamp_seconds", "gauge", "When a run last ended with exit code 0.",
               [({}, seconds_of(totals.last_success))]),
        _block("scenes_labelled_total", "counter", "Scenes labelled, all runs.", [({}, totals.scenes)]),
        _block("scene_failures_total", "counter", "Scenes that failed, all runs.", [({}, totals.failures)]),
        _block("pixels_total", "counter", "Pixels or voxels labelled, all runs.", [({}, totals.pixels)]),
        _block("tiles_total", "counter", "Tiles labelled, all runs.", [({}, totals.tiles)]),
    ]  # fmt: skip
    return "".join(blocks)


def _block(name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, object], object]]) -> str:
    """One metric with its samples; empty where it has none, since a number that is not known is not 0."""
    lines = []
    for labels, value in samples:
        if not isinstance(value, int | float) or value != value:
            continue
        marked = ",".join(f'{key}="{_escaped(str(label))}"' for key, label in labels.items())
        lines.append(f"segflow_{name}{{{marked}}} {value}\n" if marked else f"segflow_{name} {value}\n")
    return f"# HELP segflow_{name} {text}\n# TYPE segflow_{name} {kind}\n{''.join(lines)}" if lines else ""


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
