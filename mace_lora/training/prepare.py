"""Before a run: flags, files and the foundation model are checked, before anything is written."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from mace_lora.config import AdapterConfig
from mace_lora.errors import ConfigError
from mace_lora.frames import stored
from mace_lora.training import checks, flags
from mace_lora.training.arguments import check_files
from mace_lora.training.epochs import processes
from mace_lora.training.options import CONSTANT, RunOptions
from mace_lora.upstream import loading, rebuilding
from mace_lora.upstream import names as upstream
from mace_lora.upstream.devices import check_device

# Models that mace-torch builds from a foundation model
_FROM_FOUNDATION = ("MACE", "ScaleShiftMACE", "MACELES", "PolarMACE")


def prepare(
    args: argparse.Namespace, config: AdapterConfig, options: RunOptions
) -> torch.nn.Module | None:
    """Check what can be checked before anything is written, and load the foundation model.

    Some of mace-torch's flags are set here. None stands for a model that mace-torch loads by name.

    Raises:
        MaceLoraError: whatever is wrong with flags, files or the model.
    """
    if args.lbfgs and options.accumulate > 1:
        raise ConfigError("--lbfgs takes all batches in one step: leave out --accumulate")
    if args.lbfgs and options.protect:
        raise ConfigError(
            "--lbfgs searches along a line of one loss, which --protect would change on the way: "
            "leave one of them out"
        )
    if args.foundation_model is None:
        raise ConfigError(
            "an adapter changes a foundation model: name one with --foundation_model "
            "(mini, medium_off, ..., or a .model file)"
        )
    _refuse_contradictions(args)
    _refuse_without_effect(args, config, options)
    check_device(args.device, args.default_dtype)
    checks.numbers(args)
    flags.check_heads(args)
    flags.check(args)
    checks.optional_packages(args)
    if args.wandb:
        upstream.check("wandb")
    processes.set_launcher(args)
    check_files(args)
    stored.check_flags(args)
    checks.units(args, options.units)
    foundation = None
    if loading.is_ours(args.foundation_model):  # else see `start.remember_foundation`
        dtype = {"float32": torch.float32, "float64": torch.float64}[args.default_dtype]
        foundation = loading.load(args.foundation_model, args.device, dtype, trust=options.trust)
        rebuilding.check_rebuildable(foundation, args)
    checks.folders_writable(args)
    checks.known_elements(args, foundation)
    if args.E0s is None and args.heads is None and args.statistics_file is None:
        args.E0s = "estimated"
    if args.only_cueq:
        logging.info(
            "--only_cueq: mace-torch ignores it where there is a foundation model; "
            "training with --enable_cueq=True"
        )
        args.enable_cueq, args.only_cueq = True, False
    if not args.foundation_filter_elements:
        # mace-torch's flag of this name keeps no element: it leaves the readouts at random numbers
        args.foundation_filter_elements, args.foundation_model_elements = True, True
    if options.by_size:
        # whatever else predicts frames does it one by one, and mace-torch finds no batch too large
        for flag in {"batch_size", "valid_batch_size"} - options.given.keys():
            setattr(args, flag, 1)
    args.lora = True  # mace-torch's switch for calling `inject_LoRAs` and `merge_lora_weights`
    return foundation


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if args.freeze:
        raise ConfigError(
            f"--freeze={args.freeze} and an adapter contradict each other: an adapter freezes all "
            "of the base model; choose the layers that it changes with its targets instead"
        )
    if args.model not in _FROM_FOUNDATION:
        raise ConfigError(
            f"--model={args.model}: mace-torch starts such a model from random numbers, whatever "
            "--foundation_model says, and an adapter would freeze those; leave --model out"
        )
    if not args.name or "/" in args.name:
        raise ConfigError(
            f"--name={args.name}: files are called by it, so it can't be empty or hold a /; for "
            "another folder give --work_dir"
        )


def _refuse_without_effect(
    args: argparse.Namespace, config: AdapterConfig, options: RunOptions
) -> None:
    if options.trust and not Path(args.foundation_model).expanduser().is_file():
        raise ConfigError(
            f"--trust has no effect with --foundation_model={args.foundation_model}: it is about "
            "how .model files are read; leave it out"
        )
    if not args.lbfgs:
        return
    # of other optimisers' steps
    given = {
        "warmup_steps": options.warmup_steps > 0,
        "schedule": options.schedule != CONSTANT,
        f"{config.method}_dropout": getattr(config.options, "dropout", 0) > 0,
        f"{config.method}_lr_ratio": getattr(config.options, "lr_ratio", 1) != 1,
    }
    for flag, has_no_effect in given.items():
        if has_no_effect:
            raise ConfigError(f"--{flag} has no effect with --lbfgs: leave one of them out")
