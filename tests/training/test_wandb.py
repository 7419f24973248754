"""`--wandb`: what mace-torch logs, and the adapter, which its own flags don't tell of.

The package wandb is large and no part of the tests' environment; a module of its name that writes
down what it is told stands in for it.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
from helpers.running import run_command

RECORDER = """
import json
from types import SimpleNamespace

def write(kind, content):
    with open("told.jsonl", "a") as file:
        file.write(json.dumps([kind, content]) + "\\n")

def init(**keywords):
    write("init", keywords)

def log(content):
    write("log", content)

run = SimpleNamespace(summary={})
config = SimpleNamespace(update=lambda content: write("config", content))
"""


@pytest.fixture
def flags(train_flags, foundation):
    own = ["--adapter=dora", "--dora_rank=2", "--wandb", "--wandb_project=p"]
    return [*train_flags, f"--foundation_model={foundation}", *own]


def test_the_adapter_and_each_epoch_are_logged(tmp_path, flags, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(RECORDER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    run_command(*flags, cwd=tmp_path)
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert [kind for kind, _ in told[:2]] == ["init", "config"]
    assert told[0][1]["project"] == "p"
    config = told[1][1]
    assert (config["adapter"], config["dora_rank"]) == ("dora", 2)
    log = (tmp_path / "logs/run_run-1.log").read_text()
    assert f"Model with LoRA has {config['trained_parameters']} trainable" in log
    epochs = [content["Default"] for kind, content in told if "Default" in content]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2]
    lines = (tmp_path / "results").glob("*_train.txt")
    results = [json.loads(line) for path in lines for line in path.read_text().splitlines()]
    losses = [r["loss"] for r in results if r["mode"] == "eval" and r["epoch"] is not None]
    assert [epoch["valid_loss"] for epoch in epochs] == pytest.approx(losses)

    failed = run_command(*flags, "--wandb_log_hypers", "dora_rank", cwd=tmp_path, check=False)
    assert "--wandb_log_hypers=dora_rank is no flag of mace-torch's" in failed.stderr


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_without_the_package_nothing_is_begun(tmp_path, flags):
    failed = run_command(*flags, cwd=tmp_path, check=False)
    assert failed.returncode == 1
    assert "--wandb needs the package wandb, which is not installed: pip install" in failed.stderr
    assert list(tmp_path.iterdir()) == []
