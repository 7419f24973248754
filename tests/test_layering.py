"""The direction of imports that the layout promises."""

import ast
from pathlib import Path

import mace_lora
from mace_lora.commands import COMMANDS

ROOT = Path(mace_lora.__file__).parent


def imports(path: Path) -> set[str]:
    """Everything that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


FILES = {str(p.relative_to(ROOT)): imports(p) for p in sorted(ROOT.rglob("*.py"))}


def uses(name: str, package: str) -> bool:
    return any(i == package or i.startswith(package + ".") for i in FILES[name])


def test_there_are_files_to_look_at():
    assert {"cli.py", "host/session.py", "adapters/lora.py"} <= set(FILES)


def test_only_the_host_imports_mace():
    assert [n for n in FILES if uses(n, "mace") and not n.startswith("host/")] == []


def test_only_blocks_knows_layers_of_e3nn():
    fused = {"step/products.py", "step/layers.py"}  # faster code for the same layers
    assert {n for n in FILES if uses(n, "e3nn")} <= {"blocks.py", "host/mini.py", *fused}


def test_steps_know_no_adapter():
    allowed = {"mace_lora.errors", "mace_lora.files", "mace_lora._compat", "mace_lora.step"}
    for name, found in FILES.items():
        if name.startswith("step/"):
            ours = {i for i in found if i.startswith("mace_lora.")}
            assert all(any(f"{i}.".startswith(f"{a}.") for a in allowed) for i in ours), name


def test_adapters_import_no_other_adapter():
    shared = {"mace_lora.adapters.base", "mace_lora.adapters.low_rank"}
    allowed = {*shared, "mace_lora.blocks", "mace_lora.errors"}
    for name, found in FILES.items():
        if name.startswith("adapters/") and name != "adapters/base.py":
            ours = {i for i in found if i.startswith("mace_lora.") and i.count(".") >= 1}
            modules = {i for i in ours if any(i == a or i.startswith(a + ".") for a in allowed)}
            assert ours == modules, name


def test_low_layers_import_no_high_ones():
    order = [
        {"errors.py", "_compat.py", "files.py", "contractions.py", "printing.py"},
        {"blocks.py"},
        {"adapters/base.py", "adapters/registry.py"},
        {"config.py"},
        {"report.py", "selection.py"},
        {"injection.py"},
        {"merging.py", "artefact.py", "fingerprint.py"},
        {"progress.py", "page.py"},
        {"host/upstream.py"},
        {
            "host/models.py",
            "host/order.py",
            "host/signals.py",
            "host/writing.py",
            "host/steplog.py",
            "host/cueq.py",
        },
        {"host/processes.py", "host/frames.py", "host/stored.py"},
        {"host/checks.py", "host/identity.py"},
        {"evaluation.py", "host/steps.py", "host/speed.py", "host/checkpoints.py"},
        {"host/loop.py"},
        {"pictures.py"},
        {"host/training.py", "host/saving.py"},
        {"host/reporting.py"},
        {"host/session.py"},
        {"host/run.py"},
        {"api.py", "doctor.py"},
        {"calculator.py", "extraction.py", "switching.py"},
        {"commands/common.py"},
        {f"commands/{name}.py" for name in COMMANDS},
        {"cli.py"},
    ]
    rank = {name: level for level, names in enumerate(order) for name in names}
    for name, level in rank.items():
        for other, other_level in rank.items():
            module = "mace_lora." + other.removesuffix(".py").replace("/", ".")
            if other_level > level:
                assert not uses(name, module), f"{name} imports {module}"


def test_files_are_short_enough_to_read():
    for path in ROOT.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
