"""Everything that segflow raises on purpose.

    SegcoreError
    ├── SceneError    the input: missing, damaged, without the channels that the model wants
    │   └── LateError            not labelled in the time that a scene is given; what is finished is kept
    ├── CardError     the model card: unreadable, unknown keys, weights that differ from their digest
    ├── PlanError     the settings: a budget, tile or mode that cannot work for this scene and model
    ├── ModelError    the network: an engine that is not installed, an output of the wrong shape
    │   ├── MemoryShortageError  a tile that did not fit in memory: smaller ones may
    │   └── PoisonError          a tile that killed its worker, twice and alone
    ├── ProductError  the output: a folder that cannot be written, a product that does not verify
    │   └── InUseError           another run has the scene in work: come back to it later
    └── StoppedError  the run was asked to end before the scene was done

A message says what, where (URI, box), the numbers, and the remedy. `retryable` says whether the same call may
succeed a little later (storage that was away), or never will before the user changes something.
"""

from __future__ import annotations

import errno

#: Why a file is not written where more space would not help: its folder, what is in its way, who may change it.
_NOT_FOR_SPACE = {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS}


class SegcoreError(Exception):
    """Base of the tree above; `str(error)` is one line that is fit for a user."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between processes: keep `retryable`, which the default would lose.
        return _rebuild, (type(self), str(self), self.retryable)


class SceneError(SegcoreError):
    """The scene cannot be labelled as it is."""


class LateError(SceneError):
    """A scene was not labelled in the time that it is given."""


class CardError(SegcoreError):
    """The model card or its weights are not what they claim to be."""


class PlanError(SegcoreError):
    """The settings do not fit the scene, the model or the machine."""


class ModelError(SegcoreError):
    """The network cannot be loaded or does not behave as its card says."""


class MemoryShortageError(ModelError):
    """A tile took more memory than there is. `core`: the shape of its core, where whoever catches it knows that."""

    core: tuple[int, ...] | None = None


class PoisonError(ModelError):
    """A tile killed the process that worked on it, twice, with nothing else under way."""


class ProductError(SegcoreError):
    """The product cannot be written or does not verify."""


class InUseError(ProductError):
    """Another run has the scene in work. Always retryable."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message, retryable=retryable)


class StoppedError(SegcoreError):
    """The run ends before this scene is done; the same call goes on with it."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message, retryable=retryable)


def _rebuild(kind: type[SegcoreError], message: str, retryable: bool) -> SegcoreError:
    return kind(message, retryable=retryable)


def unwritten(error: OSError) -> str:
    """Why a file was not written, and what to do about it."""
    space = "" if error.errno in _NOT_FOR_SPACE else "free some space or "
    return f"{error.strerror or error}; {space}choose another --out"


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
