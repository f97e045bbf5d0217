"""Thumbnails of products, taken out of their quicklooks once and kept: a report handles only what is new."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from uuid import uuid4

from segcore.errors import ProductError
from segcore.files import safe_name
from segcore.quicklook import read_thumbnail
from segcore.report.findings import Row

#: Where they are kept, below the output folder; no scene can have a name that begins with a dot.
FOLDER = ".segflow/.thumbs"


class Thumbnails:
    """The thumbnails of an output folder. Those that are not kept yet are made until the seconds are used up."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.left_out = out, 0
        self._until = time.monotonic() + seconds

    def of(self, row: Row) -> bytes | None:
        """The WebP of a row; None where it has no quicklook, or the time is up (the next report will make it)."""
        if not row.quicklook:
            return None
        picture, kept = self.out / row.quicklook, self.path(row)
        try:
            changed = picture.stat().st_mtime_ns
        except OSError:
            return None
        # The thumbnail has the time of the picture that it shows, so that it is known when the picture is another.
        with contextlib.suppress(OSError):
            if kept.stat().st_mtime_ns == changed:
                return kept.read_bytes()
        if time.monotonic() > self._until:
            self.left_out += 1
            return None
        try:
            drawn = read_thumbnail(picture)
        except ProductError:
            return None
        with contextlib.suppress(OSError):  # it can be shown all the same
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_name(f".{uuid4().hex}.partial")
            partial.write_bytes(drawn)
            os.utime(partial, ns=(changed, changed))
            os.replace(partial, kept)
        return drawn

    def path(self, row: Row) -> Path:
        """Where the thumbnail of a row is kept."""
        return self.out / FOLDER / f"{safe_name(row.scene)}.webp"
