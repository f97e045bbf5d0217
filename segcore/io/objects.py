"""Objects in S3, Google Cloud and Azure storage: documents and what tells one from a changed one. The home of obstore.

Pixels are read by GDAL; what is asked here takes the same environment variables as GDAL does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from segcore.errors import SceneError, one_line
from segcore.io.web import LARGEST, LONGEST_WAIT, SILENCE, TRIES

#: How GDAL and others write the schemes of object storage.
_SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "az": "az", "/vsis3": "s3", "/vsigs": "gs", "/vsiaz": "az"}
T = TypeVar("T")


def object_address(uri: str) -> tuple[str, str, str] | None:
    """Scheme (s3, gs or az), bucket and key of an object; None for every other URI."""
    if uri.startswith("/vsi"):
        _, vsi, *rest = uri.split("/", 3)
        scheme, bucket, key = _SCHEMES.get(f"/{vsi}"), rest[0] if rest else "", rest[1] if len(rest) > 1 else ""
    else:
        scheme, (bucket, _, key) = _SCHEMES.get(urlsplit(uri).scheme), uri.partition("://")[2].partition("/")
    return (scheme, bucket, key) if scheme and bucket and key else None


def read_object(uri: str) -> bytes:
    """The bytes of a small object. Raises SceneError."""
    import obstore  # only who has objects in storage pays for it

    def read(store: Any, key: str) -> bytes:
        if (size := obstore.head(store, key)["size"]) > LARGEST:
            raise SceneError(f"{uri} has {size} bytes, and a document at most {LARGEST}; check the address")
        return bytes(obstore.get(store, key).bytes())

    return _ask(uri, read)


def object_facts(uri: str) -> dict[str, Any] | None:
    """Size in bytes and ETag (or time of change) of an object, None where the storage does not let it be asked about.

    Raises SceneError where the object is gone or the storage is away.
    """
    import obstore
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    def head(store: Any, key: str) -> dict[str, Any] | None:
        try:
            meta = obstore.head(store, key)
        except (PermissionDeniedError, UnauthenticatedError):
            return None
        tag, changed = meta["e_tag"], meta["last_modified"]
        return {"bytes": meta["size"]} | ({"etag": tag} if tag else {"changed": changed.isoformat()})

    return _ask(uri, head)


def _ask(uri: str, question: Callable[[Any, str], T]) -> T:
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    address = object_address(uri)
    if address is None:
        raise SceneError(f"{uri} is no address of an object; write s3://BUCKET/KEY, gs://BUCKET/KEY or az://...")
    try:
        return question(_store(*address[:2]), address[2])
    except FileNotFoundError as error:
        raise SceneError(f"{uri}: there is no such object; check the address") from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise SceneError(f"{uri}: access is denied; give credentials in the environment, as for GDAL") from error
    except (BaseError, OSError, ValueError) as error:
        raise SceneError(f"{uri}: no answer ({one_line(error)}); try again later", retryable=True) from error


def _store(scheme: str, bucket: str) -> Any:
    from obstore.store import AzureStore, GCSStore, S3Store

    limits: dict[str, Any] = {
        "client_options": {"timeout": timedelta(seconds=SILENCE), "connect_timeout": timedelta(seconds=SILENCE / 2)},
        "retry_config": {"max_retries": TRIES - 1, "retry_timeout": timedelta(seconds=LONGEST_WAIT)},
    }
    if scheme == "gs":
        return GCSStore(bucket, **limits)
    if scheme == "az":
        return AzureStore(bucket, **limits)
    config: Any = _as_gdal_has_it()
    limits["client_options"]["allow_http"] = str(config.get("endpoint", "")).startswith("http://")
    return S3Store(bucket, config=config, **limits)


def _as_gdal_has_it() -> dict[str, Any]:
    """GDAL's environment variables for S3 that obstore does not read by itself."""
    said = os.environ.get
    config: dict[str, Any] = {}
    if host := said("AWS_S3_ENDPOINT"):
        plain = said("AWS_HTTPS", "YES").upper() in ("NO", "FALSE", "OFF", "0")
        config["endpoint"] = host if "://" in host else f"{'http' if plain else 'https'}://{host}"
    elif endpoint := said("AWS_ENDPOINT_URL_S3") or said("AWS_ENDPOINT_URL"):
        config["endpoint"] = endpoint
    if said("AWS_NO_SIGN_REQUEST", "NO").upper() in ("YES", "TRUE", "ON", "1"):
        config["skip_signature"] = True
    if said("AWS_VIRTUAL_HOSTING", "").upper() in ("NO", "FALSE", "OFF", "0"):
        config["virtual_hosted_style_request"] = False
    if not said("AWS_REGION"):
        config["region"] = said("AWS_DEFAULT_REGION", "us-east-1")
    return config
