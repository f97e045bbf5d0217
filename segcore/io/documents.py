"""JSON documents wherever they lie (files, servers, object storage), and where the links in them lead."""

from __future__ import annotations

import json
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from segcore.errors import SceneError, one_line
from segcore.files import absolute, is_remote
from segcore.io.objects import object_address, read_object
from segcore.io.web import fetch_json, is_web

#: Suffixes of what is read as a document.
DOCUMENTS = (".json", ".geojson")


@dataclass(frozen=True, slots=True)
class Document:
    """What is in a JSON document, and where it lies: an absolute path or a remote URI."""

    value: Any
    uri: str

    @property
    def type(self) -> str | None:
        """Its `type`, if it is an object that has one."""
        kind = self.value.get("type") if isinstance(self.value, dict) else None
        return kind if isinstance(kind, str) else None

    def links(self, *rels: str) -> list[dict[str, Any]]:
        """Its links of these relations, in order; what is no link is left out."""
        found = self.value.get("links") if isinstance(self.value, dict) else None
        every = found if isinstance(found, list) else []
        return [link for link in every if isinstance(link, dict) and link.get("rel") in rels]


def read_json(uri: str) -> Document:
    """The document behind a URI. Raises SceneError."""
    if is_web(uri):
        page = fetch_json(uri)
        return Document(page.value, page.url)
    if is_remote(uri) and object_address(uri) is None:
        raise SceneError(f"{uri}: documents are read from files, http(s) and object storage; copy it to one of these")
    place = absolute(uri)
    try:
        text = read_object(uri) if is_remote(uri) else Path(place).read_bytes()
        return Document(json.loads(text.removeprefix(b"\xef\xbb\xbf")), place)
    except (OSError, ValueError, RecursionError) as error:
        raise SceneError(f"{uri} is no readable STAC document ({one_line(error)}); check the file") from error


def resolve(base: str, href: Any) -> str:
    """Where a link in a document leads: an absolute path or a remote URI. Raises SceneError for one that cannot be.

    A document from elsewhere never leads to files of this machine.
    """
    if not isinstance(href, str) or not href.strip():
        raise SceneError(f"{base} has a link without an address; repair it")
    if is_remote(href):
        return href
    if not is_remote(base):
        return absolute(href if href.startswith("file://") else os.path.join(os.path.dirname(base), href))  # noqa: PTH118, PTH120
    if href.startswith("file://"):
        raise SceneError(f"{base} is remote and leads to the local file {href}; repair it")
    if base.startswith("/vsi"):
        return posixpath.normpath(posixpath.join(posixpath.dirname(base), href))
    scheme, _, rest = base.partition("://")
    if is_web(base):
        return urljoin(base, href)
    # The standard library joins the schemes that it knows only.
    return f"{scheme}://{urljoin(f'http://{rest}', href).removeprefix('http://')}"
