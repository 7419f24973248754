"""The result of a run is not overwritten by another run of its name, unless that is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.running import here, same_weights


@pytest.fixture
def folder(done, tmp_path) -> Path:
    """A folder with a run in it, which is left as it is by what is refused."""
    return shutil.copytree(done, tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (["--lora_rank=2"], "--lora_rank=4 there, --lora_rank=2 here"),
        (["--max_num_epochs=1"], "--max_num_epochs=2 there, --max_num_epochs=1 here"),
        (["--lr=0.02"], "--lr=0.01 there, --lr=0.02 here"),
        (["--seed=2"], "no checkpoint of this name and seed is in checkpoints"),
        (["--seed=2", "--restart_latest"], "no checkpoint of this name and seed"),
        (["--checkpoints_dir=elsewhere"], "no checkpoint of this name and seed is in elsewhere"),
    ],
)
def test_another_run_of_the_same_name_is_refused(folder, flags, done, changed, why):
    error = here(folder, *flags, "--max_num_epochs=2", *changed)
    assert error.startswith("error: --name=run: run.model exists, and another run has made it")
    assert why in error
    assert error.endswith("Give another --name, or --overwrite=True to replace it")
    assert same_weights(folder / "run.model", done / "run.model")
    latest = "checkpoints/run_run-1_latest.pt"
    assert (folder / latest).read_bytes() == (done / latest).read_bytes()


def test_it_is_replaced_when_asked_to(folder, flags, done):
    assert here(folder, *flags, "--max_num_epochs=2", "--lr=0.02", "--overwrite=True") == ""
    assert not same_weights(folder / "run.model", done / "run.model")


@pytest.mark.parametrize(
    "more",
    [
        ["--max_num_epochs=2"],  # a script that is run again
        ["--max_num_epochs=2", "--restart_latest"],
        ["--max_num_epochs=3", "--restart_latest"],  # more epochs
    ],
)
def test_a_run_replaces_its_own_result(folder, flags, done, more):
    before = (folder / "run.model").stat().st_mtime_ns
    assert here(folder, *flags, *more) == ""
    assert (folder / "run.model").stat().st_mtime_ns > before
    if "--max_num_epochs=2" in more:
        assert same_weights(folder / "run.model", done / "run.model")


def test_a_checkpoint_that_cannot_be_read_proves_nothing(folder, flags):
    for path in folder.glob("checkpoints/*.pt"):
        path.write_bytes(b"half")
    assert "another run has made it" in here(folder, *flags, "--max_num_epochs=2")


def test_checkpoints_of_older_versions(folder, flags):
    """They know the flags that a restart must have, and not all others."""
    latest = folder / "checkpoints/run_run-1_latest.pt"
    state = torch.load(latest, weights_only=True)
    del state["run"]["flags"]
    torch.save(state, latest)
    assert "--lr=0.01 there, --lr=0.02 here" in here(folder, *flags, "--lr=0.02")
    assert here(folder, *flags, "--max_num_epochs=2") == ""


def test_another_start_makes_another_run(folder, flags):
    start = shutil.copytree(folder / "run_adapter", folder / "start")
    more = ["--max_num_epochs=2", f"--adapter_start={start}"]
    assert "--adapter_start=None there" in here(folder, *flags, *more)
