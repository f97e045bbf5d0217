"""The figures of the report as numbers: where lines, bars and ticks lie. Integers and floats only; the page draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Size of the drawings in their own units; the page scales them.
WIDTH, PANEL_HEIGHT = 720.0, 132.0
#: At most so many steps along the time axis, and so many runs side by side.
STEPS, RUNS, FEWEST_RUNS = 90, 45, 20
_TICK_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: where, and the number that it stands for."""

    at: float
    value: float


@dataclass(frozen=True, slots=True)
class Line:
    """A curve of counts over time, as the path of an SVG; `last` is its height at the end, `count` what it comes to."""

    path: str
    last: float
    count: int


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: left, top, width, height, and the number that it stands for."""

    x: float
    y: float
    width: float
    height: float
    value: float


def nice_top(highest: float) -> float:
    """A round number at or just above the highest."""
    if highest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    return next(
        factor * power for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if factor * power >= highest * (1 - 1e-9)
    )


def time_ticks(began: float, ended: float, width: float = WIDTH) -> list[Tick]:
    """At most eight marks at round times of the clock (seconds since 1970, UTC)."""
    span = max(ended - began, 1e-9)
    step = next((step for step in _TICK_SECONDS if span / step <= 8), math.ceil(span / 8 / 86400) * 86400)
    first = math.ceil(began / step) * step
    return [Tick((at - began) / span * width, at) for at in _steps(first, ended, step)]


def _steps(first: float, last: float, step: float) -> Iterable[float]:
    for n in range(int((last - first) / step) + 1 if last >= first else 0):
        yield first + n * step


def cumulative(times: Sequence[float], began: float, ended: float, top: float) -> Line:
    """How many of `times` (sorted) had come by when: a staircase, thinned to the steps of the drawing."""
    span, points, done = max(ended - began, 1e-9), [f"M0,{PANEL_HEIGHT:g}"], 0
    for step in range(1, STEPS * 2 + 1):
        until, before = began + span * step / (STEPS * 2), done
        while done < len(times) and (times[done] <= until or step == STEPS * 2):
            done += 1
        if done != before or step == STEPS * 2:
            if before == done or step > 1:
                points.append(f"L{WIDTH * (step - 1) / (STEPS * 2):.1f},{_height(before, top):.1f}")
            points.append(f"L{WIDTH * step / (STEPS * 2):.1f},{_height(done, top):.1f}")
    return Line("".join(points), _height(done, top), done)


def spread(works: Iterable[tuple[float, float, float]], began: float, ended: float) -> list[float]:
    """Amounts a second, step by step along the time axis; each work is (end, seconds, amount), spread over its time."""
    width = max(ended - began, 1e-9) / STEPS
    amounts = [0.0] * STEPS
    for end, seconds, amount in works:
        start = max(began, end - max(seconds, 1e-6))
        first = min(STEPS - 1, max(0, int((start - began) / width)))
        last = min(STEPS - 1, max(first, int((end - began) / width)))
        shares = [
            max(0.0, min(end, began + (n + 1) * width) - max(start, began + n * width)) for n in range(first, last + 1)
        ]
        total = sum(shares)
        for n, share in enumerate(shares, start=first):
            amounts[n] += amount * (share / total if total else 1 / len(shares))
    return [amount / width for amount in amounts]


def bars(
    values: Sequence[float], top: float, *, floor: Sequence[float] = (), gap: float = 1.0, slots: int = 0
) -> list[Bar]:
    """Bars side by side that end at the right; with `floor`, each stands on a bar of that value.

    Where there are fewer than `slots`, there is room for that many, and the left stays empty.
    """
    slot = WIDTH / max(len(values), slots, 1)
    out = []
    for n, value in enumerate(values):
        base, x = floor[n] if floor else 0.0, WIDTH - (len(values) - n) * slot
        y = _height(base + value, top)
        out.append(Bar(x + gap / 2, y, max(slot - gap, 0.5), _height(base, top) - y, value))
    return out


def _height(value: float, top: float) -> float:
    return PANEL_HEIGHT * (1 - min(1.0, value / top if top else 0.0))
