"""Borders between tiles: what they would change, measured on the scene itself.

`measure_halo` finds the shortest halo that will do for a local network that sees very far; `report_seams` labels places
of a finished product once more, with other borders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from random import Random
from typing import Any

import numpy as np

from segcore.box import Box
from segcore.io.source import Floats, Labels
from segcore.plan import Plan
from segcore.spec import SAME_SCORES, Sides
from segcore.tile import Labeller

#: How many places of a scene are looked at.
PLACES = 8
#: How many more are looked at where those have no valid pixel.
_MORE_PLACES = 500
#: Side of a place (pixels of the scene), by number of axes; at least two cells of the network's stride.
_SIDE = {1: 256, 2: 64, 3: 24}


@dataclass(frozen=True, slots=True)
class Measured:
    """A halo that will do: scores of `places` places changed by `change` at most, where `tolerance` was allowed.

    `reach` is what the network really sees; `shorter` what scores change with the next shorter halo.
    """

    halo: Sides
    reach: Sides
    tolerance: float
    places: int
    change: float
    shorter: float | None

    def to_json(self) -> dict[str, Any]:
        sides = {"halo": [list(pair) for pair in self.halo], "reach": [list(pair) for pair in self.reach]}
        rest = {"tolerance": self.tolerance, "places": self.places, "change": self.change, "shorter": self.shorter}
        return sides | rest

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Measured:
        halo, reach = (tuple((int(b), int(a)) for b, a in fields[key]) for key in ("halo", "reach"))
        shorter = fields["shorter"]
        numbers = float(fields["tolerance"]), int(fields["places"]), float(fields["change"])
        return cls(halo, reach, *numbers, None if shorter is None else float(shorter))


@dataclass(frozen=True, slots=True)
class SeamReport:
    """Places of a product, labelled again with other borders between tiles.

    `pixels` valid pixels of `places` places; `labels` of them differ from the product's, `decided` of these where the
    best scores are further apart than twice `allowed`; `change` is the largest difference of scores between a place in
    one tile and the same place cut where the product's tiles end.
    """

    places: int
    pixels: int
    labels: int
    decided: int
    change: float
    allowed: float

    @property
    def clean(self) -> bool:
        """Whether tiles left no trace, but for what was allowed."""
        return self.change <= self.allowed and self.decided == 0


def measure_halo(labeller: Labeller, tolerance: float) -> Measured:
    """The shortest halo with which no score of a sample of places changes by more than `tolerance`.

    The places lie where tiles of the plan meet, the most varied of them first. What a halo changes is measured against
    one of the network's whole reach; it is taken for good when all longer ones that were tried were good, too. Without
    a valid pixel at any place it is the whole reach.
    """
    plan, full = labeller.plan, labeller.plan.sight.halo
    stride = plan.sight.stride
    places = []
    for box in _varied(labeller, islice(_places(plan), 8 * PLACES)):
        expected = labeller(plan.tile_of(box))
        if expected.valid:
            places.append((box, expected.scores))
        if len(places) == PLACES:
            break

    def shortened(cells: int) -> Sides:
        found = (tuple(min(side, cells * s) for side in sides) for sides, s in zip(full, stride, strict=True))
        return tuple((before, after) for before, after in found)

    def change(cells: int) -> float:
        shorter = replace(labeller, plan=plan.with_halo(shortened(cells)))
        return max(_largest(scores, shorter(shorter.plan.tile_of(box)).scores) for box, scores in places)

    most = max(side // s for sides, s in zip(full, stride, strict=True) for side in sides)
    low, high, changes = -1, most, {most: 0.0}
    while places and high - low > 1:
        middle = (low + high) // 2
        changes[middle] = change(middle)
        low, high = (low, middle) if changes[middle] <= tolerance else (middle, high)
    return Measured(
        shortened(high), plan.sight.reach or full, tolerance, len(places), changes[high], changes.get(high - 1)
    )


def report_seams(labeller: Labeller, read_mask: Callable[[Box], Labels], allowed: float = SAME_SCORES) -> SeamReport:
    """Label a sample of places again, in one tile each and cut where tiles of the plan end, and compare.

    In one tile they see the network's whole reach, whatever halo the plan has. `allowed`: difference of scores that
    does not count. The report is of no place at all where tiles meet on nodata only.
    """
    plan = labeller.plan
    whole = replace(labeller, plan=plan.with_halo(None))
    pixels = differ = decided = seen = 0
    change = 0.0
    for box in _places(plan):
        if seen == PLACES:
            break
        mask = read_mask(box)
        if (mask == labeller.card.label_nodata).all():
            continue
        expected = whole(whole.plan.tile_of(box))
        labels, scores = expected.labels, expected.scores
        cut_labels, cut_scores = np.empty_like(labels), np.empty_like(scores)
        for piece in _pieces(box, plan):
            at = piece.slices(box.start)
            found = labeller(plan.tile_of(piece))
            cut_labels[at], cut_scores[(slice(None), *at)] = found.labels, found.scores
        seen, pixels = seen + 1, pixels + expected.valid
        other = (mask != labels) | (mask != cut_labels)
        second, best = np.sort(scores, axis=0)[-2:]
        differ += int(np.count_nonzero(other))
        decided += int(np.count_nonzero(other & ~(best - second <= 2 * allowed)))
        change = max(change, _largest(scores, cut_scores))
    return SeamReport(seen, pixels, differ, decided, change, allowed)


def _places(plan: Plan) -> Iterator[Box]:
    """Boxes around corners where tiles meet, evenly spread; of a scene of one tile, around points spread over it.

    They begin and end at multiples of the stride, as the tiles of a plan do, so that they show no more of a halo.
    """
    # Of the network's grid; on the scene's it may only be near.
    unit = [max(1, s * n // m) for s, n, m in zip(plan.sight.stride, plan.grid.shape, plan.canvas, strict=True)]
    half = [-(-_SIDE[len(unit)] // (2 * s)) * s for s in unit]

    def around(point: Sequence[int]) -> Box:
        centre = tuple(p // s * s for p, s in zip(point, unit, strict=True))
        return Box(centre, centre).grow(tuple((h, h) for h in half)) & plan.grid.box

    lines = []
    for n, core, count, s in zip(plan.grid.shape, plan.core, plan.counts, unit, strict=True):
        cuts = range(core, n, core) if count > 1 else [max(1, n * k // (4 * s)) * s for k in (2, 1, 3)]
        # First a few that are far apart, whatever their number.
        steps = [round((k + 0.5) * len(cuts) / 8) % len(cuts) for k in (4, 1, 6, 2, 7, 0, 3, 5)]
        lines.append(list(dict.fromkeys(cuts[step] for step in steps)))
    for corner in sorted(product(*(range(len(line)) for line in lines)), key=sum):
        if (box := around([line[k] for line, k in zip(lines, corner, strict=True)])).size:
            yield box
    # Then anywhere on a border: much of a scene may be nodata.
    chance = Random(0)
    borders = [axis for axis, count in enumerate(plan.counts) if count > 1]
    for _ in range(_MORE_PLACES if borders else 0):
        point = [chance.randrange(n) for n in plan.grid.shape]
        axis = chance.choice(borders)
        point[axis] = plan.core[axis] * chance.randrange(1, plan.counts[axis])
        if (box := around(point)).size:
            yield box


def _pieces(box: Box, plan: Plan) -> Iterator[Box]:
    """The box, cut where tiles of the plan end, and through its middle along an axis where none does."""
    parts = []
    for a, b, core in zip(box.start, box.stop, plan.core, strict=True):
        cuts = list(range(-(-(a + 1) // core) * core, b, core)) or ([(a + b) // 2] if b - a > 1 else [])
        parts.append(list(zip([a, *cuts], [*cuts, b], strict=True)))
    for ranges in product(*parts):
        yield Box(tuple(a for a, _ in ranges), tuple(b for _, b in ranges))


def _varied(labeller: Labeller, boxes: Iterator[Box]) -> list[Box]:
    """Boxes by how much their pixels differ, the most varied first; boxes without two valid pixels last."""

    def spread(box: Box) -> float:
        values = labeller.source.read(box).reshape(len(labeller.source.channels), -1)
        valid = values[:, ~np.isnan(values).any(axis=0)]
        return float(valid.std(axis=1).mean()) if valid.shape[1] > 1 else -1.0

    return sorted(boxes, key=spread, reverse=True)


def _largest(one: Floats, other: Floats) -> float:
    """The largest difference of two arrays of scores, at valid pixels."""
    difference = np.abs(one - other)
    return float(np.nanmax(difference)) if not np.isnan(difference).all() else 0.0
