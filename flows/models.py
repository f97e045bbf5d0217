"""`segflow model`: the models that are there, what they are, and how to make one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from segcore.errors import CardError
from segcore.model.card import Model, NetworkClass, built_in_models, check_network, load_card
from segcore.model.inspect import contradictions, mode_in_words, too_much_memory, work_of_cores
from segcore.model.memory import bytes_per_pixel
from segcore.model.probe import Sighting, probe
from segcore.spec import Sight, in_words, times, usable_cores

models = typer.Typer(no_args_is_help=True, help="The models that are built in, and your own.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@models.command("list")
def list_models(as_json: AsJson = False) -> None:
    """The built-in models."""
    cards = [load_card(name).card for name in built_in_models()]
    if as_json:
        print(json.dumps({"models": [card.model_dump(mode="json") for card in cards]}, indent=2))
        return
    table = Table(Column("model", no_wrap=True), "what it labels", box=None, padding=(0, 1, 1, 0))
    for card in cards:
        classes = ", ".join(label.name for label in card.classes)
        channels = ", ".join(channel.name for channel in card.channels)
        lines = card.description, f"classes: {classes}", f"channels: {channels}", f"license: {card.license}"
        table.add_row(card.name, "\n".join(lines))
    Console().print(table)


@models.command("inspect")
def inspect_model(
    model: Annotated[str, typer.Argument(help="A built-in model, or a folder with a card.json.")],
    as_json: AsJson = False,
) -> None:
    """Measure a network: how far it sees, what it costs, and what that means for tiles.

    Exit code 1 where the card promises something else.
    """
    from segcore.model import open_network

    loaded = load_card(model)
    card = loaded.card
    found = probe(open_network(loaded, usable_cores()), len(card.channels), len(card.axes))
    wrong = contradictions(card, found)
    held = None
    if not wrong:  # a network that does not keep its card's promise does not load to be measured
        held = bytes_per_pixel(model, len(card.channels), found, card.window)
        wrong = too_much_memory(card, held)
    if as_json:
        print(json.dumps(_facts(loaded, found, held, wrong), indent=2))
    else:
        _show(loaded, found, held)
        for text in wrong:
            print(f"the card is wrong: {text}")
    raise typer.Exit(1 if wrong else 0)


@models.command("pack")
def pack_model(
    source: Annotated[Path, typer.Argument(help="An ONNX, TorchScript, .safetensors or .pt file.")],
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
    described: NetworkClass | None = None
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


def _facts(loaded: Model, found: Sighting, held: float | None, wrong: list[str]) -> dict[str, Any]:
    sight = Sight(found.stride, found.reach)
    work = {str(side): round(factor, 3) for side, factor in work_of_cores(sight).items()}
    measured = {
        "sizes": str(found.sizes),
        "stride": list(found.stride),
        "local": found.reach is not None,
        "reach": None if found.reach is None else [list(sides) for sides in found.reach],
        "floods": list(found.floods),
        "halo": None if found.reach is None else [list(sides) for sides in sight.halo],
        "work_by_core": work,
        "auto": mode_in_words(loaded.card),
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
        table.add_row("reach", f"{in_words(found.reach)} pixels")
        table.add_row("halo", f"{in_words(sight.halo)} pixels")
        work = ", ".join(f"{factor:.2f} at {side}" for side, factor in work_of_cores(sight).items())
        table.add_row("work", f"{work} (pixels computed for each pixel of a tile's core, by its side)")
    table.add_row("auto", mode_in_words(card))
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("operations", f"{found.flops_per_pixel:,.0f} for each pixel")
    if held is not None:
        table.add_row(
            "memory", f"{held:,.0f} bytes for each pixel of a window (the card says {card.bytes_per_pixel:g})"
        )
    Console().print(table)
