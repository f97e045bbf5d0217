"""What is noted of this machine from run to run, and may be lost: one JSON file for each kind, in the user's cache."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from segcore.files import cache_folder, write_text


class Notes:
    """Values under names. What cannot be written is not noted, and what cannot be read was not: nothing depends on it.

    Of two processes that note at once one may lose what it noted.
    """

    def __init__(self, kind: str, most: int) -> None:
        """`kind`: name of the file; `most`: how many are kept, the latest ones."""
        self._name, self._most = f"{kind}.json", most

    def __getitem__(self, key: str) -> Any:
        """Raises KeyError."""
        return self._read()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        known = self._read()
        known.pop(key, None)
        known[key] = value
        with contextlib.suppress(OSError, RuntimeError):  # a user without a home
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / self._name, json.dumps(dict(list(known.items())[-self._most :])))

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            found = json.loads((cache_folder() / self._name).read_text())
            if isinstance(found, dict):
                return found
        return {}
