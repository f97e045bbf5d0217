"""Whether a network in shorter numbers says what it says in fp32: measured on the scene that it is to label.

In 8-bit integers it is calibrated on some places of a scene, and its labels are compared with those of fp32 at others;
in bfloat16 there is nothing to calibrate.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from segcore.box import Box
from segcore.errors import ModelError
from segcore.io.source import Floats, Labels
from segcore.model import cut_of
from segcore.model.card import Card, Model
from segcore.model.quantise import Quantised, quantise
from segcore.model.segmenter import Integers
from segcore.plan import Plan, Tile
from segcore.spec import Precision, usable_cores
from segcore.tile import Labeller

#: Places of a scene that are calibrated on, and as many others that are compared.
PLACES = 12
#: How many are looked at for these, since many may be nodata.
_MOST_LOOKS = 512
#: Largest side of a place (pixels of the scene) and parts of an axis at least, by number of axes.
_SIDE, _PARTS = {1: 1024, 2: 256, 3: 64}, {1: 16, 2: 4, 3: 3}


@dataclass(frozen=True, slots=True)
class Proof:
    """What a network in shorter numbers was found to be worth on a scene.

    `agreement`: share of its labels that are those of fp32, of `pixels` valid pixels at `places` that it was not
    calibrated on; `of_class`, `kept`: how many of these fp32 gives each class, and how many of them it gives it, too;
    `calibration`, `sha256`: which network in int8 it was, None of others; `engine`: what ran it; `speed`: seconds of
    fp32 over its own, for the same pixels, by the workers that had them; `precision`: its numbers.
    """

    agreement: float
    pixels: int
    places: int
    of_class: tuple[int, ...]
    kept: tuple[int, ...]
    calibration: str | None
    sha256: str | None
    engine: str
    speed: float
    precision: Precision = "int8"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Proof:
        return cls(**fields | {key: tuple(map(int, fields[key])) for key in ("of_class", "kept")})

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know who asked for other numbers to be quicker."""
        name, found = self.precision, list[str]()
        if self.speed < 1:
            found.append(
                f"{name} was slower here than fp32 ({self.speed:.2f} times its speed); leave --precision {name} out"
            )
        if not self.says_much:
            found.append(
                f"fp32 gives all {self.pixels} pixels at {self.places} places of the scene one label, so that their "
                f"agreement in {name} says nothing of other labels"
            )
        return tuple(found)

    @property
    def says_much(self) -> bool:
        """Whether labels were compared that are not all alike."""
        return sum(count > 0 for count in self.of_class) > 1

    def check(self, limit: float, model: str, made: str = "") -> None:
        """Raises ModelError where the agreement is below the limit. `made`: where the network is from, in words."""
        name = self.precision
        if self.agreement < limit:
            raise ModelError(
                f"model {model} in {name} gives {self.agreement:.4%} of the labels that it gives in fp32 "
                f"({self.pixels} pixels at {self.places} places of the scene), and {limit:.4%} is wanted{made}; leave "
                f"--precision {name} out, or accept less, there, with --agreement {self.agreement - 5e-5:.4f}"
            )


@dataclass(frozen=True, slots=True)
class Looks:
    """What a network says of places of a scene: the labels of each, the seconds in its engine, and which that is."""

    places: tuple[Tile, ...]
    labels: tuple[Labels, ...]
    seconds: float
    engine: str


def look(labeller: Labeller, places: Sequence[Tile]) -> Looks:
    """Label some places, each by itself. Raises ModelError, SceneError."""
    alone = replace(labeller, plan=_without_halo(labeller.plan))
    alone(places[0])  # what is done once for each size of window does not count
    found = [alone(tile) for tile in places]
    seconds = sum(result.infer_seconds for result in found)
    return Looks(tuple(places), tuple(result.labels for result in found), seconds, labeller.segmenter.engine)


def look_for_bf16(labeller: Labeller) -> Looks:
    """What a network says in fp32, the labeller's, where bfloat16 is to be compared. Raises ModelError, SceneError."""
    _, (_, compared) = _looked_at(labeller, "bf16")
    return look(labeller, compared)


def make_int8(
    labeller: Labeller, model: Model, path: Path, kept: Quantised | None, calibration: str
) -> tuple[Quantised, Looks]:
    """A network in int8, and what it says in fp32, the labeller's, where that is to be compared.

    It is `kept`, or made in the file `path` from other places of the scene, and then of this `calibration`. Raises
    ModelError, SceneError.
    """
    seen, (calibrated_on, compared) = _looked_at(labeller, "int8")
    network = kept or _quantised(model, _shown(seen, calibrated_on), path, calibration)
    return network, look(labeller, compared)


def compare(expected: Looks, found: Looks, card: Card, network: Quantised | None = None) -> Proof:
    """What a network in shorter numbers is worth: the `network` in int8, or else bfloat16. `expected`: of fp32."""
    classes = len(card.classes)
    of_class, same = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for a, b in zip(expected.labels, found.labels, strict=True):
        valid = a != card.label_nodata
        of_class += np.bincount(a[valid], minlength=classes)
        same += np.bincount(a[valid & (a == b)], minlength=classes)
    pixels = int(of_class.sum())
    return Proof(
        float(same.sum()) / pixels,
        pixels,
        len(expected.places),
        tuple(map(int, of_class)),
        tuple(map(int, same)),
        network.calibration if network else None,
        network.sha256 if network else None,
        found.engine,
        round(expected.seconds / max(found.seconds, 1e-9), 2),
        "int8" if network else "bf16",
    )


def _quantised(model: Model, shown: list[Floats], path: Path, calibration: str) -> Quantised:
    """A network in int8, made in the file `path` from what was shown; a part of its windows can rise if that may be."""
    _, weights = model.weights()
    cut, network = cut_of(model, usable_cores()) or (None, weights.read_bytes())

    def inputs(batch: Floats) -> list[Floats | Integers]:
        window = batch.shape[2:]
        return [batch, *(cut.cropping(window, Box.of(window))[1] if cut else ())]

    return Quantised(path, quantise(str(weights), network, list(map(inputs, shown)), path), calibration)


def _looked_at(labeller: Labeller, precision: Precision) -> tuple[Labeller, tuple[list[Tile], list[Tile]]]:
    """A labeller that shows what the network sees, and places to calibrate on and to compare."""
    seen = replace(labeller, plan=_without_halo(labeller.plan), segmenter=_Onlooker(len(labeller.card.classes)))
    places = _places(seen)
    if not places[1]:
        raise ModelError(
            f"{labeller.source.uri} has too few valid pixels to prove a network in {precision} on; check its nodata "
            f"value and its bands, or leave --precision {precision} out"
        )
    return seen, places


class _Onlooker:
    """A segmenter that only keeps what it is shown."""

    engine = "none"
    batch = 1

    def __init__(self, classes: int) -> None:
        self.device = threading.Lock()
        self.classes = classes
        self.shown: list[Floats] = []

    def __call__(self, batch: Floats, wanted: Box | None = None) -> Floats:
        self.shown.append(batch)
        return np.zeros((len(batch), self.classes, *batch.shape[2:]), np.float32)

    def release(self) -> None:
        self.shown.clear()


def _without_halo(plan: Plan) -> Plan:
    """The same plan, with windows that show a place and no more: in all numbers they show the same."""
    return plan if plan.mode == "blend" else plan.with_halo(((0, 0),) * len(plan.core))


def _places(labeller: Labeller) -> tuple[list[Tile], list[Tile]]:
    """Tiles to calibrate on and tiles to compare, in turn; no two share a pixel, and half of each is valid."""
    chosen: tuple[list[Tile], list[Tile]] = ([], [])
    turn = 0
    for box in _cells(labeller.plan):
        tile = labeller.plan.tile_of(box)
        values = labeller.source.read(box)
        if 2 * np.count_nonzero(~np.isnan(values).any(axis=0)) >= box.size:
            chosen[turn % 2].append(tile)
            turn += 1
        if turn == 2 * PLACES:
            break
    return chosen


def _cells(plan: Plan) -> Iterator[Box]:
    """Disjoint boxes in the scene, in multiples of the stride, in an order by chance that is always the same."""
    axes, sight = len(plan.canvas), plan.sight
    # Where there are many windows they lie as these do, so that fewer of them are run for a place.
    many = plan.mode == "blend" and all(
        s <= min(_SIDE[axes], n // _PARTS[axes]) for n, s in zip(plan.canvas, sight.step, strict=True)
    )
    # Of the network's grid; on the scene's it may only be near.
    steps = zip(sight.step if many else sight.stride, plan.grid.shape, plan.canvas, strict=True)
    unit = [max(1, s * n // m) for s, n, m in steps]
    side = [max(u, min(_SIDE[axes], n // _PARTS[axes]) // u * u) for u, n in zip(unit, plan.grid.shape, strict=True)]
    counts = [max(1, n // s) for n, s in zip(plan.grid.shape, side, strict=True)]
    total = prod(counts)
    for number in Random(0).sample(range(total), min(total, _MOST_LOOKS)):
        index = tuple(int(i) for i in np.unravel_index(number, counts))
        yield Box.cell(index, tuple(side), plan.grid.shape)


def _shown(labeller: Labeller, tiles: list[Tile]) -> list[Floats]:
    """What the network sees of these tiles: of each its first window."""
    onlooker = labeller.segmenter
    assert isinstance(onlooker, _Onlooker)
    batches = []
    for tile in tiles:
        onlooker.shown.clear()
        labeller(tile)
        batches.append(onlooker.shown[0])
    return batches
