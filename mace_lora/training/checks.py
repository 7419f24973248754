"""Files, folders and flags are checked before anything is read."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from mace_lora.errors import ConfigError
from mace_lora.frames.stored import is_stored
from mace_lora.frames.units import Units
from mace_lora.model import artefact
from mace_lora.model.description import atomic_numbers
from mace_lora.training.arguments import files_named
from mace_lora.training.data import refuse_unknown
from mace_lora.training.epochs import processes
from mace_lora.training.epochs.order import FrameOrder
from mace_lora.training.epochs.sizes import Limit
from mace_lora.upstream.types import Loader

# Flags of mace-torch's whose values it takes as they are: what they must be, in words
_NUMBERS: dict[str, tuple[Callable[..., bool], str]] = {
    "seed": (lambda n: 0 <= n < 2**32, "0 or more, and below 2^32"),
    **dict.fromkeys(
        ("batch_size", "valid_batch_size", "max_num_epochs", "patience", "eval_interval"),
        (lambda n: n >= 1, "1 or more"),
    ),
    **dict.fromkeys(("lr", "swa_lr"), (lambda x: 0 < x < math.inf, "a finite number above 0")),
    "weight_decay": (lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
    "ema_decay": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "lr_factor": (lambda x: 0 < x < 1, "a number between 0 and 1"),
    "clip_grad": (lambda x: x is None or x > 0, "a number above 0, or None for no clipping"),
}


def numbers(args: argparse.Namespace) -> None:
    """Raises ConfigError for a number with which nothing can be trained."""
    for flag, (is_right, words) in _NUMBERS.items():
        value = getattr(args, flag)
        if not is_right(value):
            raise ConfigError(f"--{flag}={value}: {words} is needed")


def known_elements(args: argparse.Namespace, foundation: torch.nn.Module | None) -> None:
    """Raises ConfigError where --atomic_numbers names what the loaded foundation model lacks."""
    if foundation is None or args.atomic_numbers is None:
        return
    try:
        asked = {int(z) for z in ast.literal_eval(args.atomic_numbers)}
    except (ValueError, TypeError, SyntaxError):
        raise ConfigError(
            f"--atomic_numbers={args.atomic_numbers}: a list such as '[1, 6, 8]' is needed"
        ) from None
    refuse_unknown(asked, set(atomic_numbers(foundation)))


def units(args: argparse.Namespace, given: str | None) -> None:
    """Raises ConfigError where --units can't be applied: to HDF5 and LMDB, to files not read."""
    parts = Units.parse(given)
    if not parts.parts:
        return
    paths = []
    for called, path in files_named(args):
        if called.endswith("statistics_file"):
            continue
        if called.endswith("test_dir") or is_stored(called, path):
            raise ConfigError(
                f"--units={given} and {called}={path}: HDF5 and LMDB are read as they were "
                "written; write them again in eV and eV/A, or give the labels in extended xyz"
            )
        paths.append(path)
    parts.check_named(paths)


def optional_packages(args: argparse.Namespace) -> None:
    """Raises ConfigError naming the flag whose package is not installed."""
    needed = {
        "--enable_cueq=True": (args.enable_cueq or args.only_cueq, "cuequivariance_torch"),
        "--enable_oeq=True": (args.enable_oeq, "openequivariance"),
        "--optimizer=schedulefree": (args.optimizer == "schedulefree", "schedulefree"),
        "--wandb": (args.wandb, "wandb"),
    }
    for flag, (asked, package) in needed.items():
        if asked and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{flag} needs the package {package}, which is not installed: "
                f"pip install {package.replace('_', '-')}, or leave the flag out"
            )
    unknown = [name for name in args.wandb_log_hypers if args.wandb and name not in vars(args)]
    if unknown:
        raise ConfigError(
            f"--wandb_log_hypers={unknown[0]} is no flag of mace-torch's (the adapter and its "
            "options are logged without being named)"
        )


def folders_writable(args: argparse.Namespace) -> None:
    """Make the output folders now, so that a run can't fail for them after hours of training.

    Raises:
        ConfigError: naming the flag whose folder can't be written to.
        ArtefactError: something that is no adapter stands where the adapter is to be written.
    """
    for flag in ("work_dir", "model_dir", "checkpoints_dir", "results_dir", "log_dir"):
        folder = getattr(args, flag, None)
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # several processes may look at once
                pass
        except OSError as error:
            raise ConfigError(f"--{flag}={folder} can't be written to: {error}") from None
    artefact.check_free(Path(args.model_dir or args.work_dir) / f"{args.name}_adapter")


def enough_frames(train_loader: Loader, args: argparse.Namespace) -> None:
    """Raises ConfigError where the training set makes not even one batch."""
    count = processes.count(args.distributed)
    frames = len(train_loader.dataset)
    if frames // (args.batch_size * count) == 0 and not (args.lbfgs and frames):
        times = f" times {count} processes" if count > 1 else ""
        raise ConfigError(
            f"--batch_size={args.batch_size}{times} is larger than the training set of "
            f"{frames} frames, so that there is no batch to train on"
        )


def enough_batches(order: FrameOrder, args: argparse.Namespace, limit: Limit | None) -> None:
    """Raises ConfigError where batches by size are fewer than the processes that take them."""
    if limit is not None and len(order) == 0:
        count = processes.count(args.distributed)
        raise ConfigError(
            f"{limit.flag}: the training frames make fewer batches than there are processes, "
            f"{count}, and each takes one at a step: a smaller number gives more batches"
        )
