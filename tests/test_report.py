"""What a person reads in the morning: the report, the status and the metrics of a real run with failures."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import save_local_unet
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from rasterio.transform import from_origin

from flows.archive import Archive
from flows.batch import Limits, find_jobs
from flows.console import Silent
from segcore.errors import ProductError
from segcore.execute import Workers
from segcore.files import safe_name
from segcore.ledger import (
    LEDGER_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RUN_FILE,
    RUN_STARTED,
    SCENE_DONE,
    SCENE_FAILED,
    Ledger,
    Totals,
    append,
    new_event,
    now,
    seconds_of,
)
from segcore.metrics import metrics_text, write_metrics
from segcore.publish import read_manifest, write_json
from segcore.quicklook import THUMBNAIL, read_thumbnail
from segcore.report import write_report
from segcore.report.charts import STEPS, WIDTH, bars, cumulative, nice_top, spread, time_ticks
from segcore.report.findings import find
from segcore.report.thumbs import FOLDER
from segcore.scene import Outcome, Progress, segment_scene
from segcore.spec import Job, Settings
from segcore.status import read_status

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
EVIL = "<script>alert('&amp;')<!--"
SAFE = safe_name(EVIL)


def run_archive(scenes: list[Path], model: Path, out: Path, workers: Workers) -> dict[str, Any]:
    """A run over scenes, of which every one is really labelled, or really fails; what `run.json` says of it."""
    batch = find_jobs([str(scene) for scene in scenes], str(model), str(out), Settings())

    def label(job: Job, progress: Progress) -> Outcome:
        return segment_scene(job, workers, progress)

    Archive(batch.jobs, label, workers.drain, Silent(), Limits(scenes_at_once=1)).run()
    document: dict[str, Any] = json.loads((out / RUN_FILE).read_text())
    return document


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> Path:
    """Two runs over five small rasters, of which two cannot be opened, and one is called as no file should be."""
    folder = tmp_path_factory.mktemp("archive")
    model, scenes = save_local_unet(folder / "toy", "yx"), []
    for n, name in enumerate(("a2", "a10", EVIL)):
        path = folder / f"{name}.tif"
        values = np.random.default_rng(n).random((1, 80, 80), np.float32)
        with rasterio.open(
            path, "w", driver="GTiff", count=1, height=80, width=80, dtype="float32", crs="EPSG:32616",
            transform=from_origin(4e5, 3e6, 10, 10),
        ) as file:  # fmt: skip
            file.write(values)
            file.set_band_description(1, "value")
        scenes.append(path)
    for name in ("torn_1", f"torn{EVIL}"):
        (folder / f"{name}.tif").write_bytes(scenes[0].read_bytes()[:100])
        scenes.append(folder / f"{name}.tif")
    out = folder / "out"
    run_archive(scenes[:2], model, out, workers)
    run_archive(scenes, model, out, workers)
    return out


@pytest.fixture
def copy(archive: Path, tmp_path: Path) -> Path:
    """The same folder, to be spoiled."""
    return shutil.copytree(archive, tmp_path / "out")


class Page(html.parser.HTMLParser):
    """The elements of a page: their attributes, and the text of those that have an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.scripts: list[str] = []
        self._id = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._id = dict(attrs).get("id") or (tag if tag in ("script", "style") else "")

    def handle_endtag(self, tag: str) -> None:
        self._id = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._id] = self.texts.get(self._id, "") + data


def test_the_page_says_what_happened(archive: Path) -> None:
    page = Page(write_report(archive).read_text())
    data = json.loads(page.texts["data"])
    rows = {row[0]: dict(zip(("scene", "uri", "state"), row, strict=False)) | {"row": row} for row in data["rows"]}
    states = {name: data["states"][row["state"]] for name, row in rows.items()}
    assert states == {
        "a2": "up to date",
        "a10": "up to date",
        SAFE: "done",
        "torn_1": "failed",
        f"torn{SAFE}": "failed",
    }
    assert rows[SAFE]["uri"].endswith(f"{EVIL}.tif")
    manifest = read_manifest(archive / "a2" / "a2.json")
    assert manifest is not None
    shares = manifest["properties"]["segflow:classes"]
    assert rows["a2"]["row"][7] == pytest.approx([share["fraction"] for share in shares], abs=1e-4)
    assert rows["a2"]["row"][8] == pytest.approx([share["area_m2"] for share in shares], rel=1e-4)
    assert sum(rows["a2"]["row"][8]) == pytest.approx(80 * 80 * 100, rel=1e-3)
    assert rows["a2"]["row"][9:11] == ["a2/a2.json", "a2/a2_quicklook.png"]
    (legend,) = data["legends"]
    assert legend == {
        "names": ["class 0", "class 1", "class 2"],
        "colors": ["#0028c8", "#5028c8", "#a028c8"],
        "unit": "m2",
    }
    pictures = json.loads(page.texts["pictures"])
    assert len(pictures) == 3
    assert all(base64.b64decode(picture)[8:12] == b"WEBP" for picture in pictures)


def test_failures_stand_together_by_their_reason(archive: Path) -> None:
    (group,) = find(archive).groups
    assert group.error == "SceneError"
    assert set(group.scenes) == {"torn_1", f"torn{SAFE}"}
    assert {row.group for row in find(archive).rows} == {None, 0}


def test_names_of_files_are_text_whatever_they_are(archive: Path) -> None:
    text = write_report(archive).read_text()
    page = Page(text)
    assert "alert(" in text
    assert "<script>alert" not in text
    assert "<!--" not in text
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    attributes = {name for _, attrs in page.elements for name in attrs}
    assert not {name for name in attributes if name.startswith("on") or name == "style"}


def test_the_page_needs_nothing_else(archive: Path) -> None:
    text = write_report(archive).read_text()
    page = Page(text)
    links = [value or "" for _, attrs in page.elements for key, value in attrs.items() if key in ("src", "href")]
    assert all((archive / link).exists() for link in links), links
    assert not re.search(r"https?://", text)
    (policy,) = [attrs["content"] or "" for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs]
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.texts[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_thumbnails_are_drawn_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copy / ".segflow", ignore_errors=True)
    late = Page(write_report(copy, thumbnail_seconds=-1).read_text())
    assert json.loads(late.texts["pictures"]) == []
    first = write_report(copy).read_text()
    kept = {path: path.stat().st_ino for path in (copy / FOLDER).iterdir()}
    assert len(kept) == 3
    again = write_report(copy, thumbnail_seconds=-1).read_text()
    assert Page(again).texts["pictures"] == Page(first).texts["pictures"]
    # Another picture under the same name is drawn anew, and the others are not.
    shutil.copyfile(copy / "a10" / "a10_quicklook.png", copy / "a2" / "a2_quicklook.png")
    write_report(copy)
    drawn = {path.name for path, inode in kept.items() if path.stat().st_ino != inode}
    assert drawn == {"a2.webp"}
    # What does not fit into the page is taken from beside it.
    monkeypatch.setattr("segcore.report.page.EMBEDDED_BYTES", 0)
    page = Page(write_report(copy).read_text())
    assert json.loads(page.texts["pictures"]) == []
    places = [row[15] for row in json.loads(page.texts["data"])["rows"] if row[15] is not None]
    assert len(places) == 3
    assert all((copy / place).is_file() for place in places)


def test_quicklooks_carry_their_thumbnail(archive: Path, tmp_path: Path) -> None:
    quicklook = archive / "a2" / "a2_quicklook.png"
    carried = read_thumbnail(quicklook)
    with Image.open(io.BytesIO(carried)) as small, Image.open(quicklook) as sheet:
        assert (small.format, small.size) == ("WEBP", (THUMBNAIL, THUMBNAIL))
        sheet.save(tmp_path / "older.png")  # as older versions drew them: the whole sheet is shown
        wide = sheet.width / sheet.height
    with Image.open(io.BytesIO(read_thumbnail(tmp_path / "older.png"))) as small:
        assert small.width == THUMBNAIL
        assert small.width / small.height == pytest.approx(wide, rel=0.03)
    (tmp_path / "none.png").write_bytes(b"no picture")
    with pytest.raises(ProductError, match="is no quicklook"):
        read_thumbnail(tmp_path / "none.png")


def test_products_without_a_ledger(copy: Path) -> None:
    for name in (LEDGER_FILE, RUN_FILE):
        (copy / name).unlink()
    found = find(copy)
    assert sorted((row.scene, row.state, row.pixels) for row in found.rows) == [
        (SAFE, "done", 6400), ("a10", "done", 6400), ("a2", "done", 6400),
    ]  # fmt: skip
    assert all(row.seconds and row.uri for row in found.rows)
    assert "No run has left its word" in write_report(copy).read_text()


def test_a_ledger_without_products_and_words_that_lead_elsewhere(copy: Path) -> None:
    shutil.rmtree(copy / "a2")
    for product in ("../../etc/passwd.json", "/etc/passwd.json"):
        fields = {"scene": product, "uri": product, "product": product, "seconds": 1, "tiles": 1, "pixels": 1}
        append(copy / LEDGER_FILE, new_event(SCENE_DONE, "r", fields))
    rows = {row.scene: row for row in find(copy).rows}
    assert (rows["a2"].state, rows["a2"].manifest, rows["a2"].classes) == ("up to date", "", None)
    assert rows["../../etc/passwd.json"].manifest == rows["/etc/passwd.json"].manifest == ""
    write_report(copy)


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(ProductError, match="holds no run and no product"):
        write_report(tmp_path)
    with pytest.raises(ProductError, match="No such file"):
        write_report(tmp_path / "none")


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_in_a_browser(archive: Path, tmp_path: Path) -> None:
    write_report(archive)
    shown = browse(archive, tmp_path, "")
    assert shown[:2] == [f"torn{SAFE}", "torn_1"] or shown[:2] == [
        "torn_1",
        f"torn{SAFE}",
    ]
    assert browse(archive, tmp_path, "sort=scene&text=a") == [
        SAFE, "a2", "a10", "torn_1", f"torn{SAFE}",
    ]  # fmt: skip
    assert browse(archive, tmp_path, "sort=scene&order=descending&state=up+to+date") == ["a10", "a2"]
    shares = {row.scene: row.amounts[1] for row in find(archive).rows if row.amounts}
    by_share = browse(archive, tmp_path, "class=class+1&sort=share&order=descending")
    assert by_share == sorted(shares, key=lambda scene: -shares[scene])
    assert browse(archive, tmp_path, "text=nothing+like+it") == []


def browse(out: Path, tmp_path: Path, view: str) -> list[str]:
    """The scenes in the table as a browser shows it, in its order."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
        "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        f"{(out / REPORT_FILE).as_uri()}#{view}",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    table = ended.stdout[ended.stdout.index('<table id="table"') :]
    names = re.findall(r'<th class="name" scope="row"[^>]*>([^<]*)', table)
    assert "alert(" not in "".join(re.findall(r"<script>.*?</script>", table, re.DOTALL)[:-1])
    return names


RUNNING: dict[str, Any] = {
    "run_id": "r", "host": platform.node(), "started": "2026-11-26T02:00:00Z", "heartbeat": "2026-11-26T02:10:00Z",
    "ended": None, "seconds": 600.0, "exit_code": None, "total": 100, "model": "m", "warnings": ["disk is nearly full"],
    "counts": {"done": 18, "up to date": 0, "failed": 0, "quarantined": 0, "waiting": 80},
    "under_way": [{"name": "s18", "done": 1, "total": 2, "since": "2026-11-26T02:09:30Z"},
                  {"name": "s19", "done": 1, "total": 2, "since": "2026-11-26T02:09:30Z"}],
}  # fmt: skip
BEAT = seconds_of(RUNNING["heartbeat"])
assert BEAT is not None


@pytest.fixture
def running(tmp_path: Path) -> Path:
    """Ten minutes into a run: 18 of 100 scenes of 2 megapixels are done, two are half done."""
    write_json(tmp_path / RUN_FILE, RUNNING | {"pid": os.getpid(), "started": "2026-11-26T02:00:00Z"})
    began = seconds_of(RUNNING["started"])
    assert began is not None
    lines = [new_event(SCENE_FAILED, "an older run", {"scene": "old", "reason": "x"}), new_event(RUN_STARTED, "r", {})]
    for n in range(18):
        fields = {
            "scene": f"s{n}",
            "time": f"2026-11-26T02:{(n + 1) // 2:02}:00Z",
            "pixels": 2_000_000,
            "seconds": 30.0,
        }
        lines.append(new_event(SCENE_DONE, "r", fields))
    for line in lines:
        append(tmp_path / LEDGER_FILE, line)
    return tmp_path


def test_status_of_a_run_under_way(running: Path) -> None:
    found = read_status(running, BEAT + 5)
    assert (found.phase, found.failed, found.heartbeat_age, found.failures) == ("running", False, 5.0, ())
    assert [(scene.name, scene.done, scene.total) for scene in found.under_way] == [("s18", 1, 2), ("s19", 1, 2)]
    assert found.pixels_per_second == pytest.approx(36e6 / 540)  # the last one ended after nine minutes
    assert found.seconds_left == pytest.approx((82 - 1) / 19 * 605, abs=0.1)
    json.dumps(found.to_json(), allow_nan=False)


def test_status_of_a_run_that_is_gone(running: Path) -> None:
    def phase(at: float, **changes: object) -> str:
        write_json(running / RUN_FILE, RUNNING | changes)
        return read_status(running, at).phase

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert phase(BEAT + 14, pid=gone.pid) == "running"
    assert phase(BEAT + 16, pid=gone.pid) == "died"
    assert phase(BEAT + 59, pid=gone.pid, host="another host") == "running"
    assert phase(BEAT + 61, pid=gone.pid, host="another host") == "silent"
    alive = {"pid": os.getpid(), "started": now(), "heartbeat": now()}
    later = (seconds_of(alive["heartbeat"]) or 0) + 61
    assert phase(later, **alive) == "silent"
    if Path("/proc/self/stat").exists():  # this process began after that run: another was given its number
        assert phase(BEAT + 61, pid=os.getpid()) == "died"
    assert phase(BEAT + 61, pid=gone.pid, ended=now(), exit_code=75) == "ended"
    assert read_status(running).failed is False
    assert phase(BEAT + 61) == "silent"
    assert read_status(running).seconds_left is None


def test_the_commands(copy: Path, run_segflow: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    ended = run_segflow("report", copy)
    assert (ended.returncode, ended.stdout.strip()) == (0, str(copy / REPORT_FILE))
    said = run_segflow("status", copy)
    assert said.returncode == 1
    assert "2 up to date, 2 failed" in said.stdout
    assert "failed      torn_1: " in said.stdout
    document = json.loads(run_segflow("status", copy, "--json").stdout)
    assert (document["phase"], document["exit_code"], len(document["failures"])) == ("ended", 1, 2)
    (copy / RUN_FILE).write_text("{}")
    with pytest.raises(ProductError, match="is not the file of a run"):
        read_status(copy)


def test_metrics_are_what_prometheus_reads(archive: Path, tmp_path: Path) -> None:
    run, ledger = json.loads((archive / RUN_FILE).read_text()), Ledger(archive / LEDGER_FILE)
    write_metrics(tmp_path / METRICS_FILE, run | {"model": 'a "b"\\c\nd'}, ledger.totals)
    families = list(text_string_to_metric_families((tmp_path / METRICS_FILE).read_text()))
    samples = {(sample.name, *sample.labels.values()): sample.value for each in families for sample in each.samples}
    assert samples["segflow_scenes", "done"] == 1
    assert samples["segflow_scenes", "up_to_date"] == 2
    assert samples["segflow_scenes", "failed"] == 2
    assert samples["segflow_info", "0.1.0", 'a "b"\\c\nd'] == 1
    assert (samples["segflow_run_exit_code",], samples["segflow_run_running",]) == (1, 0)
    assert (samples["segflow_pixels_total",], samples["segflow_scenes_labelled_total",]) == (3 * 6400, 3)
    assert samples["segflow_last_run_timestamp_seconds",] == seconds_of(run["ended"])
    assert samples["segflow_last_success_timestamp_seconds",] <= samples["segflow_last_run_timestamp_seconds",]
    assert {each.type for each in families} == {"gauge", "counter"}
    assert all(each.documentation for each in families)


def test_metrics_of_a_run_under_way_leave_out_what_is_not_known() -> None:
    names = {each.name: each for each in text_string_to_metric_families(metrics_text(RUNNING, Totals()))}
    assert "segflow_run_exit_code" not in names
    assert "segflow_last_success_timestamp_seconds" not in names
    assert names["segflow_run_running"].samples[0].value == 1
    assert names["segflow_scenes_under_way"].samples[0].value == 2


def test_figures_add_up() -> None:
    works = [(100.0, 50.0, 10.0), (101.0, 0.0, 3.0), (160.0, 200.0, 7.0)]
    rates = spread(works, 0.0, 160.0)
    assert len(rates) == STEPS
    assert sum(rates) * 160 / STEPS == pytest.approx(20.0)
    assert all(bar.y >= 0 and bar.x + bar.width <= WIDTH for bar in bars(rates, nice_top(max(rates))))
    line = cumulative([1.0, 2.0, 2.0, 9.0], 0.0, 10.0, 4.0)
    assert (line.count, line.last) == (4, 0.0)
    assert [nice_top(value) for value in (0, 0.3, 1, 7, 24, 101)] == pytest.approx([1, 0.3, 1, 8, 25, 150])
    ticks = time_ticks(59.0, 3601.0)
    assert [tick.value for tick in ticks] == [600 * n for n in range(1, 7)]
    assert replace(ticks[0], at=0.0).value == 600
