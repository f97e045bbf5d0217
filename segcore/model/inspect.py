"""What was measured on a network, beside what its card says."""

from __future__ import annotations

from math import prod

from segcore.model.card import Card
from segcore.model.probe import Sighting
from segcore.spec import Sight, in_words, times

#: Sides of cores (pixels) for which the overhead of exact tiling is told, by number of axes.
_CORES = {2: (512, 1024, 2048, 4096), 3: (64, 128, 256)}
#: A card may be off by this factor in its memory before it counts as wrong: heaps are not exact.
_MEMORY = 2.0


def too_much_memory(card: Card, held: float) -> list[str]:
    """Whether a network holds far more bytes for each pixel than its card says, in words."""
    if held <= _MEMORY * card.bytes_per_pixel:
        return []
    return [f"the network holds {held:.0f} bytes for each pixel, and it says {card.bytes_per_pixel:g}"]


def contradictions(card: Card, found: Sighting) -> list[str]:
    """Where a card promises what the network does not keep, in words."""
    wrong = []
    if found.sizes.fixed and not card.fixed_window:
        wrong.append(f"the network takes images of {found.sizes}, and it does not say `fixed_window`")
    if found.sizes.fixed and card.fixed_window and card.window != found.sizes.shape:
        wrong.append(f"the network takes images of {found.sizes}, and its window is {times(card.window or ())}")
    if any(promised % s for promised, s in zip(card.stride, found.stride, strict=True)):
        wrong.append(f"it gives a stride of {times(card.stride)}, and the network's is {times(found.stride)}")
    elif card.local and found.reach is None:
        wrong.append(f"it says that the network is local, and it is not ({'; '.join(found.floods)})")
    elif card.local and found.reach is not None:
        promised, needed = card.sight(), Sight(card.stride, found.reach)
        pairs = zip(promised.halo, needed.halo, strict=True)
        if any(mine < true for one, other in pairs for mine, true in zip(one, other, strict=True)):
            said = in_words(promised.reach or ())
            wrong.append(f"it gives a reach of {said}, and the network's is {in_words(found.reach)}")
    return wrong


def work_of_cores(sight: Sight) -> dict[int, float]:
    """Pixels computed for each pixel of a core, by its side, in the middle of a large scene; none if not local."""
    if not sight.local:
        return {}
    return {
        side: prod((side + before + after) / side for before, after in sight.halo) for side in _CORES[len(sight.stride)]
    }


def mode_in_words(card: Card) -> str:
    """What `--mode auto` makes of a card."""
    if card.local and not card.fixed_window:
        return "exact: tiles with a halo, or the whole scene in one where that is small"
    if card.window is not None:
        sight = card.sight()
        windows = f"windows of {times(card.window)} every {times(sight.step)} pixels"
        return f"blend: {windows}, {sight.weights} weights"
    return "the whole scene in one tile: it is not local, and its card has no window"
