"""Installation with plain pip into a fresh environment, as a user does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_fresh_environment(tmp_path):
    folder = tmp_path / "venv"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"

    def call(*command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(sys.executable, "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    # the build of torch that is here already: the newest from the registry may be gigabytes
    import torch

    call(python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.split('+')[0]}")
    call(python, "-m", "pip", "install", "-q", str(ROOT))

    text = call("mace_run_train", "--help")
    assert "adapters (mace-lora)" in text
    assert "--foundation_model" in text
    diagnosis = json.loads(call("mace_lora", "doctor", "--json"))
    assert diagnosis["problems"] == []
    assert diagnosis["command"] == str(folder / "bin" / "mace_run_train")
    assert "doctor" in call(python, "-m", "mace_lora")

    data = ROOT / "mace_lora" / "data"
    call(
        "mace_run_train",
        "--name=first",
        "--foundation_model=mini",
        "--lora=True",
        f"--train_file={data / 'ethanol_train.xyz'}",
        "--valid_fraction=0.5",
        "--max_num_epochs=1",
        "--batch_size=5",
    )
    assert (tmp_path / "first.model").exists()

    # a later mace-torch takes the name back; the doctor says so, and how to mend it
    call(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", "mace-torch")
    assert "adapters (mace-lora)" not in call("mace_run_train", "--help")
    assert "takes it back" in call("mace_lora", "doctor", check=False)
    assert "adapters (mace-lora)" in call("mace_lora", "train", "--help")
