"""`segflow` with scenes that kill their worker, or hang there: those with `_kill` or `_hang` in their name.

A raster is opened by its driver as ever; on a worker, where it arrives by pickle, it bites.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

import segcore.io
from flows import main as segflow
from segcore.box import Box
from segcore.io.geotiff import Raster

_open = segcore.io.raster_file


class Wicked(Raster):
    """Whoever reads it on a worker dies, or waits for ever."""

    bites = False

    def __reduce__(self) -> tuple[object, ...]:
        return _arrive, tuple(super().__reduce__())

    def read(self, box: Box) -> NDArray[np.float32]:
        if self.bites and "_kill" in self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.bites:
            time.sleep(3600)
        return super().read(box)


def _arrive(reopen: Any, arguments: tuple[Any, ...]) -> Raster:
    raster: Raster = reopen(*arguments)
    raster.__class__ = Wicked
    raster.bites = True  # type: ignore[attr-defined]
    return raster


def _raster(uri: str, name: str, *arguments: Any) -> Raster:
    raster = _open(uri, name, *arguments)
    if "_kill" in name or "_hang" in name:
        raster.__class__ = Wicked
    return raster


def main() -> None:
    segcore.io.raster_file = _raster
    segflow()
