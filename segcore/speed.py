"""How fast models ran on this machine when they last ran: what the time of a plan is predicted from."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass

from segcore.notes import Notes

_NOTES = Notes("speed", 200)
#: A scene tells how long others take that are up to so many times as large: what a process does once was counted as
#: work on its pixels, and would be taken for hours where there are many more.
_TIMES = 4


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to label, for each pixel that the network computes, and for all the rest, for each pixel of a scene.

    `pixels`: of the scene that it was found on.
    """

    label: float
    rest: float
    pixels: int

    def tells_of(self, pixels: int) -> bool:
        """Whether it says anything of a scene of so many pixels."""
        return pixels <= _TIMES * self.pixels

    def predict(self, computed: float, pixels: int) -> float:
        """Seconds for a scene of so many pixels, for which the network computes `computed`."""
        return self.label * computed + self.rest * pixels


def recall(key: str) -> Speed | None:
    """The speed under this name, None where none is known."""
    with contextlib.suppress(KeyError, TypeError):
        return Speed(**_NOTES[key])
    return None


def remember(key: str, speed: Speed) -> None:
    """Note a speed for later runs, unless that of a much larger scene is known."""
    known = recall(key)
    if known is None or speed.tells_of(known.pixels):
        _NOTES[key] = asdict(speed)
