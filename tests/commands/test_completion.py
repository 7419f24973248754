"""`mace_lora completion`: what bash offers at the press of Tab."""

from __future__ import annotations

import subprocess

import pytest
from helpers.running import tool_prints

PRESS_TAB = r"""
. ./completion.bash
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
$(complete -p "$1" | sed 's/.* -F \([^ ]*\).*/\1/')
printf "%s\n" "${COMPREPLY[@]}"
"""


@pytest.fixture
def offered(capsys, tmp_path):
    """What is offered for the last of some words, in a folder with the file `some.xyz`."""
    (tmp_path / "completion.bash").write_text(tool_prints(capsys, "completion", "bash"))
    (tmp_path / "some.xyz").touch()

    def get(*words: str) -> set[str]:
        command = ["bash", "-c", PRESS_TAB, "bash", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return set(done.stdout.split())

    return get


def test_bash(offered):
    ranks = {"--lora_rank", "--lora_rank_pattern", "--lora_rslora"}
    assert offered("mace_run_train", "--lora_r") == ranks
    assert offered("mace_lora", "train", "--lora_r") == ranks
    assert "upstream" in offered("mace_run_train", "--lora_init", "")
    assert {"train", "merge", "doctor"} <= offered("mace_lora", "")
    assert offered("mace_lora", "eval", "--mo") == {"--model"}


@pytest.mark.parametrize(
    "flags",
    [
        ("mace_run_train", "--train_file"),
        ("mace_run_train", "--foundation_model"),
        ("mace_lora", "eval", "--data"),
    ],
)
def test_files(offered, flags):
    assert offered(*flags, "so") == {"some.xyz"}


def test_zsh(capsys):
    script = tool_prints(capsys, "completion", "zsh")
    assert "--lora_rank[" in script
    for program in ("mace_run_train", "mace_lora"):
        assert f"-N {program}\n" in script  # registered where the script is evaluated
