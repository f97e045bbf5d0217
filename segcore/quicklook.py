"""The quicklook: a PNG that shows the image, the mask over it and a legend. The only home of Pillow."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from segcore.errors import ProductError
from segcore.io.source import Floats, Labels, Legend

Pixels = NDArray[np.uint8]

#: Longest side of a panel, in pixels.
PANEL = 640
#: Longest side of a thumbnail, in pixels: twice what a page shows, for fine screens.
THUMBNAIL = 112
#: Under which name the quicklook carries its thumbnail, as a text of the PNG: a page of thousands decodes no picture.
_THUMBNAIL = "segflow:thumbnail"
_GAP, _INK, _PAPER, _FAINT = 12, (35, 40, 48), (255, 255, 255), (110, 118, 128)
#: Colour of pixels that are not valid.
_INVALID = (200, 200, 200)


@dataclass(frozen=True, slots=True)
class View:
    """A scene, thinned for a picture: image (C, *small), labels (*small), and size of a pixel per axis.

    `channels`: names of those that the image has, which need not be all (`shown_channels`).
    """

    title: str
    axes: str
    channels: tuple[str, ...]
    image: Floats
    labels: Labels
    spacing: tuple[float, ...]


def preview_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape to thin a scene to before it is drawn; at most 768 pixels a side, or 256 voxels."""
    longest = 768 if len(shape) == 2 else 256
    factor = max(1.0, max(shape) / longest)
    return tuple(max(1, round(n / factor)) for n in shape)


def shown_channels(names: Sequence[str]) -> tuple[int, ...]:
    """Positions of the channels that are shown as red, green and blue; of one, if there are too few."""
    lower = [name.lower() for name in names]
    if {"red", "green", "blue"} <= set(lower):
        return lower.index("red"), lower.index("green"), lower.index("blue")
    return (0, 1, 2) if len(names) >= 3 else (0,)


def draw_quicklook(path: Path, view: View, legend: Legend, fractions: Mapping[int, float]) -> Path:
    """Write the picture to `path`. `fractions`: share of each class among valid pixels. Raises ProductError."""
    colours = np.zeros((256, 3), np.uint8)
    for index, _, rgb in legend.classes:
        colours[index] = rgb
    stretch = _Stretch.of(view)
    rows = [_slice_row(view, stretch, colours, legend, axis) for axis in _cuts(view)]
    picture = _compose(rows, view, legend, fractions)
    facts = PngInfo()
    facts.add_text(_THUMBNAIL, base64.b64encode(_thumbnail(rows[0][-1])).decode())
    try:
        picture.save(path, pnginfo=facts)  # to optimize it would take longer than all the rest of a small scene
    except OSError as error:
        raise ProductError(f"cannot write {path}: {error.strerror or error}", retryable=True) from error
    return path


def read_thumbnail(quicklook: Path) -> bytes:
    """The WebP that a quicklook carries: the mask over the image. Of one that carries none, the whole sheet, small.

    Raises ProductError where there is no picture.
    """
    try:
        with Image.open(quicklook) as picture:
            carried = picture.info.get(_THUMBNAIL)
            return base64.b64decode(carried, validate=True) if carried else _thumbnail(picture)
    except (OSError, ValueError, TypeError) as error:
        raise ProductError(f"{quicklook} is no quicklook ({error}); label the scene again") from error


def _thumbnail(picture: Image.Image) -> bytes:
    small, out = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, reducing_gap=2.0)
    small.save(out, "WEBP", quality=62)
    return out.getvalue()


def draw_comparison(
    path: Path, masks: Sequence[tuple[str, Labels]], colours: Mapping[int, tuple[int, int, int]]
) -> Path:
    """Write a picture of two masks (*small) side by side, each under its name, and of where they differ."""
    palette = np.full((256, 3), 200, np.uint8)
    for index, rgb in colours.items():
        palette[index] = rgb
    (_, first), (_, second) = masks
    differ = np.where((first != second)[..., None], np.array((210, 40, 40), np.uint8), np.uint8(235))
    panels = [*((name, palette[labels]) for name, labels in masks), ("differ", differ)]
    images = [(name, _fit(pixels, (1.0, 1.0))) for name, pixels in panels]
    width = sum(image.width + _GAP for _, image in images) + _GAP
    sheet = Image.new("RGB", (width, max(image.height for _, image in images) + 44 + _GAP), _PAPER)
    draw, x = ImageDraw.Draw(sheet), _GAP
    for name, image in images:
        draw.text((x, 12), name, fill=_INK, font=ImageFont.load_default(20))
        sheet.paste(image, (x, 44))
        x += image.width + _GAP
    sheet.save(path, optimize=True)
    return path


def _cuts(view: View) -> list[int | None]:
    """What to show: the image itself, or a cut across each axis of a volume."""
    return [None] if len(view.axes) == 2 else [view.axes.index(letter) for letter in "zyx"]


def _slice_row(view: View, stretch: _Stretch, colours: Pixels, legend: Legend, axis: int | None) -> list[Image.Image]:
    """The image and the image under its mask, across one axis; the vertical axis of a volume points up."""
    image, labels, spacing = view.image, view.labels, view.spacing
    if axis is not None:
        at = _busiest(labels, axis, legend)
        image, labels = np.take(image, at, axis=axis + 1), np.take(labels, at, axis=axis)
        # Vertical in the picture is z, or y where z is cut; flipped, as voxels count upwards and pictures down.
        shown = sorted((i for i in range(3) if i != axis), key=lambda i: "zyx".index(view.axes[i]))
        order = [sorted(shown).index(i) for i in shown]
        image, labels = image.transpose(0, *(o + 1 for o in order))[:, ::-1], labels.transpose(order)[::-1]
        spacing = tuple(spacing[i] for i in shown)
    base = stretch(image)
    base[labels == legend.nodata] = _INVALID
    over = _overlay(base, labels, colours, legend)
    return [_fit(base, spacing), _fit(over, spacing)]


def _busiest(labels: Labels, axis: int, legend: Legend) -> int:
    """Where along an axis most pixels are of a class other than the first; the middle where none is."""
    found = (labels > 0) & (labels != legend.nodata)
    counts = found.sum(axis=tuple(i for i in range(labels.ndim) if i != axis))
    return int(np.argmax(counts)) if counts.any() else labels.shape[axis] // 2


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Which channels are shown as red, green and blue, each from its 2nd to its 98th percentile."""

    channels: tuple[int, int, int]
    limits: dict[int, tuple[float, float]]

    @classmethod
    def of(cls, view: View) -> _Stretch:
        red, *others = shown_channels(view.channels)
        green, blue = others or (red, red)
        channels, limits = (red, green, blue), {}
        for channel in set(channels):
            valid = view.image[channel][~np.isnan(view.image[channel])]
            low, high = np.percentile(valid, [2, 98]) if valid.size else (0.0, 1.0)
            limits[channel] = float(low), float(high)
        return cls(channels, limits)

    def __call__(self, image: Floats) -> Pixels:
        """Eight-bit colours (rows, cols, 3) of an image (C, rows, cols); invalid pixels are grey."""
        out = np.empty((*image.shape[1:], 3), np.uint8)
        for place, channel in enumerate(self.channels):
            low, high = self.limits[channel]
            with np.errstate(over="ignore"):  # of values near the largest float, which are clipped below
                stretched = (np.nan_to_num(image[channel], nan=low) - low) / max(high - low, 1e-12)
            out[..., place] = np.clip(stretched, 0, 1) ** 0.8 * 255
        out[np.isnan(image).any(axis=0)] = _INVALID
        return out


def _overlay(base: Pixels, labels: Labels, colours: Pixels, legend: Legend) -> Pixels:
    """The mask over the image: classes tinted (the first one only lightly), their outer pixels in full colour."""
    strength = np.full(256, 0.45, np.float32)
    strength[0], strength[legend.nodata] = 0.12, 0.0
    padded = np.pad(labels, 1, mode="edge")
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    outer = np.any([labels != other for other in around], axis=0) & (labels != 0) & (labels != legend.nodata)
    alpha = np.where(outer, np.float32(1), strength[labels])[..., None]
    mixed: Pixels = np.rint(base * (1 - alpha) + colours[labels] * alpha).astype(np.uint8)
    return mixed


def _fit(pixels: Pixels, spacing: Sequence[float]) -> Image.Image:
    """A panel of at most PANEL pixels a side, with the proportions that the scene has in the world.

    A small scene shows its pixels, each as large as the others: nothing is made up between them, and the file is small.
    """
    height, width = (n * s for n, s in zip(pixels.shape[:2], spacing, strict=True))
    factor, how = PANEL / max(height, width), Image.Resampling.BILINEAR
    if factor * min(spacing) >= 2:
        factor, how = int(factor * min(spacing) + 1e-9) / min(spacing), Image.Resampling.NEAREST
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return Image.fromarray(pixels).resize(size, how)


def _compose(rows: list[list[Image.Image]], view: View, legend: Legend, fractions: Mapping[int, float]) -> Image.Image:
    """Panels, title and legend on one sheet. The cuts of a volume stand side by side, the image above its mask."""
    grid = rows if len(rows) == 1 else [list(column) for column in zip(*rows, strict=True)]
    if len(rows) > 1:
        height = PANEL // 2
        grid = [[panel.resize((max(1, panel.width * height // panel.height), height)) for panel in row] for row in grid]
    text, small = ImageFont.load_default(20), ImageFont.load_default(16)
    entries = [(f"{name}  {fractions.get(index, 0):.1%}", rgb) for index, name, rgb in legend.classes]
    widths = [int(small.getlength(label)) + 44 for label, _ in entries]
    inner = max(
        *(sum(panel.width for panel in row) + _GAP * (len(row) - 1) for row in grid),
        min(sum(widths), 1200),
        int(text.getlength(view.title)),
    )
    lines = _wrap(widths, inner)
    top = 44
    body = sum(max(panel.height for panel in row) + _GAP for row in grid)
    sheet = Image.new("RGB", (inner + 2 * _GAP, top + body + 30 * len(lines) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 12), view.title, fill=_INK, font=text)
    y = top
    for row in grid:
        x = _GAP
        for panel in row:
            sheet.paste(panel, (x, y))
            x += panel.width + _GAP
        y += max(panel.height for panel in row) + _GAP
    for line in lines:
        x = _GAP
        for entry in line:
            label, rgb = entries[entry]
            draw.rectangle((x, y + 4, x + 22, y + 20), fill=rgb, outline=_FAINT)
            draw.text((x + 30, y + 3), label, fill=_INK, font=small)
            x += widths[entry]
        y += 30
    return sheet


def _wrap(widths: Sequence[int], limit: int) -> list[list[int]]:
    """Positions of the legend's entries, line by line."""
    lines: list[list[int]] = [[]]
    used = 0
    for position, width in enumerate(widths):
        if lines[-1] and used + width > limit:
            lines.append([])
            used = 0
        lines[-1].append(position)
        used += width
    return lines
