"""Runs of the command for tests of bad days: in this process, or in one that gets signals."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mace_lora import cli
from mace_lora.errors import Diverged

LATEST = "checkpoints/run_run-1_latest.pt"


def short_run(data: dict[str, str], foundation: str, *more: str) -> list[str]:
    """Flags of a LoRA run called `run` with seed 1 on the files of `small_data`."""
    files = [f"--{part}_file={path}" for part, path in data.items()]
    common = ["--lora=True", "--batch_size=5", "--lr=0.01", "--seed=1"]
    return ["--name=run", f"--foundation_model={foundation}", *files, *common, *more]


def settled(flags: Sequence[str]) -> list[str]:
    """`flags` with mace-torch's defaults where an adapter is trained: what tests say of one thing
    doesn't depend on what suits a fine-tuning. With `--defaults` among them, as they are.
    """
    adapted = any(
        f.startswith(("--lora=True", "--lora_", "--adapter")) or f == "--lora" for f in flags
    )
    told = any(f.startswith("--defaults") for f in flags)
    return [*flags, *(["--defaults=mace-torch"] if adapted and not told else [])]


def here(folder: Path, *flags: str) -> str:
    """Run the command in this process, in `folder`; its error message, or "" if it ends well."""
    folder.mkdir(exist_ok=True)
    before, default = Path.cwd(), torch.get_default_dtype()
    handlers, filters = logging.root.handlers[:], logging.root.filters[:]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    os.chdir(folder)
    try:
        cli.main(settled(flags))
    except SystemExit as stop:
        if isinstance(stop.__context__, Diverged):  # has an exit code of its own
            return f"error: {stop.__context__}"
        return str(stop.code)
    finally:
        os.chdir(before)
        torch.set_default_dtype(default)
        logging.root.handlers[:], logging.root.filters[:] = handlers, filters
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
    return ""


def run_program(*command: str | Path, **environment: str) -> str:
    """What a program prints that ends well, in a process with some variables more."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_command(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`mace_run_train` as a user runs it, in a fresh process."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.pop("MACE_CONFIG", None)
    done = subprocess.run(
        [sys.executable, "-m", "mace_lora", "train", *settled(arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def process(folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start the command in a process of its own; what it says goes to `<folder>/out.txt`."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.pop("MACE_CONFIG", None)
    with open(folder / "out.txt", "a") as out:
        return subprocess.Popen(
            [sys.executable, *(launcher or ("-m", "mace_lora")), "train", *settled(flags)],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )


def said(folder: Path) -> str:
    return (folder / "out.txt").read_text()


def results(folder: Path) -> list[dict]:
    """Lines of mace-torch's results file, without the times."""
    path = folder / "results/run_run-1_train.txt"
    if not path.exists():
        return []
    lines = [
        json.loads(line) for line in path.read_text().splitlines(keepends=True) if "\n" in line
    ]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


@contextmanager
def signal_after(number: int, folder: Path, n: int) -> Iterator[None]:
    """Send this process a signal once `n` lines of results are written in `folder`."""
    over = threading.Event()

    def send() -> None:
        while not over.wait(0.002):
            if len(results(folder)) >= n:
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_for_lines(running: subprocess.Popen[str], folder: Path, n: int) -> None:
    """Until `n` lines of results are written (one per step and per validation)."""
    end = time.monotonic() + 300
    while len(results(folder)) < n:
        if running.poll() is not None or time.monotonic() > end:
            pytest.fail(f"ended early, with {running.returncode}:\n{said(folder)[-3000:]}")
        time.sleep(0.002)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two `.model` files hold the same numbers, bit for bit."""
    a, b = (torch.load(p, weights_only=False).state_dict() for p in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tool_prints(capsys, command: str, *flags: str) -> str:
    """What the command prints; it must succeed."""
    with pytest.raises(SystemExit) as stop:
        cli.main_tools([command, *map(str, flags)])
    assert stop.value.code == 0
    return capsys.readouterr().out


def tool_fails(command: str, *flags: str) -> str:
    """The message of a command that must fail with exit code 1."""
    with pytest.raises(SystemExit) as stop:
        cli.main_tools([command, *map(str, flags)])
    assert isinstance(stop.value.code, str)  # run_program to stderr, exit code 1
    assert stop.value.code.startswith("error: ")
    return stop.value.code
