"""How fast models ran on this machine when they last ran: what the time of a plan is predicted from."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from uuid import uuid4

from segcore.files import cache_folder

#: Models that are remembered; the oldest goes.
_MOST = 200


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to label, for each pixel that the network computes, and for all the rest, for each pixel of a scene."""

    label: float
    rest: float

    def predict(self, computed: float, pixels: int) -> float:
        """Seconds for a scene of so many pixels, for which the network computes `computed`."""
        return self.label * computed + self.rest * pixels


def recall(key: str) -> Speed | None:
    """The speed under this name, None where none is known."""
    with contextlib.suppress(KeyError, TypeError):
        return Speed(**_read()[key])
    return None


def remember(key: str, speed: Speed) -> None:
    """Keep a speed. What cannot be written is not kept: nothing depends on it."""
    known = _read()
    known.pop(key, None)
    known[key] = asdict(speed)
    folder = cache_folder()
    partial = folder / f".speed.{uuid4().hex}.partial"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(dict(list(known.items())[-_MOST:])))
        os.replace(partial, folder / "speed.json")


def _read() -> dict[str, dict[str, float]]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((cache_folder() / "speed.json").read_text())
        if isinstance(found, dict):
            return found
    return {}
