"""The outer floor: batches, the Prefect flow and the `segflow` command. URIs and small values, never arrays."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
from types import FrameType

# Prefect reads these when it is first imported. Whoever sets them otherwise is obeyed.
for _name, _value in (
    # A fresh home migrates its database first, which takes longer than the default of 20 s.
    ("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180"),
    ("PREFECT_SERVER_ANALYTICS_ENABLED", "false"),
    ("DO_NOT_TRACK", "1"),
):
    os.environ.setdefault(_name, _value)


#: Seconds in which a run that was told to stop has stopped; what hangs then is cut off, and loses its tiles.
_LAST_SECONDS = 9.5
_STOPPED = "stopped; run the same command again to go on"


def main() -> None:
    """Entry point of `segflow`: a signal at any moment, from the first import on, ends it in good order.

    A second signal changes nothing: the first is being obeyed.
    """
    code = 0

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal code
        if code:
            return
        code = 75 if number == signal.SIGTERM else 130
        late = threading.Timer(_LAST_SECONDS, os._exit, (code,))
        late.daemon = True
        late.start()
        with contextlib.suppress(OSError):  # not `print`: it may be in the middle of one
            os.write(2, f"{_STOPPED}\n".encode())
        raise SystemExit(code)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        # The slow part: a thousand modules, whose objects stay. To look through them for garbage takes a third of it.
        gc.disable()
        from flows.command import command

        gc.freeze()
        gc.enable()
        command()
    except BaseException as error:
        # Whatever a library makes of the end of the run, it is the end of the run.
        if code:
            if "--json" in sys.argv:
                print(json.dumps({"error": _STOPPED, "exit_code": code}, indent=2))
            raise SystemExit(code) from error
        raise
