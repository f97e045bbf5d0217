"""STAC: Items as scenes that are sets of band files, and Items as manifests. The only home of pystac.

Reads STAC 1.0 (`eo:bands`, `raster:bands`) and 1.1 (`bands`) alike: what a band is called (`common_name`), and how its
stored numbers become physical ones (`scale`, `offset`, `nodata`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from typing import Any

import pystac

from segcore.errors import SceneError, one_line
from segcore.files import absolute, is_remote, local_path, safe_name
from segcore.io.geotiff import Band, Raster
from segcore.io.source import Wanted

PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
FILE = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
#: How STAC writes the values of nodata that JSON has no number for.
_NOT_FINITE = ("nan", "inf", "-inf")
CLASSIFICATION = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"


def read_document(uri: str) -> dict[str, Any]:
    """The Item or ItemCollection in a file. Raises SceneError."""
    if is_remote(uri):
        raise SceneError(f"{uri}: STAC documents are read from a local or mounted file system; copy it there first")
    try:
        document = json.loads(local_path(uri).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SceneError(f"{uri} is no readable STAC document ({one_line(error)}); check the file") from error
    if not isinstance(document, dict) or document.get("type") not in ("Feature", "FeatureCollection"):
        raise SceneError(
            f"{uri} is no STAC Item or ItemCollection: its `type` is neither Feature nor FeatureCollection"
        )
    if document["type"] == "FeatureCollection":
        features = document.get("features")
        ids = [f.get("id") for f in features if isinstance(f, dict)] if isinstance(features, list) else []
        if not ids or len(ids) != len(features or ()) or len(set(map(str, ids))) != len(ids):
            raise SceneError(f"{uri} is an ItemCollection whose `features` are not Items with ids of their own")
    return document


def item_name(uri: str) -> str:
    """What the product of an Item is called: its id, made safe as a file name. Raises SceneError."""
    path, _, item_id = uri.partition("#")
    return safe_name(item_id or str(read_document(path).get("id")))


def item_ids(uri: str) -> list[str] | None:
    """The ids of the Items of an ItemCollection, None for a single Item. Raises SceneError."""
    document = read_document(uri)
    return None if document["type"] == "Feature" else [str(feature["id"]) for feature in document["features"]]


def item_scene(uri: str, wanted: Wanted) -> Raster:
    """The scene that a STAC Item describes: for each channel, the asset band with its `common_name`, or its name.

    `uri` is a file with an Item, or with an ItemCollection and `#id` behind it. Raises SceneError where a channel is
    missing or the Item is broken.
    """
    path, _, item_id = uri.partition("#")
    document = read_document(path)
    if document["type"] == "FeatureCollection":
        matching = [feature for feature in document["features"] if str(feature["id"]) == item_id]
        if not matching:
            raise SceneError(f"{path} holds no Item with the id {item_id!r}")
        document = matching[0]
    try:
        if not isinstance(document.get("id"), str) or not document["id"]:
            raise ValueError(f"its id is {document.get('id')!r}")
        item = pystac.Item.from_dict(document, href=absolute(path))
        when = item.datetime.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ") if item.datetime else None
    except Exception as error:  # pystac raises whatever it stumbles over
        raise SceneError(
            f"{uri} is a broken STAC Item ({one_line(error)}); validate it with `stac-validator`"
        ) from error
    bands, missing = wanted.pick(_named_bands(item, {channel.lower() for channel in wanted.channels}))
    if missing:
        names = ", ".join(sorted(_named_bands(item, set()))) or "nothing"
        raise SceneError(
            f"{uri} has assets for {names} and lacks {', '.join(missing)}, which the model wants; give its assets a "
            f"`common_name`, or take a model that needs fewer"
        )
    used = {key: document["assets"].get(key) for key in sorted(document.get("assets", {}))}
    return Raster(
        uri,
        safe_name(item.id),
        bands,
        wanted.channels,
        datetime=when,
        described_by={"id": item.id, "assets": json.dumps(used, sort_keys=True)},
    )


def _named_bands(item: pystac.Item, wanted: set[str]) -> dict[str, Band]:
    """The bands of an Item by every name that they go by, in lower case.

    Where several go by one name, a common name is stronger than a name, and that than the key of an asset; then
    comes the asset that is called like a channel, the one that says that it is data, and the one with fewest bands
    (pictures of a scene have three).
    """
    found: list[tuple[tuple[Any, ...], str, Band]] = []
    for key, asset in item.assets.items():
        if not _is_data(asset):
            continue
        bands = list(_asset_bands(key, asset.to_dict(), asset.get_absolute_href() or asset.href))
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
            absolute(href),
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
