"""Servers: JSON documents and what tells a file from a changed one, over http(s).

Bounded in time and size. A server that is busy or away is asked again, when it says so or a little later each time.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, InvalidURL
from ssl import SSLError
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urldefrag, urlsplit

from segcore.errors import SceneError, one_line

#: Seconds that a server may stay silent, and that one question may take with all its repetitions.
SILENCE, PATIENCE = 20.0, 120.0
#: Bytes of a document; a page of a search has some hundred Items of a few kilobytes each.
LARGEST = 64 * 2**20
#: How often a question is asked, and the longest wait between two times, seconds.
TRIES, LONGEST_WAIT = 4, 30.0
#: Answers that may be others a little later (RFC 9110, RFC 6585).
_BUSY = (408, 425, 429, 500, 502, 503, 504)
#: Answers of a server that does not let a file be asked about, though GDAL may have means of reading it.
_CLOSED = (400, 401, 403, 405, 406, 416, 501)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page:
    """A JSON document from a server. `url`: where it was in the end; relative links in it start there."""

    value: Any
    url: str


def is_web(uri: str) -> bool:
    """Whether a URI is of http or https."""
    return uri.lower().startswith(("http://", "https://"))


def fetch_json(url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Page:
    """The JSON document behind a URL, by GET, or by POST where there is a body. Raises SceneError."""
    page = _ask(url, lambda answer, until: _page(answer, until, url), body, headers)
    assert page is not None
    return page


def fetch_if_json(url: str) -> Page | None:
    """The same, None where the server says that it is no JSON: what is no document is not downloaded."""

    def read(answer: HTTPResponse, until: float) -> Page | None:
        return _page(answer, until, url) if "json" in answer.headers.get_content_subtype() else None

    return _ask(url, read)


def web_facts(url: str) -> dict[str, Any] | None:
    """Size in bytes and ETag (or time of change) of a file on a server, None where the server tells neither.

    Asked as GDAL reads, by a range of one byte, since not every server answers HEAD. Raises SceneError where the
    file is gone or the server is away.
    """
    facts = _ask(url, lambda answer, until: _facts(answer), headers={"Range": "bytes=0-0"}, closed=_CLOSED)
    return facts or None


def _facts(answer: HTTPResponse) -> dict[str, Any]:
    tag, changed = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
    whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
    size = whole if answer.status == 206 else answer.headers.get("Content-Length", "")
    if not tag and not changed:
        return {}
    return {"bytes": int(size) if size.isdigit() else None} | ({"etag": tag} if tag else {"changed": changed})


def _page(answer: HTTPResponse, until: float, url: str) -> Page:
    parts, size = [], 0
    # What is there, piece by piece: a server that drips would never be silent for long.
    while part := answer.read1(2**16):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise SceneError(f"{url} is longer than {LARGEST / 2**20:g} MiB; ask for smaller pages, or narrow it down")
        if time.monotonic() > until:
            raise TimeoutError(f"not complete after {PATIENCE:g} seconds")
    if answer.length:
        raise ConnectionError(f"{answer.length} bytes are missing")
    try:
        return Page(json.loads(b"".join(parts)), answer.geturl())
    except (ValueError, RecursionError) as error:
        raise SceneError(f"{url} is no JSON document ({one_line(error)}); check the address") from error


def _ask(
    url: str,
    read: Callable[[HTTPResponse, float], T],
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    closed: Collection[int] = (),
) -> T | None:
    """What `read` makes of the answer; None where its status is among `closed`. Raises SceneError."""
    until = time.monotonic() + PATIENCE
    reason = ""
    for attempt in range(TRIES):
        pause = 0.5 * 2**attempt
        try:
            with _opener().open(_request(url, body, headers), timeout=SILENCE) as answer:
                return read(answer, until)
        except HTTPError as error:
            error.close()
            reason = f"{error.code} {error.reason}"
            if error.code in closed:
                return None
            if error.code not in _BUSY:
                raise SceneError(
                    f"{url}: the server answers {reason}; check the address, or who may read it"
                ) from error
            pause = _pause(error.headers.get("Retry-After"), pause)
        except (OSError, HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, URLError) else error
            reason = one_line(cause) if isinstance(cause, BaseException) else str(cause)
            if isinstance(error, (ValueError, InvalidURL)) or isinstance(cause, SSLError) or not urlsplit(url).hostname:
                raise SceneError(f"{url} cannot be asked ({reason}); check the address") from error
        if attempt + 1 == TRIES or time.monotonic() + pause > until:
            break
        time.sleep(pause)
    raise SceneError(f"{url}: no answer ({reason}), asked {attempt + 1} times; try again later", retryable=True)


def _opener() -> urllib.request.OpenerDirector:
    """What opens URLs of http(s), through the proxies of the environment: no redirect leads to files or FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _request(url: str, body: Any, headers: Mapping[str, str] | None) -> urllib.request.Request:
    address = quote(urldefrag(url).url, safe="%/:=&?~+!$,;'@()*[]|")
    data = None if body is None else json.dumps(body).encode()
    accept = {"Accept": "application/geo+json, application/json, */*;q=0.5", "User-Agent": "segflow"}
    content = {} if data is None else {"Content-Type": "application/json"}
    return urllib.request.Request(address, data, {**accept, **content, **(headers or {})})


def _pause(said: str | None, otherwise: float) -> float:
    """Seconds to wait before asking again: what the server says, as a number or a date, within bounds."""
    try:
        seconds = otherwise if said is None else float(said)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(said or "") - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            seconds = otherwise
    return min(max(seconds, 0.0), LONGEST_WAIT)
