"""Run upstream's training script with or without an adapter."""

from __future__ import annotations

import argparse
import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import torch

from mace_lora.config import AdapterConfig, RunOptions
from mace_lora.errors import ConfigError
from mace_lora.frames import stored
from mace_lora.frames.energies import gaps_told
from mace_lora.training import checks
from mace_lora.training.arguments import check_files
from mace_lora.training.epochs import processes
from mace_lora.training.files import writing
from mace_lora.training.session import Session
from mace_lora.upstream import loading, precision, rebuilding
from mace_lora.upstream import names as upstream
from mace_lora.upstream.known import MINI

# Models that mace-torch builds from a foundation model
_FROM_FOUNDATION = ("MACE", "ScaleShiftMACE", "MACELES", "PolarMACE")


def run(args: argparse.Namespace, config: AdapterConfig | None, options: RunOptions) -> None:
    """Train. Without an adapter this is upstream's `run(args)`, plus the foundation model `mini`.

    Args:
        args: upstream's flags.
        config: the adapter; None for upstream's own training.
        options: of the run, beside upstream's; they need an adapter.

    Raises:
        MaceLoraError: before any training, for whatever is wrong with flags, files or models; and
            at the end, if the merged model does not predict what the adapted one does.
    """
    upstream.check()
    script = upstream.module("mace.cli.run_train")
    if config is None:
        foundation = loading.load(MINI) if args.foundation_model == MINI else None
        with upstream.substituted(_foundation_by_name(args, foundation)):
            script.run(args)
        return
    if args.lbfgs and options.accumulate > 1:
        raise ConfigError("--lbfgs takes all batches in one step: leave out --accumulate")
    foundation = _prepare(args)
    precision.exact_coefficients()
    session = Session(args, config, foundation, options)
    substitutes = {**session.substitutes(), **_foundation_by_name(args, foundation)}
    with (
        session.stop.watched(),
        upstream.substituted(substitutes),
        writing.explained(),
        gaps_told(),
    ):
        script.run(args)
    session.say_what_was_done()


def _prepare(args: argparse.Namespace) -> torch.nn.Module | None:
    """Check what can be checked before anything is written, and load the foundation model."""
    if args.foundation_model is None:
        raise ConfigError(
            "an adapter changes a foundation model: name one with --foundation_model "
            "(mini, medium_off, ..., or a .model file)"
        )
    _refuse_contradictions(args)
    checks.numbers(args)
    checks.heads(args)
    checks.optional_packages(args)
    processes.settle(args)
    check_files(args)
    stored.check_flags(args)
    foundation = None
    if loading.is_ours(args.foundation_model):  # else upstream loads it: see Session.watched
        dtype = {"float32": torch.float32, "float64": torch.float64}[args.default_dtype]
        foundation = loading.load(args.foundation_model, _device(args), dtype)
        rebuilding.check_rebuildable(foundation, args)
    checks.folders_writable(args)
    checks.known_elements(args, foundation)
    if args.E0s is None and args.heads is None and args.statistics_file is None:
        args.E0s = "estimated"
    if args.only_cueq:
        logging.info(
            "--only_cueq: mace-torch heeds it without a foundation model only; "
            "training with --enable_cueq=True"
        )
        args.enable_cueq, args.only_cueq = True, False
    args.lora = True  # upstream's switch for calling `inject_LoRAs` and `merge_lora_weights`
    return foundation


def _device(args: argparse.Namespace) -> str:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device=cuda: torch finds no CUDA device; use --device=cpu")
    return args.device


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if args.freeze:
        raise ConfigError(
            f"--freeze={args.freeze} and an adapter contradict each other: an adapter freezes all "
            "of the base model; choose the layers that it changes with its targets instead"
        )
    if args.model not in _FROM_FOUNDATION:
        raise ConfigError(
            f"--model={args.model}: mace-torch starts such a model from random numbers, whatever "
            "--foundation_model says, and an adapter freezes them so; leave --model out"
        )
    if not args.name or "/" in args.name:
        raise ConfigError(
            f"--name={args.name}: files are called by it, so it can't be empty or hold a /; for "
            "another folder give --work_dir"
        )
    if args.loss == "dipole":
        raise ConfigError(
            "--loss=dipole is for models of dipoles alone, which can't be adapted by this command"
        )
    if not args.foundation_filter_elements:
        raise ConfigError(
            "--foundation_filter_elements=False starts the readouts from random numbers, and an "
            "adapter freezes them so; leave one of the two out"
        )


def _foundation_by_name(
    args: argparse.Namespace, foundation: torch.nn.Module | None
) -> dict[str, Any]:
    """Let upstream take our loaded model for one of its named ones, instead of reading a file."""
    if foundation is None:
        return {}
    names = [*upstream.original("foundation_names"), args.foundation_model]
    load = upstream.original("mace_mp")

    def mace_mp(model: Any = None, **keywords: Any) -> Any:
        if model != args.foundation_model:
            return load(model=model, **keywords)
        dtype = keywords.get("default_dtype")
        with contextlib.suppress(AttributeError, TypeError):
            foundation.to(getattr(torch, dtype))
        return SimpleNamespace(models=[foundation.to(keywords["device"])])

    return {"foundation_names": names, "mace_mp": mace_mp}
