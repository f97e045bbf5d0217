"""STAC Catalogs and Collections: every Item that their links lead to, without opening one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from segcore.errors import SceneError
from segcore.io.documents import Document, read_json, resolve
from segcore.io.found import Problem
from segcore.io.search import Query, find_items
from segcore.io.stac import item_uri

#: Catalogs that are read side by side, and at most in one walk.
READERS, MOST_CATALOGS = 8, 20_000
KINDS = ("Catalog", "Collection")


def walk_catalog(root: Document, keep: Path | None) -> Iterator[str | Problem]:
    """The Items below a Catalog or Collection, in the order of its links: its own first, then those of its children.

    A child that cannot be read is a problem, and the others go on; one that was there before is passed over. `keep`:
    see `find_items`.
    """
    read = _read_all(root)
    waiting, seen = [root.uri], set()
    while waiting:
        uri = waiting.pop()
        document = read.get(uri)
        if isinstance(document, Problem):
            yield document
        if not isinstance(document, Document) or document.uri in seen:
            continue
        seen.add(document.uri)
        children = []
        for link in document.links("item", "items", "child"):
            try:
                target = resolve(document.uri, link.get("href"))
            except SceneError as error:
                yield Problem(document.uri, str(error))
                continue
            if link["rel"] == "child":
                children.append(target)
                if target not in read:
                    yield Problem(target, f"not read: there are more than {MOST_CATALOGS} catalogs; name parts of them")
            elif link["rel"] == "item":
                yield item_uri(target)
            else:
                yield from _items(target, keep)
        waiting += reversed(children)


def _items(url: str, keep: Path | None) -> Iterator[str | Problem]:
    """The Items of a Collection of a STAC API, which are pages."""
    try:
        yield from find_items(Query(url), keep)
    except SceneError as error:
        yield Problem(url, str(error))


def _read_all(root: Document) -> dict[str, Document | Problem]:
    """Every catalog below the root, by its URI; those of one level are read side by side."""
    read: dict[str, Document | Problem] = {root.uri: root}
    level = [root]
    with ThreadPoolExecutor(READERS) as pool:
        while level:
            wanted = dict.fromkeys(child for document in level for child in _children(document) if child not in read)
            asked = list(wanted)[: max(0, MOST_CATALOGS - len(read))]
            answers = list(pool.map(_read, asked))
            read |= zip(asked, answers, strict=True)
            level = [answer for answer in answers if isinstance(answer, Document)]
    return read


def _children(document: Document) -> Iterator[str]:
    for link in document.links("child"):
        try:
            yield resolve(document.uri, link.get("href"))
        except SceneError:
            continue  # told where the links are followed


def _read(uri: str) -> Document | Problem:
    try:
        document = read_json(uri)
    except SceneError as error:
        return Problem(uri, str(error))
    if document.type not in KINDS:
        return Problem(uri, f"it is no STAC Catalog or Collection: its `type` is {document.type!r}; repair the link")
    return document
