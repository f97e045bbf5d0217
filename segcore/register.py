"""The register of leases: one small record for each scene, changed by conditional writes alone.

A register promises one thing: of all who would change the same version of a record, exactly one succeeds. Object
storage keeps it by conditional writes (create if absent, replace if unchanged); a folder that several hosts mount, by
`rename`, which takes a name away from all others. Neither needs locks, and neither looks at a clock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from segcore.errors import ProductError, one_line
from segcore.files import local_path
from segcore.lock import Holder

if TYPE_CHECKING:
    from obstore import PutResult, UpdateVersion
    from obstore.store import ObjectStore

#: The longest time to live that a record may claim, in seconds.
LONGEST_TTL = 86_400.0


@dataclass(frozen=True, slots=True)
class Record:
    """What stands in the register for one scene. `token`: one for each taking, empty where the scene is free again.

    `beat` rises with every renewal, so no two records of a scene are alike. `ttl`: seconds after which one that has not
    changed is dead.
    """

    token: str
    beat: int
    ttl: float
    holder: Holder | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ttl <= LONGEST_TTL or self.beat < 0:
            raise ValueError(f"no record of a lease: {self}")

    @property
    def free(self) -> bool:
        return not self.token

    def renewed(self) -> Record:
        """The next beat of the same holder."""
        return replace(self, beat=self.beat + 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Any) -> Record:
        """Raises KeyError, TypeError, ValueError."""
        holder = None if fields["holder"] is None else Holder.from_json(fields["holder"])
        return cls(str(fields["token"]), int(fields["beat"]), float(fields["ttl"]), holder)


@dataclass(frozen=True, slots=True)
class Version:
    """Which writing of a record is meant; what storage knows it by. Opaque to all but the register."""

    mark: str
    generation: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as it was found, and which version of it."""

    record: Record
    version: Version


class Register(Protocol):
    """Records by key. Every method raises ProductError: retryable where storage was away, not where it refuses.

    After an error, and after None, a write may have been done all the same (its answer was lost): read, and compare the
    token.
    """

    url: str

    def read(self, key: str) -> Entry | None:
        """The record, None where there is none."""

    def create(self, key: str, record: Record) -> Version | None:
        """Write the first record; None where there is one."""

    def replace(self, key: str, record: Record, version: Version) -> Version | None:
        """Write in place of this version; None where it is not the current one."""

    def release(self, key: str, record: Record, version: Version) -> None:
        """Make this key free, if this version of its record is the current one."""


def open_register(url: str, timeout_seconds: float) -> Register:
    """The register at `s3://`, `gs://`, `az://` (and what else obstore opens), `file://` or a path.

    `timeout_seconds`: how long one call may take, with its retries. Credentials come from the environment. Raises
    ProductError where it cannot be opened, or where storage takes conditional writes for plain ones.
    """
    if "://" not in url or url.startswith("file://"):
        return Folder(local_path(url).absolute())
    bound = timedelta(seconds=max(1.0, timeout_seconds / 2))
    # Options given here replace those of the environment, so the one that local servers need is handed on.
    plain = any(os.environ.get(f"{cloud}_ALLOW_HTTP", "").lower() in ("1", "true") for cloud in ("AWS", "AZURE"))
    with _told(url):
        try:
            store = from_url(
                url,
                client_options={"timeout": bound, "connect_timeout": bound, "allow_http": plain},
                retry_config={"max_retries": 2, "retry_timeout": bound},
            )
        except BaseError as error:
            raise ProductError(f"cannot open {url}: {one_line(error)}; check the URL and the environment") from error
    register = Objects(store, url)
    register.prove()
    return register


class Objects:
    """A register in object storage: an object for each key.

    Storage has no deletion on condition that all of them share, so a free record stays as an object that says so.
    """

    def __init__(self, store: ObjectStore, url: str) -> None:
        self.url, self._store = url, store

    def prove(self) -> None:
        """Try on an object of its own that storage keeps to conditions. Raises ProductError where it does not."""
        key = f".probe-{uuid4().hex}"
        first, second = Record("a", 1, 1.0), Record("b", 2, 1.0)
        version = self.create(key, first)
        try:
            kept = (
                version is not None
                and self.create(key, second) is None
                and self.replace(key, second, version) is not None
                and self.replace(key, first, version) is None
            )
        finally:
            with contextlib.suppress(BaseError, OSError):
                obstore.delete(self._store, _object(key))
        if not kept:
            raise ProductError(
                f"{self.url} does not keep to conditional writes (If-None-Match, If-Match), so that two runs could "
                f"both take a scene; choose other storage for leases"
            )

    def read(self, key: str) -> Entry | None:
        with _told(f"{self.url}/{_object(key)}"):
            try:
                found = obstore.get(self._store, _object(key))
                content, meta = bytes(found.bytes()), found.meta
            except FileNotFoundError:
                return None
        try:
            record = Record.from_json(json.loads(content))
        except (ValueError, KeyError, TypeError) as error:
            raise ProductError(
                f"{self.url}/{_object(key)} is no record of a lease; remove it, or choose another prefix for leases"
            ) from error
        return Entry(record, Version(meta.get("e_tag") or "", meta.get("version") or ""))

    def create(self, key: str, record: Record) -> Version | None:
        with _told(f"{self.url}/{_object(key)}"):
            try:
                return _version(obstore.put(self._store, _object(key), _content(record), mode="create"))
            except (AlreadyExistsError, PreconditionError):
                return None

    def replace(self, key: str, record: Record, version: Version) -> Version | None:
        # A field that storage has not given must be left out, not None.
        condition: UpdateVersion = {"e_tag": version.mark} if version.mark else {}
        if version.generation:
            condition["version"] = version.generation
        with _told(f"{self.url}/{_object(key)}"):
            try:
                return _version(obstore.put(self._store, _object(key), _content(record), mode=condition))
            except (PreconditionError, AlreadyExistsError, FileNotFoundError):
                return None

    def release(self, key: str, record: Record, version: Version) -> None:
        self.replace(key, replace(record.renewed(), token="", holder=None), version)


class Folder:
    """A register in a folder: a folder for each key, and in it one file, whose name is the record.

    To replace a record is to rename that file: a version has one name, and a name can be taken away once. The first
    record comes with its folder, by a rename that fails where a folder with a file is. `who/` says in whose name,
    for messages alone.
    """

    def __init__(self, root: Path) -> None:
        self.url, self._root = root.as_uri(), root

    def read(self, key: str) -> Entry | None:
        with _told(f"{self.url}/{key}.lease"):
            try:
                names = sorted(os.listdir(self._lease(key)))
            except FileNotFoundError:
                return None
        # A listing may show a file under its old name and its new one: the newest counts.
        return self._entry(key, names[-1]) if names else None

    def create(self, key: str, record: Record) -> Version | None:
        name, new = _name(record), self._root / f".{uuid4().hex}"
        with _told(f"{self.url}/{key}.lease"):
            self._sign(record)
            try:
                new.mkdir()
                (new / name).touch()
                new.rename(self._lease(key))
            except OSError as error:
                shutil.rmtree(new, ignore_errors=True)
                self._who(record.token).unlink(missing_ok=True)
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return None
                raise
        return Version(name)

    def replace(self, key: str, record: Record, version: Version) -> Version | None:
        name, lease = _name(record), self._lease(key)
        with _told(f"{self.url}/{key}.lease"):
            self._sign(record)
            new_holder = record.token not in version.mark
            try:
                (lease / version.mark).rename(lease / name)
            except FileNotFoundError:
                if new_holder:
                    self._who(record.token).unlink(missing_ok=True)
                return None
            if new_holder:
                self._who(version.mark.split(".")[1]).unlink(missing_ok=True)
        return Version(name)

    def release(self, key: str, record: Record, version: Version) -> None:
        with _told(f"{self.url}/{key}.lease"):
            with contextlib.suppress(FileNotFoundError):
                (self._lease(key) / version.mark).unlink()
            self._who(record.token).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._lease(key).rmdir()  # unless another run has already moved in

    def _lease(self, key: str) -> Path:
        return self._root / f"{key}.lease"

    def _who(self, token: str) -> Path:
        return self._root / "who" / f"{token}.json"

    def _sign(self, record: Record) -> None:
        who = self._who(record.token)
        who.parent.mkdir(parents=True, exist_ok=True)
        if record.holder is not None and not who.exists():
            who.write_text(json.dumps(record.holder.to_json()), encoding="utf-8")

    def _entry(self, key: str, name: str) -> Entry:
        try:
            beat, token, milliseconds = name.split(".")
            record = Record(token, int(beat), int(milliseconds) / 1000)
        except ValueError as error:
            raise ProductError(
                f"{self.url}/{key}.lease/{name} is no record of a lease; remove it, or choose another folder for leases"
            ) from error
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            holder = Holder.from_json(json.loads(self._who(token).read_text(encoding="utf-8")))
            record = replace(record, holder=holder)
        return Entry(record, Version(name))


def _object(key: str) -> str:
    return f"{key}.lease.json"


def _content(record: Record) -> bytes:
    return json.dumps(record.to_json()).encode()


def _name(record: Record) -> str:
    """A record as the name of a file: those of one scene sort by their age."""
    return f"{record.beat:015d}.{record.token}.{max(1, round(record.ttl * 1000))}"


def _version(result: PutResult) -> Version:
    version = Version(result["e_tag"] or "", result["version"] or "")
    if version == Version(""):
        raise ProductError("the storage for leases gives no version of what it stores; choose other storage for leases")
    return version


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """What storage raises, in our words: whether it was away, or will refuse until the user changes something."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
        raise ProductError(
            f"no permission to read and write {where}: {_said(error)}; leases need both: check the credentials"
        ) from error
    except (NotSupportedError, NotImplementedError, ValueError) as error:
        raise ProductError(f"{where} cannot hold leases: {_said(error)}; choose other storage for leases") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ProductError(f"{where} is not there: {_said(error)}; check the URL of the leases") from error
    except (BaseError, OSError) as error:
        raise ProductError(
            f"cannot reach {where}: {_said(error)}; check network and credentials, run again", retryable=True
        ) from error


def _said(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)[:300]
