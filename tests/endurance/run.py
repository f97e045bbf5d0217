"""`python -m endurance.run WHAT`, with this folder's parent on the path: what `make endurance WHAT='...'` runs."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from endurance import cluster, full_disk, kills, poison
from endurance.findings import Findings

TRIALS = {"poison": poison, "kills": kills, "cluster": cluster, "full-disk": full_disk}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make endurance WHAT='...'", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module in TRIALS.items():
        about = (module.trial.__doc__ or "").strip()
        command = commands.add_parser(name, help=about.partition("\n")[0], description=about)
        module.arguments(command)
        command.add_argument("--minutes", type=float, default=60.0, help="end after so long, whatever is left to do")
        command.add_argument("--seed", type=int, default=0, help="of the moments and places that are drawn")
        command.add_argument("--keep", action="store_true", help="keep the folder where all happens")
    options = parser.parse_args()
    # What runs is in sessions of its own: only this process can end it, and must have the time to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    place = Path(tempfile.mkdtemp(prefix=f"segflow-{options.what}-"))
    shutil.rmtree(os.environ["SEGFLOW_CACHE"])  # the tests', which are not run
    os.environ["SEGFLOW_CACHE"] = str(place / "cache")
    found = Findings(options.what, time.monotonic() + 60 * options.minutes)
    try:
        TRIALS[options.what].trial(options, place, found)
    finally:
        print(f"\n{found}", flush=True)
        if options.keep:
            print(f"all of it lies in {place}")
        else:
            shutil.rmtree(place, ignore_errors=True)
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    main()
