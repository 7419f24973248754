"""How far a committee's spread tells its error, and whether frames that it chooses are worth more.

Acetylacetone (fetch_data.py acac), from `mini`. Finished runs are not repeated.

    python scripts/committees.py spread --data data/acac --output results/committees
    python scripts/committees.py select --data data/acac --output results/committees

`spread`: four members on 50 frames at 300 K, judged on frames at 300 K and at 600 K, with
frames of its own for each member and without. `select`: three members on 10 frames at 300 K
choose from 200 frames at each of both temperatures; one model is trained on these and the 10, one
on as many frames drawn at random, all for the same number of steps; three seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
import torch

from mace_lora.model import committee
from mace_lora.model.description import heads
from mace_lora.results.evaluation import predict_values
from mace_lora.results.labelled import LabelledFrames, Values, frames_of
from mace_lora.results.spread import reliability

BATCH, N_VALID = 5, 20
TEMPERATURES = (300, 600)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["spread", "select"])
    parser.add_argument("--data", type=Path, default=Path("data/acac"))
    parser.add_argument("--output", type=Path, default=Path("results/committees"))
    parser.add_argument("--base", default="mini")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--n_test", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    {"spread": spread, "select": select}[options.what](options)


def spread(options: argparse.Namespace) -> None:
    """Print rank correlations and coverages at both temperatures."""
    frames = read(options.data / "train_300K.xyz", 50 + N_VALID, seed=0)
    print("| members | K | quantity | RMSE, meV | rank correlation | within one | within two |")
    print("|---|---|---|---|---|---|---|")
    for bootstrap in (False, True):
        name = "own_frames" if bootstrap else "same_frames"
        flags = ["--members=4", f"--bootstrap={bootstrap}"]
        folder = train(options, name, frames[:50], frames[50:], flags) / "run_committee"
        factors = committee.read(folder).factors
        for kelvin in TEMPERATURES:
            test = read(options.data / f"test_MD_{kelvin}K.xyz", options.n_test, seed=0)
            labelled = frames_of(test, f"{kelvin} K")
            members = predicted(sorted(folder.parent.glob("run_?.model")), labelled)
            for quantity, found in reliability(labelled, members, factors).items():
                one, two = found.coverage
                print(
                    f"| {name} | {kelvin} | {quantity} | {1e3 * found.rmse:.1f} | "
                    f"{found.correlation:.2f} | {one:.0%} | {two:.0%} |",
                    flush=True,
                )


def predicted(models: Sequence[Path], frames: LabelledFrames) -> list[Values]:
    """Of each merged model."""
    loaded = [torch.load(path, weights_only=False) for path in models]
    return [predict_values(m, frames, heads(m) * len(frames.atoms), 20) for m in loaded]


def select(options: argparse.Namespace) -> None:
    """Print the errors with chosen frames beside those with random ones."""
    print("| frames added | how | RMSE of forces at 300 K, meV/A | at 600 K | each seed at 600 K |")
    print("|---|---|---|---|---|")
    tests = {
        k: frames_of(read(options.data / f"test_MD_{k}K.xyz", options.n_test, seed=0), f"{k} K")
        for k in TEMPERATURES
    }
    errors: dict[tuple[int, str], list[dict[int, float]]] = {}
    for seed in range(options.seeds):
        cold, hot = (read(options.data / f"train_{k}K.xyz", 240, seed) for k in TEMPERATURES)
        first, valid = cold[:10], cold[10:20] + hot[:10]
        pool = cold[40:] + hot[40:]
        folder = train(options, f"first_{seed}", first, valid, ["--members=3"]) / "run_committee"
        ranked = chosen(options, folder, pool)
        order = np.random.default_rng(seed).permutation(len(pool))
        for number in (10, 25, 50):
            for how, added in (
                ("chosen", ranked[:number]),
                ("random", [pool[i] for i in order[:number]]),
            ):
                name, flags = f"{how}_{number}_{seed}", [f"--seed={seed}"]
                run = train(options, name, first + added, valid, flags)
                errors.setdefault((number, how), []).append(
                    {k: rmse(run / "run.model", test) for k, test in tests.items()}
                )
    for (number, how), found in errors.items():
        means = [np.mean([e[k] for e in found]) for k in TEMPERATURES]
        each = ", ".join(f"{e[600]:.0f}" for e in found)
        print(f"| {number} | {how} | {means[0]:.0f} | {means[1]:.0f} | {each} |")


def read(path: Path, n: int, seed: int) -> list[ase.Atoms]:
    """`n` frames of a file, drawn without replacement."""
    frames = ase.io.read(path, ":")
    frames = [a for a in frames if len(a) > 1]
    order = np.random.default_rng(seed).permutation(len(frames))[:n]
    return [frames[i] for i in order]


def train(
    options: argparse.Namespace,
    name: str,
    frames: list[ase.Atoms],
    valid: list[ase.Atoms],
    flags: Sequence[str],
) -> Path:
    """The folder of a run of `mace_lora train`, made unless it is there."""
    folder = options.output / name
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        ase.io.write(folder / "train.xyz", frames, format="extxyz")
        ase.io.write(folder / "valid.xyz", valid, format="extxyz")
        command = [
            *(sys.executable, "-m", "mace_lora", "train", "--name=run", "--lora=True"),
            *(f"--foundation_model={options.base}", "--default_dtype=float64"),
            *("--train_file=train.xyz", "--valid_file=valid.xyz", f"--batch_size={BATCH}"),
            f"--max_num_epochs={math.ceil(options.steps / (len(frames) // BATCH))}",
            *(
                "--energy_key=energy",
                "--forces_key=forces",
                "--eval_interval=10",
                "--plot=False",
                "--restart_latest",
                *flags,
            ),
        ]
        with open(folder / "output.txt", "a") as log:
            subprocess.run(command, cwd=folder, stdout=log, stderr=log, check=True)
        (folder / "done").touch()
    return Path(folder)


def chosen(options: argparse.Namespace, folder: Path, pool: list[ase.Atoms]) -> list[ase.Atoms]:
    """The 50 frames that `mace_lora select` takes of a pool, the most worthwhile first."""
    ase.io.write(folder / "pool.xyz", pool, format="extxyz")
    command = [sys.executable, "-m", "mace_lora", "select", str(folder / "pool.xyz")]
    command += [f"--base={options.base}", f"--adapter={folder}", "--number=50", "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [pool[row["frame"]] for row in json.loads(said)["chosen"]]


def rmse(model: Path, test: LabelledFrames) -> float:
    """Of forces, meV/A."""
    (values,) = predicted([model], test)
    return float(1e3 * np.sqrt(np.mean((values.forces - test.labels.forces) ** 2)))


if __name__ == "__main__":
    main()
