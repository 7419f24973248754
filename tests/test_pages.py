"""The pages hold together, and say what the code says: links, names, flags, commands, length."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

import mace_lora
from mace_lora.commands import COMMANDS
from mace_lora.training.arguments import build_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    and "results" not in path.parts
)
# Flags of sbatch, ruff and mace_create_lammps_model that the pages speak of
OF_OTHERS = {"--account", "--array", "--gpus", "--gres", "--nodes", "--partition", "--signal"}
OF_OTHERS |= {"--check", "--format", "--time", "--nproc_per_node"}
SUFFIXES = (".py", ".sh", ".yaml", ".sbatch")
EXAMPLES = {"my_model.yaml", "best.yaml", "gains.py"}  # that a run and an example make
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def code(page: Path) -> set[str]:
    """Everything between single backticks."""
    return set(re.findall(r"`([^`]+)`", prose(page)))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target}: no such file"
        if anchor:
            place = there / "README.md" if there.is_dir() else there
            assert anchor in anchors(place), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page):
    """By their names, or by paths from anywhere in the repository."""
    paths = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.suffix in SUFFIXES]
    named = {c for c in code(page) if re.fullmatch(r"[\w./-]+", c)} - EXAMPLES
    named = {c for c in named if Path(c).suffix in SUFFIXES}
    unknown = [n for n in named if not any(f"/{p}".endswith(f"/{n}") for p in paths)]
    assert [n for n in unknown if not (page.parent / n).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_every_page_is_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        page = page / "README.md" if page.is_dir() else page
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", prose(page))
        todo += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert set(PAGES) == seen


def test_the_names_of_the_package_are_listed():
    """By `help(mace_lora)`, by `__all__` and by the page on Python: the same names."""
    public = set(mace_lora.__all__) - {"__version__"}
    assert all(getattr(mace_lora, name) is not None for name in public)
    assert public <= set(re.findall(r"\w+", mace_lora.__doc__))
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "mace_lora/api/README.md").read_text(), flags=re.M)
    assert {name for row in table for name in re.findall(r"`(\w+)`", row)} == public


def test_the_commands_are_listed():
    table = (ROOT / "mace_lora/commands/README.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", table.partition("##")[0], flags=re.M)
    assert set(listed) == {"train", *COMMANDS}


def test_the_tables_of_flags_are_up_to_date():
    page = ROOT / "configs" / "README.md"
    script = runpy.run_path(str(ROOT / "scripts" / "flags_page.py"))
    assert script["written"](page.read_text()) == page.read_text(), "python scripts/flags_page.py"


def test_the_tables_hold_every_flag_of_ours():
    """Those that `mace_run_train --help` has beyond mace-torch's."""
    from mace.tools import build_default_arg_parser

    upstream = set(build_default_arg_parser()._option_string_actions)
    ours = set(build_parser()._option_string_actions) - upstream - {"--version"}
    page = (ROOT / "configs" / "README.md").read_text().replace("<method>", "lora")
    listed = set(re.findall(r"`(--\w+)", page))
    methods = {
        f for f in ours if not re.match(r"--(elora|mmea|dora|full)_(targets|exclude|modu|bias)", f)
    }
    assert methods <= listed


def known_flags() -> set[str]:
    """Flags of all programs: those of the parser of a run, and what the sources of others name."""
    folders = [ROOT / "mace_lora" / "commands", ROOT / "scripts"]
    sources = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".py", ".sh")]
    named = {flag for path in sources for flag in re.findall(r"--[a-z]\w*", path.read_text())}
    return named | set(build_parser()._option_string_actions) | OF_OTHERS


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_flags_in_the_prose_exist(page):
    named = {f for c in code(page) for f in re.findall(r"(?<!\S)--[a-z]\w*", c)}
    example = {flag for flag in named if flag.startswith("--gains_")}  # of "Add a method"
    assert named - example <= known_flags()


def test_configurations_are_listed():
    page = (ROOT / "configs" / "README.md").read_text()
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"({path.name})" in page


def test_the_file_to_edit_is_the_command_of_the_readme():
    command = re.search(r"^mace_run_train .*?[^\\]$", (ROOT / "README.md").read_text(), re.S | re.M)
    flags = dict(re.findall(r"--(\w+)(?:=(\S+))?", command[0]))
    content = yaml.safe_load((ROOT / "configs" / "finetune.yaml").read_text())
    for flag in {*flags} - {"test_file"}:
        value = yaml.safe_load(flags[flag] or "true")
        assert content[flag] == value, flag
