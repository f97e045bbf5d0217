"""The shape of the house: imports go down only, and every heavy library has one home."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "flows": 6,
    "segcore.demo": 6,
    "segcore.crew": 5.5,
    "segcore.report": 3.5,
    "segcore.scene": 5,
    "segcore.survey": 4.5,
    "segcore.calibrate": 4.6,
    "segcore.execute": 4,
    "segcore.worker": 3.8,
    "segcore.cluster": 3.8,
    "segcore.seams": 3.5,
    "segcore.precision": 3.5,
    "segcore.tile": 3,
    "segcore.publish": 3,
    "segcore.quicklook": 2,
    "segcore.scaling": 2.5,
    "segcore.io": 2,
    "segcore.model": 2,
    "segcore.resample": 1.5,
    "segcore.plan": 1,
    "segcore.metrics": 1,
    "segcore.status": 1,
    "segcore.ledger": 0.75,
    "segcore.staging": 0.7,
    "segcore.files": 0.5,
    "segcore.grid": 0.5,
    "segcore.lease": 1,
    "segcore.lock": 0.5,
    "segcore.register": 0.5,
    "segcore.spec": 0.5,
    "segcore.notes": 0.55,
    "segcore.speed": 0.6,
    "segcore.machine": 0.6,
    "segcore.box": 0,
    "segcore.errors": 0,
    "segcore": 0,
}
HOMES = {
    "prefect": {"flows.segment", "flows.artifacts", "flows.servers", "flows.command"},
    "typer": {f"flows.{name}" for name in ("command", "models", "options", "planning", "reports", "servers")},
    "rich": {"flows.planning", "flows.models", "flows.console"},
    "distributed": {"segcore.execute", "segcore.worker", "segcore.cluster"},
    "dask": {"segcore.cluster"},
    "tornado": {"segcore.cluster"},
    "yaml": {"segcore.cluster"},
    "psutil": {"segcore.machine"},
    "rasterio": {"segcore.io.geotiff", "segcore.io.cog"},
    "nibabel": {"segcore.io.nifti"},
    "zarr": {"segcore.io.scratch"},
    "google_crc32c": {"segcore.io.scratch"},
    "pystac": {"segcore.io.stac"},
    "onnxruntime": {"segcore.model.onnx", "segcore.model.graph", "segcore.model.stages"},
    "onnx": {f"segcore.model.{name}" for name in ("cut", "graph", "marking", "stages")},
    "openvino": {"segcore.model.openvino", "segcore.model.quantise"},
    "nncf": {"segcore.model.quantise"},
    "torch": {f"segcore.model.{name}" for name in ("torch", "unet", "archive", "pack")},
    "safetensors": {"segcore.model.archive", "segcore.model.pack"},
    "pydantic": {"segcore.model.card", "flows.segment"},
    "PIL": {"segcore.quicklook"},
    "jinja2": {"segcore.report.page"},
    "obstore": {"segcore.register", "segcore.io.objects"},
}
PURE = {
    f"segcore.{name}"
    for name in (
        "errors", "files", "notes", "ledger", "status", "metrics", "box", "grid", "spec", "speed", "staging", "plan",
        "lock", "lease", "report.charts",
    )
}  # fmt: skip


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted([*ROOT.glob("segcore/**/*.py"), *ROOT.glob("flows/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(module: str) -> float:
    parts = module.split(".")
    return next(FLOORS[key] for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in FLOORS)


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_go_down_only(name: str, path: Path) -> None:
    for imported in imports_of(path):
        package = imported.split(".")[0]
        if package in ("segcore", "flows"):
            assert floor_of(imported) <= floor_of(name), f"{name} must not import {imported}"
            pair = {
                name.split(".")[1:2][0] if "." in name else "",
                imported.split(".")[1:2][0] if "." in imported else "",
            }
            assert pair != {"io", "model"}, f"{name} must not import {imported}"
        elif package in HOMES:
            assert name in HOMES[package], f"{package} has its home in {HOMES[package]}, not in {name}"
        if name in PURE:
            assert package in ("segcore", *sys.stdlib_module_names), f"{name} is pure and imports {imported}"
        if name.startswith("flows"):
            assert package != "numpy", f"{name} handles no arrays"


def test_no_cupboard_modules() -> None:
    assert not {name.rpartition(".")[2] for name, _ in modules()} & {"utils", "common", "helpers", "misc"}


def test_every_module_stays_readable() -> None:
    long = {name: lines for name, path in modules() if (lines := len(path.read_text().splitlines())) > 520}
    assert not long, f"split these: {long}"
