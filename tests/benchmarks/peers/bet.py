"""deepbet's own program, both of its networks: VOLUME MASK."""

from __future__ import annotations

import sys

from deepbet import run_bet


def main() -> None:
    volume, mask = sys.argv[1:]
    run_bet([volume], mask_paths=[mask], no_gpu=True)


if __name__ == "__main__":
    main()
