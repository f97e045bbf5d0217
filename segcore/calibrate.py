"""How fast a model is on this machine, measured in a few seconds: for a plan of a model that has not run here yet."""

from __future__ import annotations

import math
import time

from segcore.errors import ModelError
from segcore.model import load_segmenter
from segcore.model.probe import noise
from segcore.model.quantise import find_quantised
from segcore.spec import usable_cores
from segcore.speed import Speed, remember
from segcore.survey import Prospect

#: Seconds that are measured, and the side of the window that is run again and again, by number of axes (pixels).
_SECONDS = 3.0
_SIDE = {1: 4096, 2: 512, 3: 64}
#: Seconds a pixel of a scene for all but labelling, where no run tells: large scenes took 0.02 to 0.1 microseconds.
_REST = 5e-8


def calibrate(prospect: Prospect) -> Speed:
    """Run the network of a scene on noise, in the numbers that are wanted, and remember its speed.

    What else a scene takes (reading, writing) is left as the last run found it, where one tells. Raises CardError, and
    ModelError, too where it is wanted in int8 and no run has made that yet.
    """
    card, sight, precision = prospect.model.card, prospect.plan.sight, prospect.job.settings.precision
    quantised = find_quantised(prospect.model) if precision == "int8" else None
    if precision == "int8" and quantised is None:
        raise ModelError(
            f"{card.name} cannot be measured in int8 before a run with --precision int8 has made that of it; leave "
            f"--calibrate out"
        )
    segmenter = load_segmenter(prospect.model, usable_cores(), None, quantised, prospect.engine, precision)
    side = _SIDE[len(sight.stride)]
    shape = sight.window or tuple(max(1, side // s) * s for s in sight.stride)
    batch = noise((segmenter.batch, len(card.channels), *shape))
    segmenter(batch)  # the first run makes room
    began, runs = time.perf_counter(), 0
    while runs == 0 or time.perf_counter() - began < _SECONDS:
        segmenter(batch)
        runs += 1
    seconds = (time.perf_counter() - began) / (runs * len(batch) * math.prod(shape))
    known = prospect.speed
    speed = Speed(seconds, known.rest if known else _REST, prospect.source.grid.size)
    remember(prospect.speed_key, speed)
    return speed
