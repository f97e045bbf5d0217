"""The options of `segflow` that several of its commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from segcore.spec import Settings, parse_bytes


class ModeName(StrEnum):
    """`--mode`."""

    auto = "auto"
    exact = "exact"
    blend = "blend"


class PrecisionName(StrEnum):
    """`--precision`."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class EngineName(StrEnum):
    """`--engine`."""

    auto = "auto"
    onnxruntime = "onnxruntime"
    openvino = "openvino"


class WeightsName(StrEnum):
    """`--weights`."""

    cosine = "cosine"
    gaussian = "gaussian"
    constant = "constant"


Scenes = Annotated[list[str], typer.Argument(help="Files, folders, globs, list files (.txt) or STAC Items.")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="A built-in model, or a folder with a card.json.")]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder for the products.")]
Memory = Annotated[
    str | None, typer.Option(help="Memory of a worker process, such as 4GiB; default: half of what is free.")
]
TileSide = Annotated[int | None, typer.Option("--tile", help="Side of a tile's core in pixels; default: planned.")]
ModeOption = Annotated[ModeName, typer.Option("--mode", help="How tiles are joined; auto asks the model's card.")]
Overlap = Annotated[int | None, typer.Option(help="Pixels that windows share in blend mode; default: the card's.")]
WeightsOption = Annotated[
    WeightsName | None, typer.Option("--weights", help="How windows are blended; default: the card's.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(help="Accept scores that differ by this from the whole image's, for a shorter halo; default: none."),
]
PrecisionOption = Annotated[
    PrecisionName,
    typer.Option(
        "--precision", help="Numbers that the network computes in; bf16, int8: once they have proved themselves."
    ),
]
EngineOption = Annotated[
    EngineName, typer.Option("--engine", help="What runs an ONNX network in fp32; auto: the quicker one.")
]
Agreement = Annotated[
    float, typer.Option(help="Share of labels that must be those of fp32, or --precision is refused.")
]
Scores = Annotated[bool, typer.Option("--scores", help="Write the score of every class, too.")]
Bands = Annotated[str | None, typer.Option(help="Names of a raster's bands in file order, such as blue,green,red,nir.")]
Scale = Annotated[float | None, typer.Option(help="Of a raster that carries none: value = stored x scale + offset.")]
Offset = Annotated[float | None, typer.Option(help="See --scale.")]
Cluster = Annotated[
    str | None, typer.Option(help="Address of a dask scheduler (tcp://...), or a cluster file (.yaml); default: none.")
]
Processes = Annotated[
    int | None,
    typer.Option("--workers", min=0, help="Worker processes; 0: threads of this one. Default: 1, and 0 for one scene."),
]
MaxScenes = Annotated[int | None, typer.Option(help="Begin at most so many scenes that take work, then exit with 75.")]
StopAfter = Annotated[str | None, typer.Option(help="Stop after so long, such as 6h, and exit with 75.")]
MaxFailureRate = Annotated[float | None, typer.Option(help="Stop when more than this part of the scenes fails.")]
TileTimeout = Annotated[str | None, typer.Option(help="Time that a tile is given, such as 10m; then its worker ends.")]
SceneTimeout = Annotated[str | None, typer.Option(help="Time that the tiles of a scene are given, such as 4h.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Try scenes that are quarantined again, too.")]
NameFolders = Annotated[
    int, typer.Option(min=0, help="Put the names of so many folders in front of a product's name: T33UUP_20240101_B02.")
]
LeasesUrl = Annotated[
    str | None,
    typer.Option("--leases", help="Where hosts agree who labels a scene (s3://bucket/prefix, a mounted folder)."),
]
ScenesAtOnce = Annotated[int | None, typer.Option(help="Scenes that are labelled side by side; default: 3.")]


def settings_of(
    memory: str | None,
    tile: int | None,
    mode: ModeName,
    overlap: int | None,
    weights: WeightsName | None,
    tolerance: float | None,
    precision: PrecisionName,
    engine: EngineName,
    agreement: float,
    scores: bool,
    bands: str | None,
    scale: float | None,
    offset: float | None,
) -> Settings:
    """The settings that these options come to. Raises PlanError."""
    names = tuple(name.strip() for name in bands.split(",")) if bands else None
    return Settings(
        memory=parse_bytes(memory) if memory is not None else None,
        tile=tile,
        mode=mode.value,
        overlap=overlap,
        weights=weights.value if weights else None,
        tolerance=tolerance,
        precision=precision.value,
        engine=engine.value,
        agreement=agreement,
        scores=scores,
        bands=names,
        scale=scale,
        offset=offset,
    )
