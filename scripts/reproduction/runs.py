"""One training run in a folder of its own: made, continued, evaluated, never repeated."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
import yaml

from mace_lora.errors import ConfigError, MaceLoraError
from mace_lora.files import whole_file
from mace_lora.training.recipes import MACE_TORCH
from reproduction import evaluation, foundation
from reproduction.datasets import System, sha256, write_xyz
from reproduction.protocol import Method

# Exit code of a run that was told to stop and can be continued (EX_TEMPFAIL): start it again
REQUEUE = 75
STAGES = {"stage_one": "run.model", "stage_two": "run_stagetwo.model"}
_OURS = [sys.executable, "-m", "mace_lora", "train"]
_UPSTREAM = [sys.executable, "-c", "from mace.cli.run_train import main; main()"]


class RunFailed(MaceLoraError, RuntimeError):
    """The training command ended with an error."""


class Interrupted(Exception):
    """A signal asked for the end; what is done so far is on disk."""


@dataclass(frozen=True)
class Run:
    """One row of raw results.

    `settings` is everything the command is told but for its files; `folder` is its own, `data`
    holds the prepared files of `system`; at most `test_frames` of each test set are evaluated.
    """

    system: System
    method: Method
    seed: int
    n_train: int
    settings: dict[str, Any]
    folder: Path
    data: Path
    test_frames: int | None = None

    @property
    def needs_file(self) -> bool:
        """Whether the foundation model is given to the command as a file."""
        numbers = self.system.numbers
        return foundation.is_needed(self.settings, self.method.upstream, numbers)

    @property
    def label(self) -> str:
        return f"{self.system.label}, {self.folder.name}"


def execute(run: Run, command: Callable[..., None] | None = None) -> tuple[dict[str, Any], bool]:
    """The result of a run, and whether anything had to be done for it.

    A finished run that was evaluated on another number of test frames is evaluated again.

    Raises:
        ConfigError: its folder holds a run with other settings.
        RunFailed: the training command failed.
        Interrupted: a signal came.
    """
    config = _config(run)
    _claim(run, config)
    result = run.folder / "result.json"
    if result.exists():
        found = json.loads(result.read_text())
        if found.get("test_frames", -1) == run.test_frames:
            return found, False
    if not (run.folder / "trained.json").exists():
        _train(run, command or call)
    found = evaluate(run)
    with whole_file(result) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    return found, True


def _config(run: Run) -> str:
    """The YAML that `mace_run_train --config` reads."""
    model = run.settings.get("foundation_model")
    if run.needs_file:
        model = foundation.FILE
    files = {
        "name": "run",
        "train_file": "train.xyz",
        "valid_file": os.path.relpath(run.data / "valid.xyz", run.folder),
        "seed": run.seed,
    }
    foundation_model = {} if model is None else {"foundation_model": model}
    # what a protocol doesn't say is as in mace-torch
    own = {"defaults": MACE_TORCH} if "adapter" in run.settings else {}
    return yaml.safe_dump({**own, **run.settings, **foundation_model, **files}, sort_keys=True)


def _claim(run: Run, config: str) -> None:
    """Make the folder with its training frames and configuration, or find it to be this run's."""
    path = run.folder / "config.yaml"
    if path.exists():
        if path.read_text() != config:
            raise ConfigError(
                f"{run.folder} holds a run with other settings (config.yaml); "
                "give another --out, or remove that folder"
            )
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    frames = training_frames(run)
    write_xyz(run.folder / "train.xyz", frames)
    if run.needs_file:
        foundation.write(run.folder / foundation.FILE, run.settings, frames)
    with whole_file(path) as temporary:
        temporary.write_text(config)


def training_frames(run: Run) -> list[ase.Atoms]:
    """The first `n_train` frames of the training file.

    Raises:
        ConfigError: there are fewer.
    """
    frames = ase.io.read(run.data / "train.xyz", index=":")
    if len(frames) < run.n_train:
        raise ConfigError(
            f"--train_frames={run.n_train}: {run.data / 'train.xyz'} has {len(frames)} frames"
        )
    return frames[: run.n_train]


def _train(run: Run, command: Callable[..., None]) -> None:
    resumed = any((run.folder / "checkpoints").glob("*.pt"))
    if resumed and "adapter" not in run.settings:
        # mace-torch's own restart repeats an epoch and loses the averages: errors can double
        for name in ("checkpoints", "results", "logs"):
            shutil.rmtree(run.folder / name, ignore_errors=True)
        resumed = False
    program = _UPSTREAM if run.method.upstream else _OURS
    start = time.time()
    command(
        [*program, "--config=config.yaml", *(["--restart_latest"] if resumed else [])], run.folder
    )
    about = {"seconds_of_last_attempt": time.time() - start, "resumed": resumed}
    with whole_file(run.folder / "trained.json") as temporary:
        temporary.write_text(json.dumps(about) + "\n")


def call(command: list[str], folder: Path) -> None:
    """Run a command in `folder`, its output appended to output.txt, signals passed on to it.

    Raises:
        RunFailed: with the last lines of the output.
        Interrupted: a signal came, or the command asks to be started again.
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    received: list[int] = []
    with open(folder / "output.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment
        )

        def forward(number: int, _: Any) -> None:
            received.append(number)
            process.send_signal(number)

        before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received or code == REQUEUE:
        raise Interrupted(f"stopped in {folder}")
    if code:
        tail = (folder / "output.txt").read_text(encoding="utf-8").splitlines()[-8:]
        raise RunFailed(f"{folder}: exit code {code}; the end of output.txt is\n" + "\n".join(tail))


def evaluate(run: Run) -> dict[str, Any]:
    """Errors of every saved stage on every test set, and what the run cost."""
    tests = {p.stem.removeprefix("test_"): p for p in sorted(run.data.glob("test_*.xyz"))}
    frames = {n: ase.io.read(p, index=":")[: run.test_frames] for n, p in tests.items()}
    errors: dict[str, Any] = {}
    for stage, file in STAGES.items():
        if not (run.folder / file).exists():
            continue
        model = evaluation.load_model(run.folder / file)
        found = {name: evaluation.predictions(model, f) for name, f in frames.items()}
        arrays = {f"{n}/{k}": v for n, p in found.items() for k, v in asdict(p).items()}
        _save_arrays(run.folder / f"predictions_{stage}.npz", arrays)
        errors[stage] = {n: {**p.errors(), "frames": len(p.energy)} for n, p in found.items()}
    forgotten = (
        evaluation.forgetting(model) if run.settings.get("foundation_model") == "mini" else None
    )
    return {
        "dataset": run.system.dataset,
        "system": run.system.name,
        "method": run.method.name,
        "title": run.method.title,
        "run": run.folder.name,
        "seed": run.seed,
        "foundation_model": run.settings.get("foundation_model"),
        "train_frames": run.n_train,
        "test_frames": run.test_frames,
        "settings": run.settings,
        "trainable_parameters": trainable(run.folder),
        "steps": steps_until(run.n_train, run.settings, _last_epoch(run.folder)),
        "seconds_per_step": seconds_per_step(run.folder),
        **json.loads((run.folder / "trained.json").read_text()),
        "errors": errors,
        "forgetting": forgotten,
        "data": json.loads((run.data / "data.json").read_text()),
        "train_sha256": sha256(run.folder / "train.xyz"),
        "versions": {p: metadata.version(p) for p in ("mace-lora", "mace-torch", "torch")},
    }


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with whole_file(path) as temporary, open(temporary, "wb") as file:  # a path would get a suffix
        np.savez_compressed(file, **arrays)


def rows(folder: Path, mode: str) -> list[dict[str, Any]]:
    """What mace-torch recorded: `opt` for each optimiser step, `eval` for each validation."""
    found = []
    for path in sorted(folder.glob("results/*.txt")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["mode"] == mode:
                found.append(row)
    return found


def steps_until(n_train: int, settings: dict[str, Any], epoch: int) -> int:
    """Optimiser steps from the start to the end of an epoch (which count from 0).

    Not counted in the records: a run that was continued may have some of its steps there twice.
    """
    return (epoch + 1) * (n_train // int(settings["batch_size"]))


def _last_epoch(folder: Path) -> int:
    return max(row["epoch"] for row in rows(folder, "opt"))


def seconds_per_step(folder: Path) -> float:
    """Median over the optimiser steps of the run."""
    return statistics.median(row["time"] for row in rows(folder, "opt"))


def trainable(folder: Path) -> int:
    """Number of trained parameters, from the run's log or its model."""
    log = (folder / "output.txt").read_text(encoding="utf-8")
    found = re.search(r"before, ([\d,]+) after injecting", log)
    if found:
        return int(found[1].replace(",", ""))
    if "Injecting LoRA layers" in log:  # mace-torch counts the frozen parameters too
        total, base = (
            int(re.search(text, log)[1])
            for text in (r"with LoRA has (\d+)", r"Original model has (\d+)")
        )
        return total - base
    return sum(p.numel() for p in torch.load(folder / "run.model", weights_only=False).parameters())
