"""One short run, in a folder and a process of its own, and how well it did."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from mace_lora.errors import Diverged, MaceLoraError
from mace_lora.files import whole_file

# Errors of mace-torch's results by which runs are compared, and what they are called
QUANTITIES = {
    "rmse_e_per_atom": "energy, meV per atom",
    "rmse_f": "forces, meV/Å",
    "rmse_stress": "stress, meV/Å³",
}
_DONE = "done.json"
_SEED = 1


class TrialFailed(MaceLoraError):
    """A run that ended with an error."""


@dataclass(frozen=True)
class Outcome:
    """Validation errors of a run, in meV, before it and at its best epoch, by QUANTITIES."""

    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def score(self) -> float:
        """Geometric mean of what is left of each error: below 1 where a run has learnt."""
        ratios = [self.after[q] / self.before[q] for q in self.after if self.before[q] > 0]
        if not ratios or not all(math.isfinite(r) and r > 0 for r in ratios):
            return math.inf
        return math.exp(sum(map(math.log, ratios)) / len(ratios))


def at_once(device: str) -> int:
    """How many runs are made beside each other: one for each core of a CPU, up to four.

    A small model on small frames keeps one core busy, and no second one.
    """
    return min(4, os.cpu_count() or 1) if device == "cpu" else 1


def train(folder: Path, settings: Mapping[str, object], at_once: int = 1) -> Outcome:
    """Run `mace_run_train` with these flags in `folder`, or go on with it, or know it from before.

    Args:
        folder: where it runs.
        settings: its flags.
        at_once: so many such runs share the cores.

    Raises:
        TrialFailed: with the last lines of its output.
    """
    done = folder / _DONE
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = yaml.safe_dump({**settings, "name": "run", "seed": _SEED, "plot": False})
        (folder / "config.yaml").write_text(config)
        _run(folder, at_once)
        with whole_file(done) as new:
            new.write_text(json.dumps(_errors(folder)))
    return Outcome(**json.loads(done.read_text()))


def _run(folder: Path, at_once: int) -> None:
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))}
    command = [sys.executable, "-m", "mace_lora", "train", "--config=config.yaml"]
    with open(folder / "output.txt", "a", encoding="utf-8") as log:
        code = subprocess.run(
            [*command, "--restart_latest"],
            cwd=folder,
            env={**threads, **os.environ, "PYTHONWARNINGS": "ignore"},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code not in (0, Diverged.exit_code):
        said = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        raise TrialFailed(f"a run in {folder} ended with exit code {code}: {said[-1:]}")


def _errors(folder: Path) -> dict[str, dict[str, float]]:
    """As Outcome takes them; infinite after a run that diverged."""
    files = list((folder / "results").glob("*_train.txt"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    judged = [line for line in lines if line["mode"] == "eval"]
    before = next(line for line in judged if line["epoch"] is None)
    trained = [line for line in judged if line["epoch"] is not None]
    measured = [q for q in QUANTITIES if isinstance(before.get(q), float)]
    complete = bool(list(folder.glob("run.model")))
    best = min(trained, key=lambda line: float(line["loss"])) if trained and complete else {}
    return {
        "before": {q: 1e3 * before[q] for q in measured},
        "after": {q: 1e3 * best[q] if best else math.inf for q in measured},
    }
