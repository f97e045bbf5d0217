"""`segflow model`: the models that are there, what they are, and how to make one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from segcore.errors import CardError
from segcore.model.card import Card, Model, Network, built_in_models, check_network, load_card
from segcore.model.probe import Sighting, bytes_per_pixel, probe
from segcore.spec import Sight, times, usable_cores

models = typer.Typer(no_args_is_help=True, help="The models that are built in, and your own.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
#: Cores for which the overhead of exact tiling is shown (pixels), by number of axes.
_CORES = {2: (512, 1024, 2048, 4096), 3: (64, 128, 256)}


@models.command("list")
def list_models(as_json: AsJson = False) -> None:
    """The built-in models."""
    cards = [load_card(name).card for name in built_in_models()]
    if as_json:
        print(json.dumps({"models": [card.model_dump(mode="json") for card in cards]}, indent=2))
        return
    table = Table("model", "classes", "channels", "license", "what it labels", box=None)
    for card in cards:
        classes = ", ".join(label.name for label in card.classes)
        channels = ", ".join(channel.name for channel in card.channels)
        table.add_row(card.name, classes, channels, card.license, card.description)
    Console().print(table)


@models.command("inspect")
def inspect_model(
    model: Annotated[str, typer.Argument(help="A built-in model, or a folder with a card.json.")],
    as_json: AsJson = False,
) -> None:
    """Measure a network: how far it sees, what it costs, and what that means for tiles.

    Exit code 1 where the card promises something else.
    """
    from segcore.model import open_probe

    loaded = load_card(model)
    card = loaded.card
    found = probe(open_probe(loaded, usable_cores()), len(card.channels), len(card.axes))
    wrong = _contradictions(card, found)
    held = None if wrong else bytes_per_pixel(model, len(card.channels), found)
    if as_json:
        print(json.dumps(_facts(loaded, found, held, wrong), indent=2))
    else:
        _show(loaded, found, held)
        for text in wrong:
            print(f"the card is wrong: {text}")
    raise typer.Exit(1 if wrong else 0)


@models.command("pack")
def pack_model(
    source: Annotated[Path, typer.Argument(help="An ONNX, TorchScript, .pt2, .safetensors or .pt file.")],
    card: Annotated[Path, typer.Option("--card", help="JSON: what cannot be measured (name, channels, classes, ...).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model's folder, which is made.")],
    network: Annotated[
        str | None, typer.Option(help="Class of a state dict's network, such as monai.networks.nets.BasicUNet.")
    ] = None,
    arguments: Annotated[str, typer.Option(help="Its constructor's arguments, a JSON object.")] = "{}",
    as_json: AsJson = False,
) -> None:
    """Make a model folder: weights in every format that works, verified, and a card with what was measured."""
    try:
        draft = json.loads(card.read_text(encoding="utf-8-sig"))
        given = json.loads(arguments)
    except (OSError, ValueError) as error:
        raise CardError(f"{card} or --arguments cannot be read as JSON: {error}") from error
    if not isinstance(draft, dict) or not isinstance(given, dict):
        raise CardError(f"{card} and --arguments must each be a JSON object, in braces")
    described: Network | None = None
    if network is not None:
        described = check_network({"name": network, "arguments": given})
    from segcore.model.pack import pack

    packed = pack(source, draft, out, described)
    if as_json:
        held = packed.model.card.bytes_per_pixel
        print(json.dumps(_facts(packed.model, packed.sighting, held, []) | {"notes": list(packed.notes)}, indent=2))
        return
    _show(packed.model, packed.sighting, packed.model.card.bytes_per_pixel)
    for note in packed.notes:
        print(f"note: {note}")
    print(f"packed into {out}: {', '.join(artifact.path for artifact in packed.model.card.artifacts)}")


def _contradictions(card: Card, found: Sighting) -> list[str]:
    """Where a card promises what the network does not keep."""
    wrong = []
    if any(promised % s for promised, s in zip(card.stride, found.stride, strict=True)):
        wrong.append(f"it gives a stride of {times(card.stride)}, and the network's is {times(found.stride)}")
    elif card.local and found.reach is None:
        wrong.append(f"it says that the network is local, and it is not ({'; '.join(found.floods)})")
    elif card.local and found.reach is not None:
        pairs = zip(card.sight().halo, Sight(card.stride, found.reach).halo, strict=True)
        if any(mine < true for promised, needed in pairs for mine, true in zip(promised, needed, strict=True)):
            wrong.append(f"it gives a reach of {_reach_in_words(card.sight())}, and the network's is {_reach(found)}")
    if found.sizes.fixed and not card.fixed_window:
        wrong.append(f"the network takes images of {found.sizes}, and it does not say `fixed_window`")
    return wrong


def _facts(loaded: Model, found: Sighting, held: float | None, wrong: list[str]) -> dict[str, Any]:
    sight = Sight(found.stride, found.reach)
    tiles = (
        {} if found.reach is None else {str(side): round(_work(sight, side), 3) for side in _CORES[len(sight.stride)]}
    )
    measured = {
        "sizes": str(found.sizes),
        "stride": list(found.stride),
        "local": found.reach is not None,
        "reach": None if found.reach is None else [list(sides) for sides in found.reach],
        "floods": list(found.floods),
        "halo": None if found.reach is None else [list(sides) for sides in sight.halo],
        "work_by_core": tiles,
        "auto": _auto(loaded.card, found),
        "parameters": found.parameters,
        "flops_per_pixel": round(found.flops_per_pixel, 1),
        "bytes_per_pixel": None if held is None else round(held, 1),
        "engine": found.engine,
    }
    card = loaded.card.model_dump(mode="json", exclude_unset=True)
    return {"digest": loaded.digest, "measured": measured, "contradictions": wrong, "card": card}


def _show(loaded: Model, found: Sighting, held: float | None) -> None:
    card, table = loaded.card, Table(show_header=False, box=None)
    table.add_row("model", f"{card.name} {card.version}, {card.license}")
    table.add_row("channels", ", ".join(channel.name for channel in card.channels))
    table.add_row("classes", ", ".join(label.name for label in card.classes))
    table.add_row("engine", found.engine)
    table.add_row("sizes", str(found.sizes))
    table.add_row("stride", f"{times(found.stride)} pixels")
    if found.reach is None:
        table.add_row("local", f"no: {'; '.join(found.floods)}")
    else:
        sight = Sight(found.stride, found.reach)
        table.add_row("local", "yes")
        table.add_row("reach", f"{_reach(found)} pixels")
        table.add_row("halo", f"{times('+'.join(map(str, dict.fromkeys(sides))) for sides in sight.halo)} pixels")
        work = ", ".join(f"{_work(sight, side):.2f} at {side}" for side in _CORES[len(sight.stride)])
        table.add_row("work", f"{work} (pixels computed for each pixel of a tile's core, by its side)")
    table.add_row("auto", _auto(card, found))
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("operations", f"{found.flops_per_pixel:,.0f} for each pixel")
    if held is not None:
        table.add_row(
            "memory", f"{held:,.0f} bytes for each pixel of a window (the card says {card.bytes_per_pixel:g})"
        )
    Console().print(table)


def _work(sight: Sight, side: int) -> float:
    return math.prod((side + before + after) / side for before, after in sight.halo)


def _auto(card: Card, found: Sighting) -> str:
    if found.reach is not None and not found.sizes.fixed:
        return "exact: the whole scene in one tile if it fits, else tiles with a halo"
    if card.window is not None:
        return f"blend: windows of {times(card.window)} every {times(card.sight().step)} pixels"
    return "the whole scene in one tile: it is not local, and its card has no window"


def _reach(found: Sighting) -> str:
    return _reach_in_words(Sight(found.stride, found.reach))


def _reach_in_words(sight: Sight) -> str:
    return times("+".join(map(str, dict.fromkeys(sides))) for sides in sight.reach or ())
