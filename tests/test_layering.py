"""The layout's promises: which way imports go, who knows mace, who knows kinds of layers."""

import ast
from pathlib import Path

import pytest

import mace_lora

ROOT = Path(mace_lora.__file__).parent

# From the doors down; a file imports from its own floor and from those below it
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("commands", "testing"),
    ("__init__",),
    ("api",),
    ("training",),
    ("results",),
    ("frames",),
    ("upstream",),
    ("backends", "model"),
    ("config",),
    ("adapters",),
    ("errors", "files", "parsing", "printing", "_compat"),
)
# What adapters share; every other file there is a method
SHARED_BY_ADAPTERS = {"base", "layout", "options", "registry", "low_rank", "paths", "full_update"}


def imports(path: Path) -> set[str]:
    """Everything that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


FILES = {p.relative_to(ROOT).as_posix(): imports(p) for p in sorted(ROOT.rglob("*.py"))}
RANK = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room(file: str) -> str:
    """The folder of a file, or its own name at the root."""
    return file.split("/")[0].removesuffix(".py")


def rooms_used(file: str) -> set[str]:
    ours = (i.split(".") for i in FILES[file] if i.startswith("mace_lora."))
    return {parts[1] for parts in ours if parts[1] in RANK}


def uses(file: str, package: str) -> bool:
    return any(i == package or i.startswith(package + ".") for i in FILES[file])


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down(file):
    assert room(file) in RANK, f"{file}: which floor is it on?"
    above = {r for r in rooms_used(file) if RANK[r] < RANK[room(file)]}
    assert not above, f"{file} imports from above: {sorted(above)}"


def test_only_upstream_imports_mace():
    assert [n for n in FILES if uses(n, "mace") and room(n) != "upstream"] == []


def test_only_layers_knows_layers_of_e3nn():
    fused = {"backends/products.py", "backends/layers.py"}  # faster code for the same layers
    known = {"model/layers.py", "upstream/mini.py", *fused}
    assert {n for n in FILES if uses(n, "e3nn")} <= known


def test_no_adapter_imports_another():
    adapters = {f for f in FILES if room(f) == "adapters"}
    for file in adapters:
        used = {i.split(".")[2] for i in FILES[file] if i.startswith("mace_lora.adapters.")}
        assert used <= SHARED_BY_ADAPTERS, file


def test_files_are_short_enough_to_read():
    for path in ROOT.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
