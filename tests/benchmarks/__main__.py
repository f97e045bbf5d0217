"""`python -m benchmarks WHAT`, with this folder's parent on the path: what `make benchmark WHAT=...` runs."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from benchmarks import bare, million, monai, overhead, own, scaling, sweep
from benchmarks.table import machine

TABLES = {
    "monai": monai,
    "bare": bare,
    "csmask": own,
    "deepbet": own,
    "sweep": sweep,
    "overhead": overhead,
    "million": million,
    "scaling": scaling,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make benchmark WHAT=... WITH='--option ...'", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module in TABLES.items():
        about = (module.table.__doc__ or "").strip()
        command = commands.add_parser(
            name, help=about.partition("\n")[0], description=about, formatter_class=argparse.RawTextHelpFormatter
        )
        module.arguments(command, name)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu hides every GPU")
    commands.add_parser("all", help="every table at its default size, one after the other")
    if len(sys.argv) == 1:
        parser.print_help()
        return
    options = parser.parse_args()
    chosen = [parser.parse_args([name]) for name in TABLES] if options.what == "all" else [options]
    # What is measured runs in sessions of its own: only this process can end it, and must have the time to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(machine(), flush=True)
    for each in chosen:
        # Every process that is measured inherits this.
        if each.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        else:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        for text in TABLES[each.what].table(each):
            print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
