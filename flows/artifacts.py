"""What Prefect shows of a run: bars, pictures, links and a table as artifacts, and an event for every product."""

# Annotations are real here, not texts: see flows.segment.
import base64
import contextlib
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from flows.batch import SceneRecord, Summary
from segcore.errors import ProductError
from segcore.quicklook import read_thumbnail

#: Emitted for every product that is new; automations wait for it.
PRODUCT_FINISHED = "segflow.product.finished"
#: Seconds between two steps of a bar: each is a request to the server.
_STEP = 5.0
#: A scene gets a bar when it takes longer than this (seconds).
_LONG = 5.0
#: So many products of a run are shown with picture and link, and so many scenes in its table: a server keeps them all.
_MOST_SHOWN, _MOST_ROWS = 100, 1000


class Bars:
    """A progress bar for each scene that takes its time. A server that does not take it never hurts the run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bars: dict[str, tuple[UUID | None, float]] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        """Tiles done, and tiles in all, of a scene."""
        now = time.monotonic()
        with self._lock:
            bar, last = self._bars.setdefault(name, (None, now - _STEP + _LONG))
            if now - last < _STEP and not (bar and done == total):
                return
            self._bars[name] = (bar, now)
        percent = 100 * done / max(1, total)
        with contextlib.suppress(Exception):
            if bar is None:
                made = create_progress_artifact(percent, key_of("progress", name), f"{name}: tiles labelled")
                assert isinstance(made, UUID)
                with self._lock:
                    self._bars[name] = (made, now)
            else:
                update_progress_artifact(bar, percent)


class Showcase:
    """Shows the products of a run: quicklook, link and event. A server that does not take it never hurts the run."""

    def __init__(self) -> None:
        self._shown = 0

    def show(self, record: SceneRecord) -> None:
        """A scene has ended."""
        if record.state != "done":
            return
        manifest = Path(record.product)
        with contextlib.suppress(Exception):
            emit_event(
                PRODUCT_FINISHED,
                resource={
                    "prefect.resource.id": f"segflow.product.{record.name}",
                    "prefect.resource.name": record.name,
                    "segflow.uri": record.uri,
                },
                payload={
                    "scene": record.name,
                    "uri": record.uri,
                    "product": record.product,
                    "seconds": record.seconds,
                    "classes": record.details.get("classes", []),
                },
            )
        self._shown += 1
        if self._shown > _MOST_SHOWN:
            return
        with contextlib.suppress(Exception):
            create_markdown_artifact(_picture(record), key_of("quicklook", record.name), f"Quicklook of {record.name}")
            create_link_artifact(manifest.as_uri(), manifest.name, key_of("product", record.name), record.name)

    def table(self, summary: Summary) -> None:
        """The run has ended: its scenes as a table, those with a fault first."""
        records = sorted(summary.records, key=lambda record: record.state in ("done", "up to date"))[:_MOST_ROWS]
        counts = ", ".join(f"{count} {state}" for state, count in summary.counts.items() if count)
        with contextlib.suppress(Exception):
            create_table_artifact(
                key="segflow-run",
                table=[_row(record) for record in records],
                description=f"{summary.total} scenes into {summary.out}: {counts}",
            )


def key_of(kind: str, name: str) -> str:
    """A key as Prefect wants them: small letters, digits and dashes."""
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"


def _picture(record: SceneRecord) -> str:
    """The quicklook, small, inside of the text: a browser has no way to the files of the worker."""
    manifest = Path(record.product)
    shares = ", ".join(f"{share['name']} {share['fraction']:.1%}" for share in record.details.get("classes", ()))
    lines = [f"**{_plain(record.name)}**", _plain(shares)]
    with contextlib.suppress(ProductError, OSError):
        drawn = read_thumbnail(manifest.with_name(f"{manifest.stem}_quicklook.png"))
        lines.append(f"![quicklook](data:image/webp;base64,{base64.b64encode(drawn).decode()})")
    return "\n\n".join(lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~-])", r"\\\1", text)


def _row(record: SceneRecord) -> dict[str, Any]:
    shares: Sequence[dict[str, Any]] = record.details.get("classes", ())
    return {
        "scene": record.name,
        "state": record.state,
        "seconds": record.seconds,
        "tiles": record.details.get("tiles", ""),
        "classes": ", ".join(f"{share['name']} {share['fraction']:.1%}" for share in shares),
        "reason": record.reason,
        "product": record.product,
    }
