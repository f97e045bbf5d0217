"""Searches of STAC APIs: pages of Items, by GET and by POST, one after the other.

After STAC API Item Search 1.0: a `next` link says how the next page is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from segcore.errors import ProductError, SceneError
from segcore.files import is_remote, safe_name
from segcore.io.documents import Document, resolve
from segcore.io.found import Problem
from segcore.io.stac import item_uri
from segcore.io.web import fetch_json, is_web

#: Pages that a search is followed for.
MOST_PAGES = 2_000
#: What a document with a search may say besides `url`: STAC API Item Search with its query, filter and sort extensions.
_ALLOWED = ("collections", "ids", "bbox", "intersects", "datetime", "limit")
_EXTENSIONS = ("query", "filter", "filter-lang", "filter-crs", "sortby")


@dataclass(frozen=True, slots=True)
class Query:
    """How a page of Items is asked for: by GET, or by POST where there is a body."""

    url: str
    body: dict[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def is_search(url: str) -> bool:
    """Whether a URL is that of a search."""
    return is_web(url) and urlsplit(url).path.rstrip("/").endswith("/search")


def search_of(document: Document) -> Query | None:
    """The search that a document describes: `url`, and what is searched for. None where it describes none.

    Raises SceneError for a key that is not understood: a server would pass over it and return everything.
    """
    value = document.value
    if not isinstance(value, dict) or "type" in value or not isinstance(value.get("url"), str):
        return None
    url, body = value["url"], {key: entry for key, entry in value.items() if key != "url"}
    if unknown := sorted(set(body) - {*_ALLOWED, *_EXTENSIONS}):
        raise SceneError(f"{document.uri}: unknown keys {', '.join(unknown)}; a search may have "
                         f"{', '.join((*_ALLOWED, *_EXTENSIONS))}")  # fmt: skip
    if not is_web(url):
        raise SceneError(f"{document.uri}: {url!r} is no address of a search; write https://HOST/search")
    bbox, names = body.get("bbox"), (body.get("collections", []), body.get("ids", []))
    if bbox is not None and not (_all(bbox, (int, float)) and len(bbox) in (4, 6)):
        raise SceneError(f"{document.uri}: bbox is {bbox!r}, and should be four numbers: [west, south, east, north]")
    if not all(_all(entries, str) for entries in names):
        raise SceneError(f'{document.uri}: collections and ids are lists of names, such as ["sentinel-2-l2a"]')
    return Query(url if is_search(url) else f"{url.rstrip('/')}/search", body)


def find_items(query: Query, keep: Path | None, first: Document | None = None) -> Iterator[str | Problem]:
    """The Items of a search, page by page. `first`: its first page, if that was read.

    An Item is known by its own address. One that has none is written into the folder `keep`, where every process
    must find it, and known by that file. Raises SceneError where the first page cannot be read; a later one that
    cannot is a problem.
    """
    asked: set[str] = set()
    page = first or _page(query)
    for _ in range(MOST_PAGES):
        asked.add(json.dumps([query.url, query.body], sort_keys=True))
        features = page.value.get("features") if page.type == "FeatureCollection" else None
        if not isinstance(features, list):
            error = "the answer is no page of Items (a FeatureCollection); is this the address of a search?"
            if len(asked) == 1:
                raise SceneError(f"{query.url}: {error}")
            yield Problem(query.url, f"page {len(asked)}: {error}; the Items from there on are missing")
            return
        for feature in features:
            yield _item(feature, page.uri, keep)
        links = page.links("next")
        if not links:
            return
        try:
            query = _next(links[0], page.uri, query)
            if json.dumps([query.url, query.body], sort_keys=True) in asked:
                raise SceneError("the link to the next page leads to one that was read before")
            page = _page(query)
        except SceneError as error:
            yield Problem(query.url, f"page {len(asked) + 1}: {error}; the Items from there on are missing")
            return
    yield Problem(query.url, f"there are more than {MOST_PAGES} pages; ask for larger ones, or narrow the search down")


def _page(query: Query) -> Document:
    page = fetch_json(query.url, query.body, query.headers)
    return Document(page.value, page.url)


def _next(link: Mapping[str, Any], base: str, before: Query) -> Query:
    url = resolve(base, link.get("href"))
    if not is_web(url):
        raise SceneError(f"{base}: the link to the next page leads to {url}, which is no server")
    said = link.get("headers")
    headers = {str(k): str(v) for k, v in said.items()} if isinstance(said, dict) else dict(before.headers)
    if str(link.get("method", "GET")).upper() != "POST":
        return Query(url, None, headers)
    body = link.get("body") if isinstance(link.get("body"), dict) else {}
    return Query(url, {**(before.body or {}), **(body or {})} if link.get("merge") or not body else body, headers)


def _item(feature: Any, base: str, keep: Path | None) -> str | Problem:
    """The URI of an Item of a page."""
    item = Document(feature, base)
    name = feature.get("id") if item.type == "Feature" else None
    if not isinstance(name, str) or not name:
        return Problem(base, f"holds something that is no Item with an id: {str(feature)[:60]}")
    try:
        for link in item.links("self"):
            address = resolve(base, link.get("href"))
            if is_remote(address):
                return item_uri(address, name)
        if keep is None:
            return Problem(f"{base}#{name}", "the Item has no address of its own (a self link); save it as a file")
        return _kept(feature, name, base, keep)
    except SceneError as error:
        return Problem(f"{base}#{name}", str(error))


def _kept(feature: dict[str, Any], name: str, base: str, keep: Path) -> str:
    """Write an Item down, with links to its assets that hold from anywhere. The same Item has the same file."""
    assets = feature.get("assets") if isinstance(feature.get("assets"), dict) else {}
    full = {
        key: {**asset, "href": resolve(base, asset["href"])} if isinstance(asset, dict) and "href" in asset else asset
        for key, asset in (assets or {}).items()
    }
    text = json.dumps({**feature, "assets": full}, sort_keys=True)
    file = keep.absolute() / safe_name(str(feature.get("collection") or "items")) / f"{safe_name(name)}.json"
    try:
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{file.name}.{os.getpid()}")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, file)
    except OSError as error:
        raise ProductError(f"cannot write {file}: {error.strerror or error}", retryable=True) from error
    return str(file)


def _all(entries: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, kind) for entry in entries)
