"""Files: one home for each format. `open_scene` and `find_scenes` choose between them."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from segcore.errors import SceneError, one_line
from segcore.files import absolute, is_remote, local_path, scene_name
from segcore.io.geotiff import raster_file
from segcore.io.nifti import Nifti
from segcore.io.source import Source, Wanted
from segcore.io.stac import item_ids, item_name, item_scene
from segcore.spec import Settings

_VOLUMES = (".nii", ".nii.gz")
_PAIRS = (".hdr", ".img")
_ITEMS = (".json", ".geojson")
#: What a folder is searched for; anything else is opened when it is named.
_IN_FOLDERS = (".tif", ".tiff", ".jp2", ".vrt", *_VOLUMES)


def open_scene(uri: str, wanted: Wanted, settings: Settings) -> Source:
    """The scene behind a URI, as the model wants to see it; headers only are read. Raises SceneError."""
    if not is_remote(uri) and not local_path(_document(uri) or uri).exists():
        raise SceneError(f"{uri}: there is no such file; check the path")
    # ENVI rasters have headers of the same suffix as NIfTI's pairs: there the model decides.
    if uri.lower().endswith(_VOLUMES) or (uri.lower().endswith(_PAIRS) and wanted.axes != "yx"):
        return Nifti(uri, scene_name(uri), wanted)
    if wanted.axes != "yx":
        raise SceneError(f"{uri} is no volume (.nii, .nii.gz), and the model is made for volumes ({wanted.axes})")
    if _document(uri):
        return item_scene(uri, wanted)
    return raster_file(uri, scene_name(uri), wanted, settings.bands, settings.scale, settings.offset)


def product_name(uri: str) -> str:
    """What the product of a scene is called; no header is read. A broken STAC document goes by its file's name."""
    try:
        return item_name(uri) if _document(uri) else scene_name(uri)
    except SceneError:
        return scene_name(uri)


def _document(uri: str) -> str | None:
    """The path of the STAC document that a URI leads to (`items.json#id` leads into one), None for other files."""
    path = uri.partition("#")[0]
    return next((p for p in (uri, path) if p.lower().endswith(_ITEMS)), None)


def find_scenes(arguments: Sequence[str]) -> list[str]:
    """The URIs of the scenes that the arguments name, absolute, in order, each once.

    An argument is a file, a folder (its rasters and volumes, not those of its folders), a glob, a text file with one
    argument a line, a STAC Item or ItemCollection, or a remote URI. Raises SceneError for one that leads nowhere.
    """
    found: dict[str, None] = {}
    for argument in arguments:
        try:
            found |= dict.fromkeys(_expand(argument, frozenset()))
        except (OSError, ValueError) as error:
            raise SceneError(f"{argument!r}: {one_line(error)}; check the path") from error
    return list(found)


def _expand(argument: str, lists: frozenset[Path]) -> Iterator[str]:
    """`lists`: the list files that led here."""
    if is_remote(argument):
        yield argument
        return
    path = local_path(_document(argument) or argument)
    if path.is_dir():
        found = sorted(str(file) for file in path.iterdir() if file.name.lower().endswith(_IN_FOLDERS))
        if not found:
            raise SceneError(f"{argument} is a folder without a scene ({', '.join(_IN_FOLDERS)}); name another one")
        yield from map(absolute, found)
    elif path.suffix.lower() == ".txt" and path.is_file():
        yield from _listed(path, lists)
    elif path.suffix.lower() in _ITEMS and path.is_file():
        yield from _items(argument)
    elif path.exists():
        yield absolute(argument)
    elif glob.has_magic(argument) and (matches := sorted(glob.glob(argument, recursive=True))):
        for match in matches:
            yield from _expand(match, lists)
    else:
        raise SceneError(f"{argument}: there is no such file; check the path")


def _items(argument: str) -> Iterator[str]:
    """A STAC document, or each Item of a collection. A broken one is passed on: it fails as a scene of its own."""
    ids = None
    if _document(argument) == argument:
        with contextlib.suppress(SceneError):
            ids = item_ids(argument)
    yield from [absolute(argument)] if ids is None else [f"{absolute(argument)}#{item_id}" for item_id in ids]


def _listed(path: Path, lists: frozenset[Path]) -> Iterator[str]:
    """The arguments in a text file, relative to its folder; empty lines and those that begin with # are left out."""
    if path.resolve() in lists:
        raise SceneError(f"{path} lists itself; remove that line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise SceneError(f"{path} lists no scene; write one path a line")
    for entry in entries:
        relative = not is_remote(entry) and not Path(entry).is_absolute()
        yield from _expand(str(path.parent / entry) if relative else entry, lists | {path.resolve()})
