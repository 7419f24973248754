#!/usr/bin/env python
"""How long a whole run is, and how much memory it needs, against mace-torch's own `--lora`.

    python scripts/bench_run.py --frames water/train.xyz --repeat 2 --foundation_model my.model

Both programs run from start to finished model, one after the other on one machine: mace-torch's at
its published settings, ours at its defaults, each with the same frames, rank 4, batches and epochs.
Wall time says what a user waits, CPU time what a busy machine doesn't change; memory is the peak of
the process. On Linux.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np

from mace_lora.frames.reading import read_atoms
from mace_lora.results.labelled import frames_of

THEIRS, OURS = "mace-torch", "ours"
# arXiv 2606.12704, and MACE's guide after it
PUBLISHED = (
    *("--lora_rank=4", "--lora_alpha=1", "--lr=0.01", "--ema", "--ema_decay=0.99"),
    *("--clip_grad=10", "--energy_weight=10", "--forces_weight=10"),
)


@dataclass(frozen=True)
class Used:
    """By one process: seconds, and GB at the peak."""

    wall: float
    cpu: float
    memory: float


def written(frames: Sequence[ase.Atoms], repeat: int, folder: Path, valid: int) -> tuple[str, str]:
    """Training and validation files of `frames`, repeated so often along each lattice vector."""
    labels = frames_of(list(frames), "frames").labels
    made, done = [], 0
    for i, frame in enumerate(frames):
        n = len(frame)
        atoms = ase.Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
        atoms = atoms.repeat(repeat) if repeat > 1 else atoms
        atoms.info["REF_energy"] = float(labels.energy[i] * len(atoms))
        forces = np.tile(labels.forces[done : done + n], (len(atoms) // n, 1))
        atoms.arrays["REF_forces"] = forces
        made.append(atoms)
        done += n
    paths = str(folder / "train.xyz"), str(folder / "valid.xyz")
    for path, part in zip(paths, (made[:-valid], made[-valid:]), strict=True):
        ase.io.write(path, part)
    return paths


def measured(command: Sequence[str], folder: Path, threads: int) -> Used:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{folder.name} failed:\n{(folder / 'said.txt').read_text()[-3000:]}")
    return Used(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", required=True, help="labelled frames, extended xyz")
    parser.add_argument("--n_frames", type=int, default=6, help="so many of them, evenly spaced")
    parser.add_argument("--n_valid", type=int, default=2, help="of those, to validate")
    parser.add_argument("--repeat", type=int, default=1, help="along each lattice vector")
    parser.add_argument("--foundation_model", default="mini", help="mini or a .model file")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flags", nargs="*", default=[], help="of ours alone: protect=False, ...")
    args = parser.parse_args()
    frames = read_atoms(args.frames)
    frames = frames[:: max(1, len(frames) // args.n_frames)][: args.n_frames]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, valid = written(frames, args.repeat, folder, args.n_valid)
        base = args.foundation_model
        if base != "mini":
            base = str(Path(base).resolve())
        flags = [
            *("--name=run", f"--foundation_model={base}", "--lora=True", "--E0s=estimated"),
            *(f"--train_file={train}", f"--valid_file={valid}", "--default_dtype=float64"),
            *(f"--batch_size={args.batch_size}", f"--valid_batch_size={args.batch_size}"),
            *(f"--max_num_epochs={args.epochs}", "--seed=1", "--device=cpu"),
        ]
        theirs = [sys.executable, "-c", "from mace.cli.run_train import main; main()"]
        ours = [sys.executable, "-m", "mace_lora", "train"]
        if base == "mini":  # unknown to mace-torch
            flags[1] = f"--foundation_model={_as_file(folder)}"
        commands = {
            THEIRS: [*theirs, *flags, *PUBLISHED],
            OURS: [*ours, *flags, *(f"--{flag}" for flag in args.flags)],
        }
        used = {who: measured(line, folder / who, args.threads) for who, line in commands.items()}
    n = len(frames[0]) * args.repeat**3
    print(f"{len(frames)} frames, {n} atoms in the first, {args.epochs} epochs\n")
    print("| | wall, s | CPU, s | memory, GB |\n|---|---|---|---|")
    for who, u in used.items():
        print(f"| {who} | {u.wall:.1f} | {u.cpu:.1f} | {u.memory:.2f} |")
    a, b = used[OURS], used[THEIRS]
    ratios = a.wall / b.wall, a.cpu / b.cpu, a.memory / b.memory
    print(f"| ratio | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")


def _as_file(folder: Path) -> Path:
    import torch

    from mace_lora import load_foundation

    path = folder / "mini.model"
    torch.save(load_foundation("mini", dtype=torch.float64), path)
    return path


if __name__ == "__main__":
    main()
