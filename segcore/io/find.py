"""The scenes of an archive: what files, folders, patterns, lists, STAC documents, searches and BIDS datasets lead to.

Nothing of a scene is opened: what is no image is found out when its turn comes, and fails alone.
"""

from __future__ import annotations

import contextlib
import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from segcore.errors import SceneError, SegcoreError, one_line
from segcore.files import SCENE_SUFFIXES, absolute, is_remote, local_path
from segcore.io.bids import DESCRIPTION, bids_scenes, bids_suffix
from segcore.io.catalog import KINDS, READERS, walk_catalog
from segcore.io.documents import DOCUMENTS, Document, read_json
from segcore.io.found import Found, Problem
from segcore.io.search import Query, find_items, is_search, search_of
from segcore.io.stac import collection_ids, item_of, item_uri
from segcore.io.web import fetch_if_json, is_web

#: What a folder is searched for; anything else is opened when it is named.
IN_FOLDERS = (".tif", ".tiff", ".jp2", ".vrt", ".nii", ".nii.gz")
#: Files on servers that are taken for images without asking.
_IMAGES = tuple(suffix for suffix in SCENE_SUFFIXES if suffix not in DOCUMENTS)
_IMAGES += (".png", ".jpg", ".nc", ".h5", ".hdf", ".zip", ".gz")


def find_scenes(arguments: Sequence[str], *, channel: str = "T1w", keep: Path | None = None) -> Found:
    """The scenes that the arguments name, in order, each once, and what they lead to that is none.

    An argument is
    - a file;
    - a folder: the rasters and volumes in it or, where it has none, all in the folders below it. Hidden files and
      folders and segflow's own products are passed over;
    - a BIDS dataset, a folder with `dataset_description.json`: the images of its subjects with the suffix that
      `channel`, the first of the model's, is called by;
    - a glob, also with `**`, and a `.txt` with one argument a line, relative to its folder;
    - a STAC Item, ItemCollection, Catalog or Collection, a path or a URL, and `items.json#id`;
    - a search of a STAC API: its URL (`https://HOST/search?...`), or a document with `url` and what is searched for.
      Items without an address are written into the folder `keep`;
    - any other remote URI, as it is.
    What an argument leads to may fail without stopping the rest: it is a problem. Raises SceneError for an argument
    that leads nowhere itself, ProductError where `keep` cannot be written.
    """
    finder = _Finder(bids_suffix(channel), keep)
    uris: dict[str, None] = {}
    problems: dict[Problem, None] = {}
    for argument in arguments:
        try:
            for found in finder.expand(argument):
                if isinstance(found, Problem):
                    problems.setdefault(found)
                else:
                    uris.setdefault(found)
        except (OSError, ValueError) as error:
            raise SceneError(f"{argument!r}: {one_line(error)}; check the path") from error
    return Found(tuple(uris), tuple(problems))


@dataclass(frozen=True, slots=True)
class _Finder:
    """How arguments are expanded. `lists`: the list files that led here; `products`: whether a folder is a product."""

    suffix: str
    keep: Path | None
    lists: frozenset[Path] = frozenset()
    products: dict[str, bool] = field(default_factory=dict)

    def expand(self, argument: str) -> Iterator[str | Problem]:
        """What an argument leads to. Raises SceneError, OSError or ValueError where that is nothing at all."""
        if is_remote(argument):
            yield from self._remote(argument)
            return
        leads = item_of(argument)
        path = local_path(leads[0] if leads and leads[1] else argument)
        mode = None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mode = os.stat(path).st_mode
        if mode is None:
            if not glob.has_magic(argument):
                raise SceneError(f"{argument}: there is no such file; check the path")
            yield from self._matching(argument)
        elif stat.S_ISDIR(mode):
            yield from self._folder(path)
        elif path.suffix.lower() == ".txt":
            yield from self._listed(path)
        elif leads and not leads[1]:
            yield from self._local_document(argument)
        else:
            yield absolute(argument)

    def _remote(self, uri: str) -> Iterator[str | Problem]:
        leads, document = item_of(uri), None
        if is_search(uri):
            yield from find_items(Query(uri), self.keep)
        elif leads and leads[1]:
            yield uri
        elif is_web(uri) and not urlsplit(uri).path.lower().endswith(_IMAGES):
            if leads:
                document = read_json(uri)
            elif page := fetch_if_json(uri):
                document = Document(page.value, page.url)
            yield from self._document(document, uri) if document else (uri,)
        elif leads:
            yield from self._document(read_json(uri), uri)
        else:
            yield uri

    def _local_document(self, argument: str) -> Iterator[str | Problem]:
        """A STAC document in a file. A broken one is passed on: it fails as a scene of its own."""
        try:
            document = read_json(argument)
        except SceneError:
            yield absolute(argument)
            return
        yield from self._document(document, absolute(argument))

    def _document(self, document: Document, uri: str) -> Iterator[str | Problem]:
        """What a document leads to; `uri` is where it was asked for."""
        if document.type in KINDS:
            yield from walk_catalog(document, self.keep)
        elif query := search_of(document):
            yield from find_items(query, self.keep)
        elif document.type == "FeatureCollection" and is_remote(uri):
            yield from find_items(Query(uri), self.keep, document)
        elif document.type == "FeatureCollection":
            yield from [f"{uri}#{name}" for name in collection_ids(document) or ()] or [uri]
        elif is_remote(uri) and document.type == "Feature":
            name = document.value.get("id")
            yield item_uri(uri, name if isinstance(name, str) else None)
        elif is_remote(uri):
            raise SceneError(f"{uri} is JSON, and no STAC document: its `type` is {document.type!r}; check the address")
        else:
            yield uri

    def _matching(self, pattern: str) -> Iterator[str | Problem]:
        """The files and folders that a glob names; of one with `**` the files only. Products are passed over."""
        matches = sorted(glob.glob(pattern, recursive=True))
        folders = {match for match in matches if os.path.isdir(match)}  # noqa: PTH112 (called for every match)
        if "**" in pattern:
            matches = [match for match in matches if match not in folders]
        matches = [
            match
            for match in matches
            if not self._is_product(os.path.dirname(match) or ".")  # noqa: PTH120 (called for every match)
            and not (match in folders and (self._is_product(match) or not _holds_scene(Path(match))))
        ]
        found = list(self._each(matches, self.expand))
        if not found:
            raise SceneError(f"{pattern}: there is no such file, or no folder with a scene; check the pattern")
        yield from found

    def _is_product(self, folder: str) -> bool:
        if folder not in self.products:
            with contextlib.suppress(OSError):
                self.products[folder] = _is_product(folder, os.listdir(folder))
        return self.products.get(folder, False)

    def _listed(self, path: Path) -> Iterator[str | Problem]:
        """The arguments in a text file, relative to its folder; lines that are empty or begin with # are left out."""
        if path.resolve() in self.lists:
            raise SceneError(f"{path} lists itself; remove that line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        entries = [line for line in lines if line and not line.startswith("#")]
        if not entries:
            raise SceneError(f"{path} lists no scene; write one path a line")
        folder = str(path.parent)
        inner = replace(self, lists=self.lists | {path.resolve()})
        full = [
            entry if is_remote(entry) or entry.startswith(("/", "file://")) else f"{folder}/{entry}"
            for entry in entries
        ]
        yield from inner._each(full, inner.expand)

    def _each(
        self, entries: Sequence[str], expand: Callable[[str], Iterator[str | Problem]]
    ) -> Iterator[str | Problem]:
        """What each of several entries leads to, in order; one that leads nowhere is a problem."""

        def one(entry: str) -> list[str | Problem]:
            try:
                return list(expand(entry))
            except SceneError as error:
                return [Problem(entry, str(error))]
            except SegcoreError:
                raise
            except (OSError, ValueError) as error:
                return [Problem(entry, f"{one_line(error)}; check the path")]

        if any(is_remote(entry) for entry in entries):
            with ThreadPoolExecutor(READERS) as pool:
                yield from (found for several in pool.map(one, entries) for found in several)
        else:
            yield from (found for entry in entries for found in one(entry))

    def _folder(self, folder: Path) -> Iterator[str | Problem]:
        if (folder / DESCRIPTION).is_file():
            yield from map(absolute, bids_scenes(folder, self.suffix))
            return
        here, product, _ = _scan(str(folder))
        found: list[str | Problem] = [*here] or list(self._below(str(folder)))
        if product or not any(isinstance(entry, str) for entry in found):
            what = "a product of segflow" if product else f"a folder without a scene ({', '.join(IN_FOLDERS)})"
            problem = next((entry.reason for entry in found if isinstance(entry, Problem)), "name another one")
            raise SceneError(f"{folder} is {what}; {problem}")
        yield from (absolute(entry) if isinstance(entry, str) else entry for entry in found)

    def _below(self, folder: str) -> Iterator[str | Problem]:
        """All scenes in a folder and below it; a link into what was seen before is not followed."""
        waiting, seen = [folder], set()
        while waiting:
            at = waiting.pop()
            try:
                status = os.stat(at)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                if at != folder and os.path.isfile(f"{at}/{DESCRIPTION}"):  # noqa: PTH113 (called for every folder)
                    yield from bids_scenes(Path(at), self.suffix)
                    continue
                files, product, folders = _scan(at)
            except (OSError, SceneError) as error:
                yield Problem(at, one_line(error))
                continue
            if not product:
                yield from files
                waiting += reversed(folders)


def _scan(folder: str) -> tuple[list[str], bool, list[str]]:
    """The scenes in a folder, whether it is a product, and the folders in it; in order, hidden ones left out."""
    files, folders, names = [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith(IN_FOLDERS):
                files.append(entry.path)
    if _is_product(folder, names):
        return [], True, []
    return sorted(files), False, sorted(folders)


def _is_product(folder: str, names: Sequence[str]) -> bool:
    """Whether a folder with these names in it is a product: a manifest and a mask, both called after the folder."""
    own = os.path.basename(os.path.abspath(folder))  # noqa: PTH100, PTH119 (links stay)
    return f"{own}.json" in names and any(name.startswith(f"{own}_mask.") for name in names)


def _holds_scene(folder: Path) -> bool:
    """Whether there is anything in a folder that is found for it."""
    with contextlib.suppress(OSError):
        return (folder / DESCRIPTION).is_file() or any(True for _ in _Finder("", None)._below(str(folder)))
    return True
