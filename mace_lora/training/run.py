"""Run mace-torch's training script with or without an adapter."""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from types import SimpleNamespace

import torch

from mace_lora.config import AdapterConfig
from mace_lora.frames.energies import gaps_told
from mace_lora.training import defaults, flags, losses, members, metrics, start, summary
from mace_lora.training.data import Data
from mace_lora.training.epochs import optimised, processes
from mace_lora.training.epochs.computing import Computing
from mace_lora.training.epochs.signals import StopRequest
from mace_lora.training.epochs.sizes import Limit
from mace_lora.training.epochs.train import train
from mace_lora.training.files import saving, writing
from mace_lora.training.files.checkpoints import Checkpoints
from mace_lora.training.options import RunOptions
from mace_lora.training.prepare import prepare
from mace_lora.training.record import Asked, Run
from mace_lora.upstream import cueq, library, loading, logs, precision
from mace_lora.upstream import names as upstream
from mace_lora.upstream.known import MINI


def run(args: argparse.Namespace, config: AdapterConfig | None, options: RunOptions) -> Run | None:
    """Train. Without an adapter this is mace-torch's own run, plus the foundation model `mini`, and
    `--step` where that is given: of full fine-tuning, or of a training from random numbers.

    Returns:
        What is known of the run; None without an adapter.

    Raises:
        MaceLoraError: before any training, for whatever is wrong with flags, files or models; and
            at the end, if the merged model does not predict what the adapted one does.
    """
    if options.members > 1:
        members.train(args, options)
        return None
    upstream.check()
    if config is None:
        model = loading.load(MINI) if args.foundation_model == MINI else None
        asked = "step" in options.given  # else mace-torch's own to the last bit
        steps = Computing(options.step).substitutes() if asked else {}
        with upstream.substituted({**steps, **_loaders(args, model)}):
            library.run(args)
        return None
    model = prepare(args, config, options)
    precision.exact_coefficients()
    record = Run(Asked(args, config, options))
    if model is not None:
        record.foundation = model
    stop = StopRequest()
    with (
        stop.receiving(),
        upstream.substituted({**substitutes(record, stop), **_loaders(args, model)}),
        writing.write_errors(),
        gaps_told(),
    ):
        library.run(args)
    summary.write(record)
    return record


def substitutes(run: Run, stop: StopRequest) -> dict[str, object]:
    """Our functions by key of `substitutions.ROWS`, in the order in which the script calls them.

    Each comment says which stage of `run` is reached.
    """
    args = run.asked.args
    options = run.asked.options
    loaded = partial(getattr, run, "foundation", None)
    data = Data(args, loaded, run.files, run.estimated, options, run.before)
    suiting = defaults.Suiting(run, data)
    starting = start.Start(run, data)
    limit = Limit.of(args, options)
    computing = Computing(options.step, run.evaluated, limit, run.after)
    checkpoints = Checkpoints(run)
    ending = saving.Saving(run, checkpoints)
    terminal = logs.Terminal(replay=lambda: bool(args.multiheads_finetuning))
    return {
        "init_distributed": processes.init,
        "setup_logger": terminal.set_up,
        # foundation: here, or before the script where we have loaded it
        **{key: start.remember_foundation(run, upstream.original(key)) for key in _LOADERS},
        # the frames
        "replay_data": flags.replay_data,
        **data.substitutes(),
        "energies_as_array": suiting.energies_as_array,
        "loss": losses.of_run,
        "stage_two": losses.of_stage_two,
        "avg_num_neighbors": partial(start.avg_num_neighbors, limit),
        # started
        "configure_model": starting.configure_model,
        # injected
        "inject": starting.inject,
        "count_parameters": optimised.count,
        "to_cueq": start.keep_converted,
        "to_oeq": start.keep_converted,
        "params_options": optimised.parameter_groups,
        "checkpoints": checkpoints.open,
        "ema": optimised.average,
        "lbfgs": optimised.lbfgs,
        "ddp": processes.parallel,
        # trained
        **computing.substitutes(),
        "metrics": metrics.metrics,
        "train": terminal.then(partial(train, run, stop, computing, checkpoints)),
        # saved
        "merge": ending.merge,
        "from_cueq": ending.convert_back(cueq.convert_back),
        "from_oeq": ending.convert_back(upstream.original("from_oeq")),
        "extract_config": saving.extract_config,
        "jit": saving.jit(),
        "save": writing.save_whole,
        "jit_save": ending.jit_save,
    }


_LOADERS = ("mace_mp", "mace_off", "mace_omol", "mace_polar")


def _loaders(args: argparse.Namespace, foundation: torch.nn.Module | None) -> dict[str, object]:
    """Let mace-torch take our loaded model for one of its named ones, instead of reading a file."""
    if foundation is None:
        return {}
    names = [*upstream.original("foundation_names"), args.foundation_model]
    load = upstream.original("mace_mp")

    def mace_mp(model: str | None = None, **keywords: object) -> object:
        if model != args.foundation_model:
            return load(model=model, **keywords)
        dtype = keywords.get("default_dtype")
        with contextlib.suppress(AttributeError, TypeError):
            foundation.to(getattr(torch, str(dtype)))
        return SimpleNamespace(models=[foundation.to(str(keywords["device"]))])

    return {"foundation_names": names, "mace_mp": mace_mp}
