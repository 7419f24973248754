"""`--members 4`: a committee, run after run, and the factors that calibrate its spread."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import ase.io
import numpy as np
import torch

from mace_lora.errors import ConfigError, MaceLoraError
from mace_lora.files import whole_file, whole_folder
from mace_lora.frames.reading import read_atoms
from mace_lora.frames.units import Units
from mace_lora.model import committee
from mace_lora.model.description import heads as heads_of
from mace_lora.results import spread
from mace_lora.results.compared import read_as_flagged
from mace_lora.results.evaluation import predict_values
from mace_lora.results.labelled import LabelledFrames, Values, with_inputs
from mace_lora.training.options import RunOptions
from mace_lora.upstream.inputs import inputs_of

LEAST_FRAMES = 4  # to train and validate a committee on


class MemberFailed(MaceLoraError):
    """A run of a committee ended with an error, which is on the terminal."""


def train(args: argparse.Namespace, options: RunOptions) -> Path:
    """Train the members in processes of their own, gather and calibrate them.

    All members see the same validation frames. Interrupted, the same command goes on, with
    `--restart_latest`.

    Args:
        args, options: what it says.

    Returns:
        The folder of the committee, `<name>_committee`.

    Raises:
        ConfigError: the frames aren't in .xyz files, or too few.
        MemberFailed: a run failed.
    """
    _check(args)
    folder = _models(args) / f"{args.name}_committee"
    folder.mkdir(parents=True, exist_ok=True)
    training, validation = _split(args, folder)
    members = []
    for number in range(1, options.members + 1):
        name, seed = f"{args.name}_{number}", args.seed + number - 1
        frames = _drawn(training, folder, number, seed) if options.bootstrap else training
        flags = [
            *options.argv,
            f"--name={name}",
            f"--seed={seed}",
            "--members=1",
            "--bootstrap=False",
        ]
        flags += [f"--train_file={frames}", f"--valid_file={validation}"]
        print(f"Member {number} of {options.members}: {name}", flush=True)
        command = [sys.executable, "-m", "mace_lora", "train", *flags]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise MemberFailed(
                f"member {number}, {name}, ended with exit code {code}: what it said stands above. "
                "The same command with --restart_latest goes on"
            )
        members.append(_gathered(_models(args), name, folder, number))
    _calibrate(args, options, folder, members, validation)
    return folder


def _models(args: argparse.Namespace) -> Path:
    """Where the runs write their models, as mace-torch has it."""
    return Path(args.model_dir or args.work_dir)


def _check(args: argparse.Namespace) -> None:
    for flag in ("train_file", "valid_file"):
        if (file := getattr(args, flag)) and not str(file).endswith(".xyz"):
            raise ConfigError(f"--members with --{flag}={file}: an .xyz file is needed")


def _split(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Files of training and validation frames, the same for all members."""
    if args.valid_file:
        return Path(args.train_file), Path(args.valid_file)
    frames = read_atoms(args.train_file)
    alone = [a for a in frames if len(a) == 1]
    rest = [a for a in frames if len(a) > 1]
    if len(rest) < LEAST_FRAMES:
        raise ConfigError(f"--train_file={args.train_file}: too few frames for a committee")
    order = np.random.default_rng(args.seed).permutation(len(rest))
    n = min(max(1, round(args.valid_fraction * len(rest))), len(rest) - 1)
    parts = {"valid": [rest[i] for i in order[:n]], "train": [rest[i] for i in order[n:]] + alone}
    paths = {part: folder / f"{part}.xyz" for part in parts}
    for part, chosen in parts.items():
        with whole_file(paths[part]) as new:
            ase.io.write(new, chosen, format="extxyz")
    return paths["train"], paths["valid"]


def _drawn(training: Path, folder: Path, number: int, seed: int) -> Path:
    """A file with as many frames, drawn with replacement; isolated atoms stay."""
    frames = read_atoms(training)
    rest = [a for a in frames if len(a) > 1]
    chosen = np.random.default_rng(seed).integers(len(rest), size=len(rest))
    path = folder / f"train_{number}.xyz"
    with whole_file(path) as new:
        drawn = [rest[i] for i in np.sort(chosen)] + [a for a in frames if len(a) == 1]
        ase.io.write(new, drawn, format="extxyz")
    return path


def _gathered(models: Path, name: str, folder: Path, number: int) -> tuple[Path, Path]:
    """The member's adapter in the folder of the committee, and its merged model."""
    stage = "_stagetwo" if (models / f"{name}_stagetwo_adapter").exists() else ""
    target = folder / f"member_{number}"
    with whole_folder(target) as new:
        shutil.copytree(models / f"{name}{stage}_adapter", new, dirs_exist_ok=True)
    return target, models / f"{name}{stage}.model"


def _calibrate(
    args: argparse.Namespace,
    options: RunOptions,
    folder: Path,
    members: Sequence[tuple[Path, Path]],
    validation: Path,
) -> None:
    models = [torch.load(path, weights_only=False) for _, path in members]
    frames, predicted = _predicted(args, options, models, validation)
    found = spread.factors(frames, predicted)
    facts: dict[str, object] = {"calibrated_on": f"{len(frames.atoms)} validation frames"}
    told = ", ".join(f"{q} {f:.2f}" for q, f in found.items())
    print(
        f"Standard deviations are multiplied by {told}, for {len(frames.atoms)} validation frames"
    )
    if isinstance(args.test_file, str) and args.test_file.endswith(".xyz"):
        frames, predicted = _predicted(args, options, models, Path(args.test_file))
        judged = spread.reliability(frames, predicted, found)
        facts["on_test_frames"] = {q: asdict(r) for q, r in judged.items()}
        for quantity, r in judged.items():
            one, two = r.coverage
            print(
                f"On test frames, {quantity}: rank correlation of spread and error "
                f"{r.correlation:.2f}; {one:.0%} of errors within one deviation, {two:.0%} within "
                f"two; RMSE of the mean {1e3 * r.rmse:.1f} meV"
            )
    committee.write(folder, committee.Committee(tuple(m for m, _ in members), found), facts)
    print(f'Committee: MaceLoraCalculator(base="{args.foundation_model}", adapter="{folder}")')


def _predicted(
    args: argparse.Namespace,
    options: RunOptions,
    models: Sequence[torch.nn.Module],
    path: Path,
) -> tuple[LabelledFrames, list[Values]]:
    units = Units.parse(options.units)
    frames = with_inputs(read_as_flagged(args, str(path), units), inputs_of(models[0]))
    heads = [heads_of(models[0])[-1]] * len(frames.atoms)
    return frames, [predict_values(m, frames, heads, args.valid_batch_size) for m in models]
