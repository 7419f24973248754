"""What needs no torch is answered before torch is imported, which takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mace_lora.cli import main_tools
from mace_lora.commands import COMMANDS

HEAVY = {"torch", "mace", "e3nn", "ase", "numpy", "matplotlib", "prettytable"}
COMMAND = """
import atexit, sys
atexit.register(lambda: open("loaded", "w").write(" ".join(sys.modules)))
from mace_lora.cli import main_tools
main_tools(sys.argv[1:])
"""

ANSWERED = {
    "": "usage: mace_lora COMMAND",
    "--help": "usage: mace_lora COMMAND",
    "--version": "mace-lora ",
    "train --help": "adapters (mace-lora):",
    "train --version": "mace-lora ",
    **{f"{name} --help": f"usage: mace_lora {name}" for name in COMMANDS},
    "completion bash": "complete -o",
}
REFUSED = {
    "trian": "Did you mean 'train'?",
    "train --name=x --lora_rnak=4": "Did you mean '--lora_rank'?",
    "train --name=x --lora=True --lora_rank=0": "--lora_rank=0",
    "train --name=x --lora=True --foundation_model=no.model": "=no.model: there is no such file",
    "train --name=x --foundation_model=mini --train_file=no.xyz": "=no.xyz: there is no such file",
    "train --name=x --adapter_start=no": "--adapter_start=no: there is no such directory",
    "info no.model": "no.model: there is no such file",
    "info mini --base no.model": "--base=no.model: there is no such file",
    "eval --model no.model --data x": "--model=no.model: there is no such file",
    "eval --model mini --data no.xyz": "--data=no.xyz: there is no such file",
    "eval --model mini --adapter no --data x": "--adapter=no: there is no such directory",
    "merge --base mini --adapter no --output x": "--adapter=no: there is no such directory",
    "merge --base no --adapter no --output x": "--base=no: there is no such file",
    "unmerge --model no --adapter no --output x": "--model=no: there is no such file",
    "extract --base mini --finetuned no --output x": "--finetuned=no: there is no such file",
}


def say(words: str, folder: Path) -> tuple[str, str, set[str]]:
    """What the command prints to either stream in a process of its own, and what is then loaded."""
    command = [sys.executable, "-c", COMMAND, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return done.stdout, done.stderr, HEAVY & set((folder / "loaded").read_text().split())


@pytest.mark.parametrize("words", ANSWERED)
def test_help_and_version(words, tmp_path):
    out, errors, loaded = say(words, tmp_path)
    assert ANSWERED[words] in out
    assert errors == ""
    assert loaded == set()


@pytest.mark.parametrize("words", REFUSED)
def test_mistakes(words, tmp_path):
    out, errors, loaded = say(words, tmp_path)
    assert REFUSED[words] in errors
    assert out == ""
    assert loaded == set()


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_waiting_threads_give_up_their_core(given, spins, monkeypatch, capsys):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    main_tools(["--version"])
    assert os.environ.get("GOMP_SPINCOUNT") == spins
