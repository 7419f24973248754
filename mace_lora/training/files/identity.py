"""Which run a checkpoint belongs to: what must be the same to go on, and what may change."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable, Mapping
from typing import TypedDict, cast

import torch

from mace_lora.training.epochs import processes
from mace_lora.training.options import CONSTANT
from mace_lora.training.record import Progress, Run
from mace_lora.upstream.types import Loader, Scheduler

# Flags that the stored states of optimiser, schedulers, EMA and data order were made with
_FIXED = (
    *("seed", "default_dtype", "optimizer", "lbfgs", "amsgrad", "beta", "scheduler", "lr_factor"),
    *("scheduler_patience", "lr_scheduler_gamma", "lr_params_factors", "ema", "ema_decay"),
)
# The same for stage two, once it has begun
_STAGE_TWO = ("swa", "start_swa", "swa_lr")
# Flags that may change on the way: said in the log, and followed from then on
_FREE = (
    *("lr", "weight_decay", "clip_grad", "loss", "huber_delta"),
    *("energy_weight", "forces_weight", "stress_weight", "virials_weight"),
    *("swa_energy_weight", "swa_forces_weight", "swa_stress_weight"),
)
# Flags that say where and with what help a run computes, not what comes out
_AROUND = {
    *("restart_latest", "config", "device", "distributed", "launcher", "num_workers"),
    *("pin_memory", "log_level", "log_dir"),
}
# E0s are fitted again at each start: equal up to rounding
_SAME_ENERGY = 1e-6


class Start(TypedDict):
    """Of the model that a run started from, as `describe` gives it."""

    fingerprint: str
    atomic_energies: list[list[float]] | None
    heads: list[str]


class Identity(TypedDict):
    """Who a run is, as plain values."""

    method: str
    options: dict[str, object]
    base: dict[str, object]
    start: Start
    fixed: dict[str, object]
    stage_two: dict[str, object]
    free: dict[str, object]
    data: dict[str, object]
    flags: dict[str, object]  # with all of mace-torch's; older checkpoints lack them


def of_run(run: Run, loader: Loader, distributed: bool) -> Identity:
    """Who a run that has come to `started` is, with the flags that training begins with."""
    args, config, options = run.asked.args, run.asked.config, run.asked.options
    base, start = run.started.base, run.started.start
    asked = {**run.asked.given, "adapter_start": options.adapter_start}
    # What the order of the frames depends on. One process may be continued by two with half the
    # batch size: the global batches are the same.
    data: dict[str, object] = {
        "training frames": len(loader.dataset),
        "frames per step (batch_size times processes)": loader.batch_size
        * processes.count(distributed),
        # by size an order is cut to other batches, and shared otherwise
        "--batch_atoms": options.batch_atoms or None,
        "--batch_edges": options.batch_edges or None,
        "processes": processes.count(distributed) if options.by_size else None,
        "--accumulate": options.accumulate,
        "--warmup_steps": options.warmup_steps,
        # None as in checkpoints that know nothing of them
        "--protect": options.protect or None,
        "--schedule": None if options.schedule == CONSTANT else options.schedule,
        "--units": options.units,
    }
    return {
        "method": config.method,
        "options": config.options.to_json(),
        "base": {key: base.get(key) for key in ("name", "fingerprint")},
        "start": cast(Start, {key: start.get(key) for key in Start.__annotations__}),
        "fixed": _flags(args, _FIXED),
        "stage_two": _flags(args, _STAGE_TWO),
        "free": _flags(args, _FREE),
        "data": data,
        "flags": _plain(asked),
    }


def _flags(args: argparse.Namespace, names: Iterable[str]) -> dict[str, object]:
    return _plain({name: getattr(args, name, None) for name in names})


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    return {
        k: v if isinstance(v, (int, float, str, type(None))) else str(v) for k, v in values.items()
    }


def differences(there: Identity, here: Identity, progress: Progress) -> list[str]:
    """What a checkpoint's run and this one differ in, so that it can't go on; a text each."""
    if there["method"] != here["method"]:
        return [f"--adapter={there['method']} there, --adapter={here['method']} here"]
    method = here["method"]
    found = _changes(there["options"], here["options"], prefix=f"--{method}_")
    bases = there["base"], here["base"]
    if bases[0]["fingerprint"] != bases[1]["fingerprint"]:
        one, other = (f"{b['name']} (fingerprint {str(b['fingerprint'])[:12]})" for b in bases)
        found.append(f"foundation model {one} there, {other} here")
    elif there["start"]["fingerprint"] != here["start"]["fingerprint"]:
        found.append("the same foundation model, cut to other elements or heads of the data")
    elif not _same_energies(there["start"], here["start"]):
        tables = (s["start"]["atomic_energies"] for s in (there, here))
        found.append("E0s {} there, {} here".format(*tables))
    found += _changes(there["data"], here["data"], prefix="")
    found += _changes(there["fixed"], here["fixed"], prefix="--")
    start = cast(float, here["stage_two"]["start_swa"]) if here["stage_two"]["swa"] else math.inf
    if progress.stage_two:
        found += _changes(there["stage_two"], here["stage_two"], prefix="--")
    elif start < progress.epoch or (start == progress.epoch and progress.steps):
        found.append(f"epoch {progress.epoch} in stage one there, --start_swa={start} here")
    return found


def other_results(there: Identity, here: Identity) -> list[str]:
    """What two runs from the beginning differ in, so that their results do, too; a text each."""
    flags = [
        {k: v for k, v in run.get("flags", here["flags"]).items() if k not in _AROUND}
        for run in (there, here)
    ]
    found = [*differences(there, here, Progress()), *_changes(flags[0], flags[1], prefix="--")]
    return list(dict.fromkeys([*found, *_changes(there["free"], here["free"], prefix="--")]))


def _changes(there: dict[str, object], here: dict[str, object], prefix: str) -> list[str]:
    keys = dict.fromkeys([*there, *here])
    return [
        f"{prefix}{key}={there.get(key)} there, {prefix}{key}={here.get(key)} here"
        for key in keys
        if there.get(key) != here.get(key)
    ]


def _same_energies(there: Start, here: Start) -> bool:
    tables = there["atomic_energies"], here["atomic_energies"]
    if tables[0] is None or tables[1] is None:
        return tables[0] is tables[1]
    one, other = ([e for row in table for e in row] for table in tables if table)
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=_SAME_ENERGY, abs_tol=_SAME_ENERGY)
        for a, b in zip(one, other, strict=True)
    )


def log_changed_flags(there: Identity, here: Identity) -> None:
    """Log flags that were changed on the way; they hold from now on."""
    for text in _changes(there["free"], here["free"], prefix="--"):
        logging.warning(f"Changed since the checkpoint; the new values apply from now on: {text}")


def apply_new_rates(
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    fresh: list[dict[str, object]],
    old_lr: float,
    lr: float,
) -> None:
    """The stored optimiser brings its old learning rate and weight decay along: put in new ones.

    A schedule goes on from where it was, scaled by the ratio of the learning rates.
    `fresh` are the optimiser's parameter groups as this run has made them.
    """
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        if "weight_decay" in new:
            group["weight_decay"] = new["weight_decay"]
        for key, value in new.items():  # "swa_lr", where stage two is new
            group.setdefault(key, value)
    if old_lr == lr or isinstance(optimizer, torch.optim.LBFGS):
        return
    ratio = lr / old_lr
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr"):
            if key in group:
                group[key] *= ratio
    schedule = scheduler.lr_scheduler
    if hasattr(schedule, "base_lrs"):
        schedule.base_lrs = [rate * ratio for rate in schedule.base_lrs]
