"""How fast models ran on this machine when they last ran: what the time of a plan is predicted from."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass

from segcore.notes import Notes

_NOTES = Notes("speed", 200)


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
        return Speed(**_NOTES[key])
    return None


def remember(key: str, speed: Speed) -> None:
    """Note a speed for later runs."""
    _NOTES[key] = asdict(speed)
