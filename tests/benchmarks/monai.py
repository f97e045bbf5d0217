"""segflow against MONAI's sliding windows: the same network, the same weights, the same image."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path

from benchmarks import models, scenes, segflow
from benchmarks.agreement import boxes_of, change, format_boxes, kept, read_labels, read_scores, same_labels
from benchmarks.bare import passes
from benchmarks.measure import Measured, in_turn, peer, start_up
from benchmarks.table import Row
from benchmarks.table import table as markdown_table
from segcore.box import Box

#: Side of MONAI's windows, by number of axes.
ROI = {2: 256, 3: 96}
AGREE, CHANGE = "labels as the whole image's", "scores differ by"


def arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--side", type=int, default=8000, help="of the mosaic, in pixels, a multiple of 16")
    parser.add_argument("--voxels", type=int, default=256, help="side of the volume, a multiple of 16")
    parser.add_argument("--cube", type=int, default=128, help="side of the bare pass in 3-D, a multiple of 16")
    parser.add_argument("--tasks", default="2d", help="2d, 3d or 2d,3d")
    parser.add_argument("--small", action="store_true", help="in 2-D: the small U-Net of the sweep, so that it ends")
    parser.add_argument("--overlaps", default="0.25,0.5", help="of MONAI's windows")
    parser.add_argument("--layouts", default="contiguous,channels_last", help="of MONAI's images")
    parser.add_argument("--precisions", default="bf16,int8", help="in which segflow is run, too, unless --small")
    parser.add_argument("--memory", help="segflow's budget; default: its own")
    parser.add_argument("--runs", type=int, default=1)


def table(options: argparse.Namespace) -> Iterator[str]:
    """segflow from COG to COG against MONAI's sliding windows over an image in memory, and against the whole image.

    At its default of 8 000 x 8 000 pixels it takes the better part of an hour on two cores: `--side 2000` is for
    trials. MONAI: roi 256 (96 in 3-D), batches of 4, gaussian weights; seconds of the inference alone. segflow: from
    file to product, start-up of Python left out.
    """
    if any(n % 16 for n in (options.side, options.voxels, options.cube)):
        raise SystemExit("sides must be multiples of 16, the stride of the network")
    if options.side < ROI[2] or options.voxels < ROI[3]:
        # MONAI pads what is smaller than its window with zeros, and then there is nothing to compare.
        raise SystemExit(f"--side must be {ROI[2]} or more, and --voxels {ROI[3]}: MONAI's window")
    for task in options.tasks.split(","):
        yield _compare(options, {"2d": "yx", "3d": "zyx"}[task])


def _compare(options: argparse.Namespace, axes: str) -> str:
    dims = len(axes)
    model = models.small_unet() if options.small and dims == 2 else models.basic_unet(axes)
    scene = scenes.mosaic(options.side) if dims == 2 else scenes.volume(options.voxels)
    shape = (options.side if dims == 2 else options.voxels,) * dims
    boxes, mpx, unit = boxes_of(shape), prod(shape) / 1e6, {2: "Mpx", 3: "Mvoxel"}[dims]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        settings = ("--memory", options.memory) if options.memory else ()
        windows = _windows(scene, model, folder, boxes, dims, options)
        ours: dict[str, tuple[object, ...]] = {"segflow": settings}
        if dims == 3:  # what is proved of a network takes seconds, once on a machine
            ours["segflow, once it is proved"] = settings
        wanted = options.precisions if segflow.knows("--precision") and not options.small else ""
        for precision in filter(None, wanted.split(",")):
            # Random weights decide by a hair: they are timed whatever they agree, and the table says how much that is.
            ours[f"segflow, {precision}"] = (*settings, "--precision", precision, "--agreement", "0.01")
        if "segflow, int8" in ours:  # made and proved in the first run, and only proved in the next
            ours["segflow, int8, its network kept"] = ours["segflow, int8"]
        contestants: dict[str, Callable[[], Measured]] = dict(windows)
        for name, given in ours.items():
            contestants[name] = partial(segflow.label, scene, model, folder / name, *given)
        os.environ["SEGFLOW_CACHE"] = str(folder / "cache")
        start_up()
        found = in_turn(contestants, options.runs)
        reference = _reference(scene, model, folder, boxes)
        rows = []
        for name, measured in found.items():
            more = {"engine": str(measured.said.get("engine", ""))}
            if name in ours:
                product = segflow.Labelled(folder / name, scene)
                mask = Path(f"{product.stem}_mask{'.tif' if dims == 2 else '.nii.gz'}")
                more = {
                    "engine": product.engine,
                    AGREE: f"{same_labels(read_labels(mask, axes, boxes), reference):.4%}",
                }
                if dims == 3 or len(boxes) == 1:
                    more |= {CHANGE: f"{_score_change(scene, model, folder, ours[name], axes, boxes, reference):.1g}"}
            else:
                scores = kept(folder / f"{name}.npz")
                labels = [values.argmax(0) for values in scores]
                more |= {AGREE: f"{same_labels(labels, reference):.4%}", CHANGE: f"{change(scores, reference):.1g}"}
            rows.append(Row(name, measured, mpx, more))
    title = f"{model.name}, {' x '.join(map(str, shape))}"
    if dims == 2:
        return f"{markdown_table(title, rows, unit=unit)}\n\n{_footnote(start_up(), boxes)}"
    cube = (options.cube,) * 3
    bare = passes(f"one bare pass over {options.cube}^3", peer("forward", model, *cube), prod(cube) / 1e6)
    return f"{markdown_table(title, [*bare, *rows], unit=unit)}\n\n{_footnote(start_up(), boxes)}"


def _windows(
    scene: Path, model: Path, folder: Path, boxes: list[Box], dims: int, options: argparse.Namespace
) -> dict[str, Callable[[], Measured]]:
    """MONAI's contestants: several overlaps, several layouts of memory."""
    made: dict[str, Callable[[], Measured]] = {}
    for overlap in options.overlaps.split(","):
        for layout in options.layouts.split(","):
            name = f"MONAI, overlap {overlap}{', channels last' if layout == 'channels_last' else ''}"
            made[name] = partial(
                peer, "windows", scene, model, folder / f"{name}.npz", format_boxes(boxes),
                "--roi", ROI[dims], "--overlap", overlap, "--layout", layout, "--device", options.device,
            )  # fmt: skip
    return made


def _reference(scene: Path, model: Path, folder: Path, boxes: list[Box]) -> list:  # type: ignore[type-arg]
    peer("whole", scene, model, folder / "whole.npz", format_boxes(boxes))
    return kept(folder / "whole.npz")


def _score_change(
    scene: Path,
    model: Path,
    folder: Path,
    given: tuple[object, ...],
    axes: str,
    boxes: list[Box],
    reference: list,  # type: ignore[type-arg]
) -> float:
    """A run of its own, which is not timed: scores are not among what the others make."""
    out = folder / "scores"
    segflow.label(scene, model, out, "--scores", *given)
    suffix = ".tif" if len(axes) == 2 else ".nii.gz"
    path = Path(f"{segflow.Labelled(out, scene).stem}_scores{suffix}")
    return change(read_scores(path, len(reference[0]), axes, boxes), reference)


def _footnote(start: Measured, boxes: list[Box]) -> str:
    compared = "the whole image" if len(boxes) == 1 and not any(boxes[0].start) else "crops of the image"
    size = " x ".join(map(str, boxes[0].shape))
    return (
        f"segflow's start-up ({start.wall:.1f} s, {start.cpu:.1f} s of CPU) is left out, as is all that MONAI does "
        f"before and after the inference. Agreement was measured on {len(boxes)} of {size} ({compared}), against torch "
        f"on the image in one piece, or with all that the network sees around them."
    )
