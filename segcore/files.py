"""Files and their URIs: what they are called, what tells them from a changed one."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from segcore.errors import ProductError, SceneError, unwritten

#: Bytes of a product's name; file systems allow 255, and suffixes come behind it.
LONGEST_NAME = 180
#: Suffixes of scenes, longest first; a product is called after its scene without them.
SCENE_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".tiff", ".tif", ".jp2", ".vrt", ".img", ".json", ".geojson")


def is_remote(uri: str) -> bool:
    """Whether a URI leads into object storage or to a server (`s3://`, `https://`, `/vsi.../`)."""
    return uri.startswith("/vsi") or ("://" in uri and not uri.startswith("file://"))


def local_path(uri: str) -> Path:
    """The path of a local file, from a path or a `file://` URI."""
    return Path(unquote(urlsplit(uri).path)) if uri.startswith("file://") else Path(uri)


def absolute(uri: str) -> str:
    """The URI as every process understands it: remote ones as they are, local ones as an absolute path."""
    if is_remote(uri):
        return uri
    return os.path.abspath(local_path(uri) if uri.startswith("file://") else uri)  # noqa: PTH100 (links stay)


def scene_name(uri: str) -> str:
    """What the product of a scene is called: its file name without suffix, safe as a file name anywhere."""
    name = Path(urlsplit(uri).path if is_remote(uri) else local_path(uri)).name
    for suffix in SCENE_SUFFIXES:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    return safe_name(name)


def safe_name(name: str) -> str:
    """The name with everything but letters, digits, `.`, `_` and `-` made a `_`; never hidden, never empty."""
    safe = re.sub(r"[^\w.-]", "_", name).lstrip(".") or "scene"
    if len(safe.encode()) <= LONGEST_NAME:
        return safe
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]
    return f"{safe.encode()[: LONGEST_NAME - 13].decode(errors='ignore')}-{digest}"


def file_identity(uri: str) -> dict[str, Any]:
    """Size and time of change of a local file, for the fingerprint of a product. Raises SceneError where it is not."""
    try:
        status = os.stat(local_path(uri))
    except OSError as error:
        raise SceneError(f"{uri}: {error.strerror or error}; check the path") from error
    return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns}


def cache_folder() -> Path:
    """Where this user's segflow keeps what it may lose: `SEGFLOW_CACHE`, or the place that XDG names."""
    if given := os.environ.get("SEGFLOW_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segflow"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    r"""Write a file in one step: it is there whole, or as it was. Raises OSError.

    Bytes of a file name that are no text are written as JSON would write them (`\udc80`).
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_text(path: Path, text: str) -> None:
    """The same for what a person asked for. Raises ProductError, which says what to do."""
    try:
        write_text(path, text)
    except OSError as error:
        raise ProductError(f"cannot write {path}: {unwritten(error)}", retryable=True) from error
