"""What a run writes about itself beside its products: events, heartbeat and, at its end, what is read in the morning.

Products do not depend on any of it, so that whatever goes wrong here is a warning.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows.batch import Summary
from segcore import ledger
from segcore.errors import ProductError, one_line
from segcore.metrics import write_metrics
from segcore.publish import write_json
from segcore.report import write_report

#: Seconds between two heartbeats.
_BEAT = 5.0
#: Scenes that `run.json` names one by one; the ledger has all.
_NAMED = 1000

#: What is known of a run now: its summary, and the scenes under way as JSON values. The argument: whether it has ended.
Stand = Callable[[bool], tuple[Summary, list[dict[str, Any]]]]


class Journal:
    """The files of one run in its output folder. `warnings` is the run's own list, which grows here, too."""

    def __init__(self, out: Path, run_id: str, warnings: list[str], stand: Stand) -> None:
        self._out, self._run_id, self._warnings, self._stand = out, run_id, warnings, stand
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def event(self, event: str, **fields: Any) -> None:
        """Tell the ledger."""
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            ledger.append(self._out / ledger.LEDGER_FILE, ledger.new_event(event, self._run_id, fields))
        except (OSError, ProductError) as error:
            self.warn(one_line(error))

    def warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.append(text)

    def begin(self) -> None:
        """Say now, and every few seconds until it is closed, that the run is alive and where it stands."""
        self._write()
        self._heart.start()

    def _beat(self) -> None:
        while not self._over.wait(_BEAT):
            self._write()

    def close(self, stopped: bool) -> None:
        """Write what is read in the morning. `stopped`: by somebody who has no time for pages."""
        self._over.set()
        if self._heart.is_alive():
            self._heart.join(1)
        summary, _ = self._stand(True)
        self.event(
            ledger.RUN_ENDED,
            exit_code=summary.exit_code,
            seconds=round(summary.seconds, 3),
            counts=summary.counts,
            reason=summary.reason,
        )
        self._write(ended=True)
        try:
            known = ledger.Ledger(self._out / ledger.LEDGER_FILE)
            troubled = known.troubled()
            if troubled:
                ledger.write_failures(self._out / ledger.FAILURES_FILE, troubled)
            else:
                (self._out / ledger.FAILURES_FILE).unlink(missing_ok=True)
            if not stopped:  # `segflow report` writes it
                write_metrics(self._out / ledger.METRICS_FILE, self._document(ended=True), known.totals)
                write_report(self._out)
        except Exception as error:  # scenes are done although a page about them cannot be written
            self.warn(f"cannot write all about this run into {self._out}: {one_line(error)}")

    def _document(self, ended: bool) -> dict[str, Any]:
        """What `run.json` says."""
        (summary, under_way), now = self._stand(ended), ledger.now()
        return summary.to_json(_NAMED) | {
            "segflow": version("segflow"),
            "host": platform.node(),
            "pid": os.getpid(),
            "heartbeat": now,
            "ended": now if ended else None,
            "under_way": under_way,
        }

    def _write(self, ended: bool = False) -> None:
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            write_json(self._out / ledger.RUN_FILE, self._document(ended))
        except (OSError, ValueError) as error:
            # An error of the system names a file of its own each time, and would be another warning every time.
            reason = getattr(error, "strerror", None) or one_line(error)
            self.warn(f"cannot write {self._out / ledger.RUN_FILE}: {reason}")
