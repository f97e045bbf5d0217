"""The `segflow` command as a process that is measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.measure import Measured, environment, measure, start_up

COMMAND = str(Path(sys.executable).with_name("segflow"))


@dataclass(frozen=True, slots=True)
class Labelled:
    """Where the product of a scene lies: `stem` + `_mask.tif` and so on."""

    out: Path
    scene: Path

    @property
    def name(self) -> str:
        return self.scene.name.partition(".")[0]

    @property
    def stem(self) -> str:
        return str(self.out / self.name / self.name)

    @property
    def properties(self) -> dict[str, Any]:
        """What the manifest says."""
        found: dict[str, Any] = json.loads(Path(f"{self.stem}.json").read_text())["properties"]
        return found

    @property
    def engine(self) -> str:
        return str(self.properties["segflow:model"]["engine"])


def label(scene: Path, model: Path | str, out: Path, *options: object) -> Measured:
    """From file to product, anew, the start-up of Python left out; `said` is what the manifest says."""
    shutil.rmtree(out, ignore_errors=True)
    found = measure([COMMAND, "run", "--no-prefect", scene, "-m", model, "-o", out, *options])
    return replace(found.without(start_up()), said=Labelled(out, scene).properties)


def whole_process(scene: Path, model: Path | str, out: Path, *options: object) -> Measured:
    """The same, with the start-up of Python."""
    shutil.rmtree(out, ignore_errors=True)
    return measure([COMMAND, "run", "--no-prefect", scene, "-m", model, "-o", out, *options])


@cache
def knows(option: str) -> bool:
    """Whether `segflow run` has this option."""
    found = subprocess.run(
        [COMMAND, "run", "--help"], capture_output=True, text=True, check=True, env=environment() | {"COLUMNS": "200"}
    )
    return option in found.stdout
