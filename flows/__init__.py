"""The outer floor: batches, the Prefect flow and the `segflow` command. URIs and small values, never arrays."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

# Prefect reads these when it is first imported. Whoever sets them otherwise is obeyed.
for _name, _value in (
    # A fresh home migrates its database first, which takes longer than the default of 20 s.
    ("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180"),
    ("PREFECT_SERVER_ANALYTICS_ENABLED", "false"),
    ("DO_NOT_TRACK", "1"),
):
    os.environ.setdefault(_name, _value)


def main() -> None:
    """Entry point of `segflow`: a signal at any moment, from the first import on, ends it in good order."""

    def stop(number: int, _frame: FrameType | None) -> None:
        drained = number == signal.SIGTERM
        print("stopped; run the same command again to go on", file=sys.stderr)
        raise SystemExit(75 if drained else 130)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    from flows.command import command  # the slow part

    command()
