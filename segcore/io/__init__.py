"""Files: one home for each format. `open_scene` chooses between them, `find_scenes` says what there is to open."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from segcore.errors import SceneError
from segcore.files import is_remote, local_path, safe_name, scene_name
from segcore.io.find import find_scenes
from segcore.io.found import Found, Problem
from segcore.io.geotiff import raster_file
from segcore.io.nifti import Nifti
from segcore.io.source import Source, Wanted
from segcore.io.stac import item_name, item_of, item_scene
from segcore.spec import Settings

__all__ = ["Found", "Problem", "find_scenes", "open_scene", "product_name", "product_names"]

_VOLUMES = (".nii", ".nii.gz")
_PAIRS = (".hdr", ".img")


def open_scene(uri: str, wanted: Wanted, settings: Settings, name: str | None = None) -> Source:
    """The scene behind a URI, as the model wants to see it; headers only are read. Raises SceneError.

    `name`: what its product is called (`product_names`); by default `product_name` of the URI.
    """
    leads = item_of(uri)
    if not is_remote(uri) and not local_path(leads[0] if leads else uri).exists():
        raise SceneError(f"{uri}: there is no such file; check the path")
    # ENVI rasters have headers of the same suffix as NIfTI's pairs: there the model decides.
    if uri.lower().endswith(_VOLUMES) or (uri.lower().endswith(_PAIRS) and wanted.axes != "yx"):
        return Nifti(uri, name or scene_name(uri), wanted)
    if wanted.axes != "yx":
        raise SceneError(f"{uri} is no volume (.nii, .nii.gz), and the model is made for volumes ({wanted.axes})")
    if leads:
        return item_scene(uri, wanted, name)
    return raster_file(uri, name or scene_name(uri), wanted, settings.bands, settings.scale, settings.offset)


def product_name(uri: str) -> str:
    """What the product of a scene is called; no header is read. A broken STAC document goes by its file's name."""
    try:
        return item_name(uri) if item_of(uri) else scene_name(uri)
    except SceneError:
        return scene_name(uri)


def product_names(uris: Sequence[str], folders: int = 0) -> dict[str, str]:
    """What the product of each scene is called, with the names of `folders` folders in front, outermost first.

    For archives whose files are called alike: with one folder, `T33UUP_20240101/B02.tif` is `T33UUP_20240101_B02`. A
    scene with fewer folders above it has all of them. Names may still be the same: whoever writes products refuses.
    """
    return {uri: safe_name("_".join([*_folders(uri, folders), product_name(uri)])) for uri in uris}


def _folders(uri: str, count: int) -> list[str]:
    """The names of the innermost folders above a scene, outermost first."""
    if count < 1:
        return []
    leads = item_of(uri)
    place = leads[0] if leads else uri
    path = unquote(urlsplit(place).path) if is_remote(place) else str(local_path(place))
    # A STAC API keeps the Items of a collection in `.../collections/COLLECTION/items/ID`.
    path = re.sub(r"/collections/([^/]+)/items/([^/]+)/?$", r"/\1/\2", path)
    return [name for name in PurePosixPath(path).parent.parts if name.strip("/")][-count:]
