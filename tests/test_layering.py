"""The layout's promises: which way imports go, who knows mace, who knows kinds of layers."""

import ast
import re
from pathlib import Path

import pytest

import mace_lora
from mace_lora.adapters.registry import METHODS
from mace_lora.backends.registry import BACKENDS
from mace_lora.upstream.substitutions import ROWS

ROOT = Path(mace_lora.__file__).parent

# From the doors down; a file imports from its own floor and from those below it
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("commands", "testing"),
    ("__init__",),
    ("api",),
    ("tuning",),
    ("training",),
    ("check", "trust"),
    ("results",),
    ("frames",),
    ("upstream",),
    ("backends", "model"),
    ("config",),
    ("adapters",),
    ("errors", "files", "parsing", "printing", "_compat"),
)
# What is one file and one line of a registry: the others never import it
REGISTERED = {
    *(f"adapters/{kind.partition(':')[0]}.py" for kind, _ in METHODS.values()),
    *(f"backends/{kind.partition(':')[0]}.py" for kind in BACKENDS.values()),
}


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


def texts(path: Path) -> set[str]:
    """Texts in a file, without what is written in f-strings: names of modules would be there."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    return {text for text in constants if isinstance(text, str)}


def mentions_of_mace(file: str) -> set[str]:
    """Imports of mace, at whatever place in a file, and texts that name it or a module of it."""
    named = {t for t in texts(ROOT / file) if re.fullmatch(r"mace(\.\w+)*\.?", t)}
    return named | {i for i in FILES[file] if i.split(".")[0] == "mace"}


def test_only_upstream_knows_mace():
    """However it is reached: by an import, a lazy one, or `importlib` and a text."""
    known = {
        "model/layers.py": {"mace"},  # the package of a layer's class: nothing is imported
    }
    found = {f: mentions_of_mace(f) for f in FILES if room(f) != "upstream"}
    assert {f: names for f, names in found.items() if names} == known


def test_all_that_is_known_of_mace_stands_in_the_table():
    """So that it is checked before a run, and its reason can be read."""
    rows = ROWS.values()
    told = {row.module for row in rows} | {f"{row.module}.{row.attribute}" for row in rows}
    for file in FILES:
        if room(file) == "upstream":
            assert mentions_of_mace(file) <= told, file


def test_only_layers_knows_layers_of_e3nn():
    # faster code for the same layers
    fused = {f"backends/{name}.py" for name in ("products", "plain_layers", "radial")}
    known = {"model/layers.py", "upstream/mini.py", "upstream/hyperparameters.py", *fused}
    assert {n for n in FILES if uses(n, "e3nn")} <= known


def test_adapters_and_backends_know_nothing_of_each_other():
    """What several of them need lies in a file that isn't registered."""
    assert set(FILES) >= REGISTERED
    modules = {f"mace_lora.{file.removesuffix('.py').replace('/', '.')}" for file in REGISTERED}
    for file in FILES:
        if room(file) in ("adapters", "backends"):
            assert not FILES[file] & modules, file


def test_files_are_short_enough_to_read():
    for path in ROOT.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
