"""The model card: what a network promises and needs. The only home of pydantic.

A model is a folder with a `card.json` and weights, or the name of a built-in card (`segcore/model/cards`) whose weights
lie in an installed package. Unknown keys are an error, and so are weights with another digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from segcore.errors import CardError, ModelError, PlanError, one_line
from segcore.files import sha256_of
from segcore.spec import STREAMS, Cost, Precision, Runner, Sides, Sight, Weights

_BUILT_IN = Path(__file__).parent / "cards"
#: What a network holds in bf16 or int8, relative to fp32 (measured: 0.46 to 0.57 in one pass; where it can be cropped
#: up to 0.63, of which its scores are counted elsewhere, too).
_SHORT = 0.6


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NetworkClass(_Strict):
    """A network to be built before its weights are filled in: its class, and arguments of its constructor.

    Only classes of MONAI, segmentation-models-pytorch and segflow's own U-Net are ever imported.
    """

    name: Annotated[
        str, Field(pattern=r"^(segcore\.model\.unet|monai\.networks\.nets|segmentation_models_pytorch)\.\w+$")
    ]
    arguments: dict[str, JsonValue] = {}


class Artifact(_Strict):
    """Weights: `path` is relative to the card, or `package:DISTRIBUTION/PATH` for a file of an installed one.

    `network`: what weights in safetensors belong to.
    """

    format: Literal["onnx", "torchscript", "torch-export", "safetensors"]
    path: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    network: NetworkClass | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.format == "safetensors") != (self.network is not None):
            raise ValueError("weights in safetensors need a `network`, and only they do")
        return self


class Channel(_Strict):
    """An input channel.

    `aliases`: other names that will do where none has this one. `valid_range`: where the median of a sensible scene
    lies, in the units before scaling.
    """

    name: Annotated[str, Field(min_length=1)]
    aliases: tuple[str, ...] = ()
    units: str | None = None
    valid_range: tuple[float, float] | None = None


class ClassLabel(_Strict):
    """A class of the mask: its value, its name and its colour (RGB, 0 to 255)."""

    index: Annotated[int, Field(ge=0, le=254)]
    name: Annotated[str, Field(min_length=1)]
    color: tuple[
        Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
    ]


class Affine(_Strict):
    """value x scale + offset, one number for all channels or one for each."""

    step: Literal["affine"] = "affine"
    scale: float | tuple[float, ...] = 1.0
    offset: float | tuple[float, ...] = 0.0


class ClipPercentiles(_Strict):
    """Clip each channel to percentiles (0 to 100) of the valid pixels of the whole scene."""

    step: Literal["clip_percentiles"] = "clip_percentiles"
    lower: Annotated[float, Field(ge=0, le=100)]
    upper: Annotated[float, Field(ge=0, le=100)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.lower >= self.upper:
            raise ValueError(f"lower {self.lower} must be less than upper {self.upper}")
        return self


class Standardise(_Strict):
    """Subtract the mean and divide by the standard deviation of the valid pixels of the whole scene, by channel."""

    step: Literal["standardise"] = "standardise"


class Fill(_Strict):
    """The value that invalid pixels take, in the units at this step."""

    step: Literal["fill"] = "fill"
    value: float


class Probe(_Strict):
    """What else was measured on the network when it was packed, for people to read.

    `sizes`: which sides it accepts (`any`, `multiples of 16`, `256 x 256 only`); `floods`: the layers that see
    everything, and so make a network not local.
    """

    engine: str
    parameters: Annotated[int, Field(ge=0)]
    flops_per_pixel: Annotated[float, Field(ge=0)]
    sizes: str
    floods: tuple[str, ...] = ()


Step = Annotated[Affine | ClipPercentiles | Standardise | Fill, Field(discriminator="step")]


class Card(_Strict):
    """A model's promises. Sizes are in pixels, one for each of `axes`; see the design for the words.

    `spacing` (metres for `yx`, else millimetres) and `orientation` are None for the scene's own. `window` None means
    any size; `reach` must be given exactly where `local` holds: one number for each axis, or a pair where a network
    sees further before than after. `bytes_per_pixel`: what the engine holds for each pixel of a window while it runs.
    Raises pydantic's ValidationError; `load_card` makes it a CardError.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    version: str
    license: str
    citation: str
    description: str = ""
    artifacts: Annotated[tuple[Artifact, ...], Field(min_length=1)]
    axes: Literal["yx", "zyx", "xyz"]
    channels: Annotated[tuple[Channel, ...], Field(min_length=1)]
    spacing: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    orientation: Annotated[str, Field(pattern="^[LR][AP][IS]$")] | None = None
    scaling: tuple[Step, ...] = ()
    padding: Literal["symmetric", "edge", "zero"] = "symmetric"
    stride: tuple[int, ...]
    local: bool
    reach: tuple[int | tuple[int, int], ...] | None = None
    window: tuple[int, ...] | None = None
    fixed_window: bool = False
    overlap: tuple[int, ...] | None = None
    weights: Weights = "cosine"
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    classes: Annotated[tuple[ClassLabel, ...], Field(min_length=2)]
    label_nodata: Literal[255] = 255
    bytes_per_pixel: Annotated[float, Field(gt=0)] = 2000.0
    probe: Probe | None = None

    @field_validator("classes")
    @classmethod
    def _indices_distinct(cls, classes: tuple[ClassLabel, ...]) -> tuple[ClassLabel, ...]:
        if len({label.name for label in classes}) != len(classes):
            raise ValueError("two classes have the same name")
        if [label.index for label in classes] != list(range(len(classes))):
            raise ValueError("classes must be numbered 0, 1, 2, ... in order, as the network's outputs are")
        return classes

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("spacing", "stride", "reach", "window", "overlap"):
            value = getattr(self, field)
            if value is not None and len(value) != len(self.axes):
                raise ValueError(f"{field} {value} needs one number for each of the axes {self.axes!r}")
        if self.local != (self.reach is not None):
            raise ValueError("`reach` must be given for a local network, and only for one")
        if self.orientation and self.axes == "yx":
            raise ValueError("`orientation` is for volumes")
        for step in self.scaling:
            for value in (step.scale, step.offset) if isinstance(step, Affine) else ():
                if isinstance(value, tuple) and len(value) != len(self.channels):
                    raise ValueError(f"an affine step has {len(value)} numbers for {len(self.channels)} channels")
        try:
            self.sight()
        except PlanError as error:
            raise ValueError(str(error)) from error
        return self

    def sight(self, overlap: int | None = None, weights: Weights | None = None) -> Sight:
        """What the planner has to know; `overlap` (pixels) and `weights` override the card's. Raises PlanError."""
        shared = self.overlap
        if overlap is not None and self.window is not None:
            shared = (overlap,) * len(self.axes)
        reach: Sides | None = None
        if self.reach is not None:
            reach = tuple(side if isinstance(side, tuple) else (side, side) for side in self.reach)
        return Sight(self.stride, reach, self.window, shared, self.fixed_window, weights or self.weights)

    @property
    def binary(self) -> bool:
        """Whether a network with a single output will do: the score of class 1, behind a sigmoid."""
        return self.activation == "sigmoid" and len(self.classes) == 2

    def cost(
        self,
        runner: Runner = "onnxruntime",
        weights: int = 0,
        precision: Precision = "fp32",
        least: float = 0.0,
        scores: bool = False,
    ) -> Cost:
        """What a pixel costs the planner, the network run in this; `weights`: bytes of its file; `least`: bytes that
        its graph holds for a pixel, where that is known: a card may say too little; `scores`: whether they are
        published.
        """
        channels, classes = len(self.channels), len(self.classes)
        # Several windows are run side by side, unless torch runs them.
        whole = max(self.bytes_per_pixel, least) * (STREAMS if self.fixed_window and runner != "torch" else 1)
        if precision == "fp32":
            return Cost(channels, classes, whole, runner, weights, scores=scores)
        # The network in fp32, which it was compared with, is kept for the next scene.
        return Cost(channels, classes, _SHORT * whole, runner, 2 * weights, whole, _SHORT, scores)


class Model:
    """A card and where its weights are. `digest` (SHA-256) changes with any of its fields and with the weights."""

    def __init__(self, card: Card, folder: Path) -> None:
        self.card, self.folder = card, folder

    @property
    def digest(self) -> str:
        canonical = json.dumps(self.card.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def built_in(self) -> bool:
        """Whether it is one of segflow's own, whose folder is not the user's."""
        return self.folder.is_relative_to(_BUILT_IN)

    def weights(self) -> tuple[Artifact, Path]:
        """The first artifact and its file, digest checked. Raises CardError, or ModelError without the file."""
        artifact = self.card.artifacts[0]
        try:
            path = self._locate(artifact)
            found = sha256_of(path)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model {self.card.name}: {artifact.path}: {one_line(error)}; install or copy the weights"
            ) from error
        if found != artifact.sha256:
            raise CardError(
                f"model {self.card.name}: {path} has the sha256 {found} and its card says {artifact.sha256}; these are "
                f"not the weights that the card was made for: get them again, or make a new card"
            )
        return artifact, path

    @property
    def weights_bytes(self) -> int:
        """Size of the file that `weights` checks; 0 where there is none."""
        with contextlib.suppress(OSError, ValueError, ModelError):
            return self._locate(self.card.artifacts[0]).stat().st_size
        return 0

    def _locate(self, artifact: Artifact) -> Path:
        if not artifact.path.startswith("package:"):
            path = (self.folder / artifact.path).resolve()
            if not path.is_relative_to(self.folder.resolve()):
                raise CardError(f"model {self.card.name}: {artifact.path} leads out of the model's folder")
            return path
        name, _, inside = artifact.path.removeprefix("package:").partition("/")
        try:
            package = distribution(name)
        except PackageNotFoundError as error:
            raise ModelError(
                f"model {self.card.name} has its weights in the package {name}, which is not installed; run "
                f"`pip install {name}`"
            ) from error
        return Path(str(package.locate_file(inside)))


def built_in_models() -> list[str]:
    """Names of the built-in cards."""
    return sorted(path.parent.name for path in _BUILT_IN.glob("*/card.json"))


def load_card(reference: str) -> Model:
    """The model of this name (a built-in one) or in this folder. Raises CardError with every fault of the card."""
    folder = _BUILT_IN / reference if reference in built_in_models() else Path(reference).absolute()
    path = folder / "card.json" if folder.name != "card.json" else folder
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CardError(
            f"{reference!r} is no built-in model ({', '.join(built_in_models())}) and no folder with a card.json"
        ) from error
    return Model(check_card(text, str(path)), path.parent)


def check_network(fields: dict[str, Any]) -> NetworkClass:
    """The class of a network and its arguments. Raises CardError for a class that is not allowed."""
    try:
        return NetworkClass.model_validate(fields)
    except ValidationError as error:
        raise CardError(
            f"{fields.get('name')!r} is no network that segflow imports: those are segcore.model.unet.UNet, and the "
            f"classes of monai.networks.nets and segmentation_models_pytorch; export others to ONNX and pack that"
        ) from error


def check_card(fields: str | dict[str, Any], where: str) -> Card:
    """A card from its JSON text or its fields. Raises CardError with every fault."""
    try:
        return Card.model_validate_json(fields) if isinstance(fields, str) else Card.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'card'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors(include_url=False)
        )
        raise CardError(f"{where}: {faults}") from error
