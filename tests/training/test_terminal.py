"""What the terminal shows of a run, and what stays in the log files."""

from __future__ import annotations

import logging
from pathlib import Path

import mace
import pytest
from helpers.running import here, run_command, short_run

from mace_lora.upstream import logs
from mace_lora.upstream.names import version

SCREEN = 40
FALSE = ("need to provied", "no longer safe", "rank deficient", "pt_head", "np.int64", "LoRA")


def lines_before_training(said: str) -> list[str]:
    return said.partition("Initial: head")[0].splitlines()


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_data):
    """A run as in the README, in a process of its own: what it says, and what its log file says."""
    folder = tmp_path_factory.mktemp("run")
    files = [f"--{part}_file={path}" for part, path in small_data.items()]
    recipe = ["--adapter=full", "--defaults=fine-tuning", "--batch_size=5", "--max_num_epochs=2"]
    done = run_command("--name=run", "--foundation_model=mini", *files, *recipe, cwd=folder)
    return done.stdout + done.stderr, (folder / "logs/run_run-123.log").read_text()


def test_one_screen_before_the_first_epoch(run):
    assert len(lines_before_training(run[0])) <= SCREEN


def test_no_warning_that_is_false(run):
    for text in FALSE:
        assert text not in run[0]
    assert "WARNING: Validation batch size" not in run[0]


def test_what_matters_is_shown(run):
    before, _, after = run[0].partition("Initial: head")
    for text in (
        "The whole log is in logs/run_run-123.log",
        "Total number of configurations: train=10, valid=5",
        "Adapter full (",
        "after injecting full into 29 layers (100.0 % of the base",
        "| part of the model",
        "E0s of head Default: H -",
        "Energy offset before training",
        "Set to what suits (why: see the log file): --lr=0.005",
    ):
        assert text in before
    for text in ("Epoch 1: head", "Error-table on TEST:\n+--", "run_adapter: the adapter alone"):
        assert text in after


def test_done_is_the_last_line_and_said_once(run):
    for said in run:
        assert said.rstrip().endswith("INFO: Done")
        assert said.count("INFO: Done") == 1


def test_the_log_file_has_all(run):
    said, log = run
    for text in (
        f"MACE version: {version()}",
        "Using the key specifications to parse data",
        "E0 ESTIMATION FROM FOUNDATION MODEL",
        "System is rank deficient",
        "Not adapted, and frozen:",
        "| --lr               | 0.005",
        "Skipping evaluation for heads: ['pt_head']",
    ):
        assert text in log
    for line in said.splitlines():
        assert line in log


def test_one_screen_with_replay_and_every_rank_capped(tmp_path, small_data, capsys):
    """Long lists go to the file; what is true of the head of replay is shown."""
    flags = short_run(small_data, "mini", "--lora_rank=99", "--max_num_epochs=1")
    replay = ["--multiheads_finetuning=True", f"--pt_train_file={small_data['train']}"]
    assert here(tmp_path, *flags, *replay) == ""
    said = capsys.readouterr().out
    assert len(lines_before_training(said)) <= SCREEN
    assert "WARNING: Replay (--multiheads_finetuning) changes what was asked for" in said
    assert "Skipping evaluation for heads: ['pt_head']" in said
    assert "Rank capped" not in said
    assert "Rank capped" in (tmp_path / "logs/run_run-1.log").read_text()


@pytest.mark.parametrize(("package", "shown"), [("mace", False), ("mace_lora", True)])
def test_packages_side_by_side(capsys, package, shown):
    """Installed, this package lies beside mace, and its name begins alike."""
    logs.Terminal(replay=lambda: False).set_up(logging.INFO, None, None, 0)
    path = Path(mace.__path__[0]).parent / package / "some.py"
    logging.root.handle(logging.LogRecord("root", logging.INFO, str(path), 1, "a fact", None, None))
    assert ("a fact" in capsys.readouterr().out) == shown


def test_without_an_adapter_mace_torch_speaks(tmp_path, small_data, capsys):
    flags = [f"--{part}_file={path}" for part, path in small_data.items()]
    more = ["--foundation_model=mini", "--E0s=estimated", "--batch_size=5", "--max_num_epochs=1"]
    assert here(tmp_path, "--name=run", *flags, *more) == ""
    said = capsys.readouterr().out
    assert "Using the key specifications to parse data" in said
    assert said.rstrip().endswith("INFO: Done")


def test_a_dry_run_is_not_done(tmp_path, small_data, capsys):
    assert here(tmp_path, *short_run(small_data, "mini", "--dry_run")) == ""
    said = capsys.readouterr().out
    assert "DRY RUN mode enabled" in said
    assert "INFO: Done" not in said
