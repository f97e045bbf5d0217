"""What tells the files behind a scene from changed ones, wherever they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from segcore.files import file_identity, is_remote
from segcore.io.objects import object_address, object_facts
from segcore.io.web import is_web, web_facts

#: Remote files that are asked about side by side.
ASKED = 8
#: How GDAL and rasterio write files in local archives.
_ARCHIVES = ("/vsizip/", "/vsitar/", "/vsigzip/", "/vsi7z/", "zip://", "tar://", "gzip://")


def identities(uris: Iterable[str]) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """What each file is known by, by its URI, and a warning if some are known by nothing else.

    Local files (and local archives) are known by size and time of change; files on servers and in object storage by
    size and ETag or, where there is none, time of change. Raises SceneError for a file that is gone, or whose server
    is away: what it is known by must not depend on the weather.
    """
    wanted = sorted(set(uris))
    if any(map(is_remote, wanted)):
        addresses = list(dict.fromkeys(map(_address, wanted)))
        with ThreadPoolExecutor(ASKED) as pool:
            known = dict(zip(addresses, pool.map(_facts, addresses), strict=True))
    else:
        known = {uri: file_identity(uri) for uri in wanted}
    found = {uri: known[uri if uri in known else _address(uri)] for uri in wanted}
    silent = [uri for uri, facts in found.items() if facts is None]
    warnings: tuple[str, ...] = ()
    if silent:
        others = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
        warnings = (f"{silent[0]}{others}: known by address alone, since the server tells neither ETag nor time of "
                    f"change; that it has changed will not be noticed",)  # fmt: skip
    return {uri: {"uri": uri} if facts is None else facts for uri, facts in found.items()}, warnings


def _facts(address: str) -> dict[str, Any] | None:
    """What the file at an address is known by; None where nothing is told."""
    if not is_remote(address):
        return file_identity(address)
    if is_web(address):
        return web_facts(address)
    return object_facts(address) if object_address(address) else None


def _address(uri: str) -> str:
    """Where a file is asked about: without GDAL's prefix, and for a member of a local archive the archive."""
    if uri.startswith("/vsicurl/"):
        return uri.removeprefix("/vsicurl/")
    prefix = next((prefix for prefix in _ARCHIVES if uri.startswith(prefix)), None)
    if prefix is None:
        return uri
    path = uri.removeprefix(prefix).partition("!")[0]
    while path.strip("/") and not is_remote(path):
        if os.path.isfile(path):  # noqa: PTH113 (paths of archives are no paths)
            return path
        path = os.path.dirname(path)  # noqa: PTH120
    return uri
