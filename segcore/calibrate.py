"""How fast a model is on this machine, measured in a few seconds: for a plan of a model that has not run here yet."""

from __future__ import annotations

import math
import time

from segcore.model import load_segmenter
from segcore.model.probe import noise
from segcore.spec import usable_cores
from segcore.speed import Speed, remember
from segcore.survey import Prospect

#: Seconds that are measured, and the side of the window that is run again and again, by number of axes (pixels).
_SECONDS = 3.0
_SIDE = {1: 4096, 2: 512, 3: 64}


def calibrate(prospect: Prospect) -> Speed:
    """Run the network of a scene on noise, and remember its speed.

    What else a scene takes (reading, writing) is left as the last run found it, 0 where there was none. Raises
    CardError, ModelError.
    """
    card, sight = prospect.model.card, prospect.plan.sight
    segmenter = load_segmenter(prospect.model, usable_cores(), engine=prospect.engine)
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
    speed = Speed(seconds, known.rest if known else 0.0)
    remember(prospect.speed_key, speed)
    return speed
