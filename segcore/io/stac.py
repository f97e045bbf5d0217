"""STAC: Items as scenes that are sets of band files, and Items as manifests. The only home of pystac.

Reads STAC 1.0 (`eo:bands`, `raster:bands`) and 1.1 (`bands`) alike: what a band is called (`common_name`), and how its
stored numbers become physical ones (`scale`, `offset`, `nodata`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urlsplit

import pystac

from segcore.errors import SceneError, one_line
from segcore.files import SCENE_SUFFIXES, is_remote, safe_name, scene_name
from segcore.io.documents import DOCUMENTS, Document, read_json, resolve
from segcore.io.geotiff import Band, Raster
from segcore.io.source import Wanted
from segcore.io.web import is_web

PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
FILE = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
#: How STAC writes the values of nodata that JSON has no number for.
_NOT_FINITE = ("nan", "inf", "-inf")
#: A path or an address of object storage that leads to, or into, a document.
_INTO = re.compile(r"(.*?\.(?:geo)?json)(?:#(.*))?", re.IGNORECASE | re.DOTALL)
CLASSIFICATION = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"


def read_document(uri: str) -> Document:
    """The Item or ItemCollection behind a URI. Raises SceneError."""
    document = read_json(uri)
    if document.type not in ("Feature", "FeatureCollection"):
        raise SceneError(
            f"{uri} is no STAC Item or ItemCollection: its `type` is neither Feature nor FeatureCollection"
        )
    if document.type == "FeatureCollection" and collection_ids(document) is None:
        raise SceneError(f"{uri} is an ItemCollection whose `features` are not Items with ids of their own")
    return document


def collection_ids(document: Document) -> list[str] | None:
    """The ids of the Items of an ItemCollection, None where some lack one or share one."""
    features = document.value.get("features")
    ids = [str(f.get("id")) for f in features if isinstance(f, dict)] if isinstance(features, list) else []
    return ids if ids and len(ids) == len(features) == len(set(ids)) else None


def item_of(uri: str) -> tuple[str, str] | None:
    """The STAC document that a URI leads to and the id behind its `#`, which may be empty; None for other files.

    A remote Item need not have a suffix: there the id is the sign.
    """
    if is_web(uri):
        address, item_id = urldefrag(uri)
        path = urlsplit(address).path.lower()
        is_document = path.endswith(DOCUMENTS) or (item_id and not path.endswith(SCENE_SUFFIXES))
        return (address, unquote(item_id)) if is_document else None
    match = _INTO.fullmatch(uri)
    return (match[1], match[2] or "") if match else None


def item_uri(address: str, item_id: str | None = None) -> str:
    """The URI by which an Item at an address is known: with its id, where the address does not say it.

    Without an id, one of STAC's own addresses ends with it (`.../items/ID`).
    """
    if not is_web(address):
        return address
    address = urldefrag(address).url
    path = urlsplit(address).path.rstrip("/")
    if path.lower().endswith(DOCUMENTS) and item_id in (None, unquote(PurePosixPath(path).stem)):
        return address
    return f"{address}#{quote(item_id, safe='') if item_id else PurePosixPath(path).name}"


def item_name(uri: str) -> str:
    """What the product of an Item is called: its id, made safe as a file name. Raises SceneError.

    A local document is read for it; a remote one goes by the id or the file name in its URI.
    """
    address, item_id = item_of(uri) or (uri, "")
    if item_id:
        return safe_name(item_id)
    return scene_name(address) if is_remote(uri) else safe_name(str(read_document(address).value.get("id")))


def item_scene(uri: str, wanted: Wanted, name: str | None = None) -> Raster:
    """The scene that a STAC Item describes: for each channel, the asset band with its `common_name`, or its name.

    `uri` is a document with an Item, or with an ItemCollection and `#id` behind it: a file, on a server, or in object
    storage. `name`: what its product is called, its id by default. Raises SceneError where a channel is missing or
    the Item is broken.
    """
    path, item_id = item_of(uri) or (uri, "")
    found = read_document(path)
    path, document = found.uri, found.value
    if found.type == "FeatureCollection":
        matching = [feature for feature in document["features"] if str(feature["id"]) == item_id]
        if not matching:
            raise SceneError(f"{path} holds no Item with the id {item_id!r}")
        document = matching[0]
    try:
        if not isinstance(document.get("id"), str) or not document["id"]:
            raise ValueError(f"its id is {document.get('id')!r}")
        item = pystac.Item.from_dict(document, href=path)
        when = item.datetime.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ") if item.datetime else None
    except Exception as error:  # pystac raises whatever it stumbles over
        raise SceneError(
            f"{uri} is a broken STAC Item ({one_line(error)}); validate it with `stac-validator`"
        ) from error
    bands, missing = wanted.pick(_named_bands(item, path, {channel.lower() for channel in wanted.channels}))
    if missing:
        names = ", ".join(sorted(_named_bands(item, path, set()))) or "nothing"
        raise SceneError(
            f"{uri} has assets for {names} and lacks {', '.join(missing)}, which the model wants; give its assets a "
            f"`common_name`, or take a model that needs fewer"
        )
    used = {key: document["assets"].get(key) for key in sorted(document.get("assets", {}))}
    return Raster(
        uri,
        name or safe_name(item.id),
        bands,
        wanted.channels,
        datetime=when,
        described_by={"id": item.id, "assets": json.dumps(used, sort_keys=True)},
    )


def _named_bands(item: pystac.Item, base: str, wanted: set[str]) -> dict[str, Band]:
    """The bands of an Item, whose links start at `base`, by every name that they go by, in lower case.

    Where several go by one name, a common name is stronger than a name, and that than the key of an asset; then
    comes the asset that is called like a channel, the one that says that it is data, and the one with fewest bands
    (pictures of a scene have three).
    """
    found: list[tuple[tuple[Any, ...], str, Band]] = []
    for key, asset in item.assets.items():
        if not _is_data(asset):
            continue
        bands = list(_asset_bands(key, asset.to_dict(), resolve(base, asset.href)))
        rank = key.lower() not in wanted, "data" not in (asset.roles or ()), len(bands)
        for names, band in bands:
            found += [((strength, *rank), name.lower(), band) for strength, name in enumerate(names) if name]
    named: dict[str, Band] = {}
    for _, name, band in sorted(found, key=lambda entry: entry[0]):
        named.setdefault(name, band)
    return named


def _asset_bands(key: str, asset: Mapping[str, Any], href: str) -> Iterator[tuple[list[str], Band]]:
    """The bands of an asset, each with its common name, its name and the asset's key; empty where it has none."""
    lists: list[Sequence[Mapping[str, Any]]] = [
        asset[field] for field in ("bands", "eo:bands", "raster:bands") if isinstance(asset.get(field), list)
    ]
    if not all(isinstance(entry, dict) for entries in lists for entry in entries):
        raise SceneError(f"asset {key!r}: its bands are no objects; repair the Item")
    count = max((len(entries) for entries in lists), default=1)
    for position in range(count):
        facts: dict[str, Any] = {}
        for source in (asset, *(entries[position] for entries in lists if position < len(entries))):
            facts |= {field.removeprefix("eo:").removeprefix("raster:"): value for field, value in source.items()}
        names = [str(facts.get("common_name") or ""), str(facts.get("name") or ""), key if count == 1 else ""]
        nodata = facts.get("nodata")
        band = Band(
            href,
            position + 1,
            _number(facts.get("scale"), key, "scale"),
            _number(facts.get("offset"), key, "offset"),
            float(nodata) if nodata in _NOT_FINITE else _number(nodata, key, "nodata"),
        )
        yield names, band


def _is_data(asset: pystac.Asset) -> bool:
    """Whether an asset may be what was measured, and not a picture of it or a text about it."""
    pictures = {"thumbnail", "overview", "visual", "metadata"} & set(asset.roles or ())
    others = ("image/png", "image/jpeg", "text/", "application/json", "application/xml", "application/geo+json")
    return not pictures and not (asset.media_type or "").startswith(others)


def _number(value: Any, key: str, field: str) -> float | None:
    if value is None:
        return None
    with contextlib.suppress(OverflowError):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value):
            return float(value)
    raise SceneError(f"asset {key!r}: {field} {str(value)[:40]!r} is no number; repair the Item")


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of a product: its path, relative to the manifest, with what a STAC asset says of it."""

    href: str
    title: str
    media_type: str
    roles: tuple[str, ...]
    fields: Mapping[str, Any]


def manifest_item(
    name: str,
    geometry: dict[str, Any] | None,
    when: str,
    properties: Mapping[str, Any],
    assets: Mapping[str, Asset],
) -> dict[str, Any]:
    """A STAC Item as JSON. `when` is ISO 8601; `geometry` is GeoJSON in WGS 84, None for what is not on Earth."""
    bbox = None
    if geometry is not None:
        bbox = _bounds(geometry)
    extensions = [FILE, CLASSIFICATION] + ([PROJECTION] if any(key.startswith("proj:") for key in properties) else [])
    item = pystac.Item(
        id=name,
        geometry=geometry,
        bbox=bbox,
        datetime=datetime.fromisoformat(when.replace("Z", "+00:00")),
        properties=dict(properties),
        stac_extensions=extensions,
    )
    for key, asset in assets.items():
        item.add_asset(
            key,
            pystac.Asset(
                href=asset.href,
                title=asset.title,
                media_type=asset.media_type,
                roles=list(asset.roles),
                extra_fields=dict(asset.fields),
            ),
        )
    document: dict[str, Any] = item.to_dict(include_self_link=False, transform_hrefs=False)
    return document


def _bounds(geometry: Mapping[str, Any]) -> list[float]:
    """West, south, east, north; west is the greater one where the outline is cut at the antimeridian (RFC 7946)."""
    cut = geometry["type"] == "MultiPolygon"
    polygons = geometry["coordinates"] if cut else [geometry["coordinates"]]
    points = [point for polygon in polygons for ring in polygon for point in ring]
    xs, ys = [x for x, *_ in points], [y for _, y, *_ in points]
    west, east = min(xs), max(xs)
    if cut and west <= -180 and east >= 180:
        west, east = min(x for x in xs if x > 0), max(x for x in xs if x < 0)
    return [west, min(ys), east, max(ys)]
