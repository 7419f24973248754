"""What a reader types works: the commands and the Python of the pages.

`test_every_command_is_understood` reads the commands of all pages, fenced and inline, and hands
each to its own parser: an unknown flag or a renamed script fails. `test_the_story_runs` runs those
of the pages in `STORY` in their order, in one folder, as they stand there but for what `CHANGED`
says; what needs another machine, hours or an installation of its own is in `ELSEWHERE`, with the
test that runs it.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest
import torch
from helpers.adapter_folders import make_adapter
from helpers.frames import DATA

from mace_lora import cli, load_adapter, load_foundation, merge, parsing
from mace_lora.commands import build_parser

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    and "results" not in path.parts
)

# The pages whose commands and Python are run, each finding what those before it left
STORY = ("README.md", *(f"mace_lora/{d}/README.md" for d in ("training", "commands", "api")))
STORY = (*STORY, "scripts/README.md")
# How their commands are changed before they are run: the beginning of a command -> more flags.
# `medium_off` is a copy of `mini` in mace-torch's download cache; the data are frames of ethanol.
CHANGED = {
    "mace_run_train": ["--max_num_epochs=1"],
    "torchrun": ["--max_num_epochs=1"],
    "mace_lora trust": ["--ps=0.02"],
    "mace_lora md": ["--ps=0.02"],
    "python scripts/bench_step.py": ["--quick", "--channels=4", "--rounds=1", "--threads=1"],
}
# What is not run here: the beginning of a command -> the file, and the words in it that run it.
ELSEWHERE = {
    "scripts/quickstart.sh": ("tests/scripts/test_scripts.py", "def test_quickstart"),
    "scripts/test.sh": (".ci/run", "scripts/test.sh"),
    "pip install .": ("tests/test_install.py", '"pip", "install", "-q", str(ROOT)'),
    "scripts/examples/fine_tune.sh": ("tests/scripts/test_examples.py", '"fine_tune.sh"'),
    "python scripts/examples/own_loop.py": ("tests/scripts/test_examples.py", '"own_loop.py"'),
    "python scripts/examples/finetune.py": ("tests/scripts/test_examples.py", '"finetune.py"'),
    "python scripts/examples/crystal_stress.py": (
        "tests/scripts/test_examples.py",
        '"crystal_stress.py"',
    ),
    "sbatch '$(mace_lora slurm)/one_gpu.sbatch'": ("tests/scripts/test_slurm.py", "one_gpu.sbatch"),
    "python scripts/examples/committee.py": ("tests/scripts/test_examples.py", '"committee.py"'),
    "scripts/reproduce.sh": ("tests/scripts/test_reproduction.py", '"reproduce.py"), "rmd17"'),
    "python scripts/study.py": ("tests/scripts/test_scripts.py", "def test_study"),
    "FUZZ_EXAMPLES=3000 pytest": ("tests/test_fuzz.py", "FUZZ_EXAMPLES"),
    "python scripts/fetch_data.py spice2022": (
        "tests/scripts/test_transfer.py",
        "prepare_spice2022",
    ),
    "mace_lora tune": ("tests/commands/test_tune.py", 'tool_prints(capsys, "tune"'),
    "mace_lora select": ("tests/test_committee.py", '"select", tmp_path'),
    "mace_run_train --members": ("tests/test_committee.py", '"--members=2"'),
    "mace_lora extract --base mini": ("tests/commands/test_tools.py", '"extract", *flags'),
}
# Inline words that name a command and don't give one.
NAMES = {
    *("mace_lora train", "python -m mace_lora train", "mace_run_train --distributed"),
    *("mace_lora info", "mace_lora extract", "mace_lora completion", "mace_run_train --help"),
    *("mace_lora trust", "mace_lora tune", "mace_lora check", "mace_lora select"),
    *("scripts/reproduce.sh rmd17", "scripts/reproduce.sh --help"),
}
PROGRAMS = r"(?:mace_run_train|mace_create|mace_lora|python|pip|sbatch|torchrun|scripts/|FUZZ_)"


def commands(document: Path) -> list[str]:
    """The commands of a document in their order: lines of bash blocks, and inline ones."""
    found = []
    for block, inline in re.findall(
        r"^```bash\n(.*?)^```|^```.*?^```|`([^`]+)`", document.read_text(), flags=re.S | re.M
    ):
        lines = block.replace("\\\n", " ").splitlines() if block else [inline.replace("\n", " ")]
        for line in lines:
            words = shlex.split(line, comments=True) if block else line.split()
            inside = len(words) > 1 and re.match(PROGRAMS, line) and line not in NAMES
            if words and (block or inside):
                found.append(" ".join(map(shlex.quote, words)))
    return found


ALL = [(document, command) for document in DOCUMENTS for command in commands(document)]


class Understood(Exception):
    """Raised in place of the work of a program whose flags were read without complaint."""


@pytest.fixture
def only_parse(monkeypatch):
    """Parsers stop a program once they have read its flags."""
    read = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        read(self, args, namespace)
        raise Understood

    def only_parse() -> None:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)

    return only_parse


def understood(words: list[str], only_parse, monkeypatch) -> None:
    """Hand a command to its own parser; fails as the command itself does."""
    while "=" in words[0] and not words[0].startswith("-"):  # DEVICE=cpu sbatch ...
        words = words[1:]
    program, *rest = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        rest = get_args_parser().parse_args(rest).training_script_args
        assert rest[0] == "train"
        cli.parse(rest[1:])
    elif program == "mace_run_train":
        cli.parse(rest)
    elif program == "mace_lora" or rest[:2] == ["-m", "mace_lora"]:
        rest = rest[2:] if program == "python" else rest
        if rest != ["--version"]:
            parsing.parse(build_parser(rest[0]), rest[1:])
    elif program == "mace_create_lammps_model":
        from mace.cli import create_lammps_model

        monkeypatch.setattr(sys, "argv", words)
        only_parse()
        with pytest.raises(Understood):
            create_lammps_model.main()
    elif program == "sbatch":
        place = next(i for i, word in enumerate(rest) if word.endswith(".sbatch"))
        packaged = str(ROOT / "mace_lora" / "data" / "slurm")
        script = (ROOT / rest[place].replace("$(mace_lora slurm)", packaged)).read_text()
        flags = [f for f in rest[place + 1 :] if f != "..."]
        if "reproduce.sh rmd17" in script:
            understood(["scripts/reproduce.sh", "rmd17", *flags], only_parse, monkeypatch)
        else:
            cli.parse(["--name=any", *flags])
    elif program == "scripts/reproduce.sh":
        monkeypatch.syspath_prepend(ROOT / "scripts")
        import reproduce

        if rest[:1] == ["transfer"]:
            reproduce.transfer.parse(rest[1:])
            return
        _, others = reproduce.parse(rest)
        flags = [f"--{name}={value}" for name, value in others.items()]
        cli.build_parser().parse_args(["--name=any", *flags])
    elif program in ("pytest", "ruff") or rest[:2] == ["-m", "pytest"]:
        paths = [word for word in rest if word.startswith(("tests", "mace_lora", "scripts"))]
        assert all((ROOT / path.partition("::")[0]).exists() for path in paths)
    elif program == "python" or program.endswith(".py"):
        script, *flags = rest if program == "python" else words
        if flags:
            monkeypatch.syspath_prepend(ROOT / "scripts")
            monkeypatch.setattr(sys, "argv", [script, *flags])
            only_parse()
            with pytest.raises(Understood):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        assert (ROOT / script).exists()
    elif program == "pip":
        assert rest in (["install", "."], ["install", "-e", ".[test]"])
    else:
        assert program.startswith("scripts/"), f"no program is known as {program}"
        assert os.access(ROOT / program, os.X_OK)


@pytest.mark.parametrize(
    ("document", "command"), ALL, ids=[f"{d.parent.name}:{c}"[:90] for d, c in ALL]
)
def test_every_command_is_understood(document, command, only_parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    understood(shlex.split(command), only_parse, monkeypatch)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("mace_run_train --config=configs/finetune.yaml --lora_rnak=4", "lora_rnak"),
        ("mace_lora merge --base mini --adapter a --out m.model --strength 2", "strength"),
        ("python scripts/study.py init --out a --epoch_number=2", "epoch_number"),
        ("scripts/reproduce.sh rmd17 aspirin --adapter=mmea --devise=cuda", "devise"),
        ('sbatch "$(mace_lora slurm)/one_gpu.sbatch" --nmae=my_model', "nmae"),
        ("torchrun -m mace_lora train --config=configs/finetune.yaml --eppochs=3", "eppochs"),
        ("python scripts/bench_steps.py --frames a.xyz", "bench_steps.py"),
    ],
)
def test_a_wrong_command_would_be_noticed(command, message, only_parse, monkeypatch, capsys):
    """The test above can fail: an unknown flag or a script that is not there."""
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, FileNotFoundError)) as failed:
        understood(shlex.split(command), only_parse, monkeypatch)
    assert message in f"{failed.value}{capsys.readouterr().err}"


def test_what_runs_elsewhere_does():
    for file, words in ELSEWHERE.values():
        assert words in (ROOT / file).read_text(), f"{file} doesn't run it any more"


def begins(command: str, table: dict) -> str | None:
    """The key of `table` that the command begins with."""
    found = [key for key in table if command == key or command.startswith(f"{key} ")]
    return max(found, key=len, default=None)


@pytest.fixture
def story(tmp_path, monkeypatch) -> Path:
    """A folder where README's commands find what they name."""
    torch.manual_seed(0)
    cache = tmp_path / "cache" / "mace"
    cache.mkdir(parents=True)
    base = load_foundation("mini")
    torch.save(base, cache / "MACE-OFF23_medium.model")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MACE_CONFIG", raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    for part in ("scripts", "configs", "tests", "mace_lora"):
        (folder / part).symlink_to(ROOT / part)
    frames = ase.io.read(DATA / "ethanol_train.xyz", index=":20")
    for file, chosen in {"train": frames[6:], "test": frames[:4], "old": frames[4:6]}.items():
        ase.io.write(folder / f"{file}.xyz", chosen, format="extxyz")
    aspirin = folder / "DATA" / "rmd17" / "aspirin"
    aspirin.mkdir(parents=True)
    shutil.copy(folder / "train.xyz", aspirin)
    double = base.to(torch.float64)
    other = make_adapter(double, folder / "other_adapter", elements=(1, 6, 8), std=0.02)
    torch.save(merge(load_adapter(double, other)), folder / "full.model")
    monkeypatch.chdir(folder)
    return folder


def run(command: str) -> None:
    """Run a command as a shell does, but with our own Python and without starting it anew where
    that tells nothing more.
    """
    words = shlex.split(command)
    if words[0] == "mace_lora":
        with pytest.raises(SystemExit) as stop:
            cli.main_tools(words[1:])
        # the doctor looks at the PATH, on which a test need not have the command
        assert stop.value.code == 0 or words[1] == "doctor", f"{command}\n{stop.value.code}"
        return
    environment = dict(os.environ)
    while "=" in words[0]:
        environment.update([words.pop(0).split("=", 1)])
    start = {
        "mace_run_train": ["-m", "mace_lora", "train"],
        "mace_create_lammps_model": ["-m", "mace.cli.create_lammps_model"],
        "torchrun": ["-m", "torch.distributed.run"],
        "python": [],
    }[words[0]]
    done = subprocess.run(
        [sys.executable, *start, *words[1:]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
def test_the_story_runs(story):
    """The commands of each page in their order, then its Python."""
    done = set()
    for page in STORY:
        text = (ROOT / page).read_text()
        for command in commands(ROOT / page):
            if begins(command, ELSEWHERE) is None and command not in done:
                run(" ".join([command, *CHANGED.get(begins(command, CHANGED), [])]))
                done.add(command)
        namespace: dict = {}
        for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M):
            block = re.sub(r"max_num_epochs=\d+", "max_num_epochs=1", block)
            exec(compile(block, page, "exec"), namespace)
        if "again" in namespace:
            assert not any(p.requires_grad is False for p in namespace["again"].parameters())
    for file in ("my_model.model", "parity.png", "half.model", "start.model", "extracted_adapter"):
        assert (story / file).exists()
    assert (story / "my_model.model-mliap_lammps.pt").exists()
    assert (story / "new_adapter" / "adapter_config.json").exists()
