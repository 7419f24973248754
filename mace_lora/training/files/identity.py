"""Which run a checkpoint belongs to: what must be the same to go on, and what may change."""

from __future__ import annotations

import argparse
import logging
import math
from typing import Any

import torch

from mace_lora.config import AdapterConfig
from mace_lora.training.epochs import processes

# Flags that the stored states of optimiser, schedulers, EMA and data order were made with
_FIXED = (
    "seed",
    "default_dtype",
    "optimizer",
    "lbfgs",
    "amsgrad",
    "beta",
    "scheduler",
    "lr_factor",
    "scheduler_patience",
    "lr_scheduler_gamma",
    "lr_params_factors",
    "ema",
    "ema_decay",
)
# The same for stage two, once it has begun
_STAGE_TWO = ("swa", "start_swa", "swa_lr")
# Flags that may change on the way: said in the log, and followed from then on
_FREE = (
    "lr",
    "weight_decay",
    "clip_grad",
    "loss",
    "energy_weight",
    "forces_weight",
    "stress_weight",
    "virials_weight",
    "huber_delta",
    "swa_energy_weight",
    "swa_forces_weight",
    "swa_stress_weight",
)
# E0s are fitted again at each start: equal up to rounding
_SAME_ENERGY = 1e-6


def of_run(
    config: AdapterConfig, base: dict[str, Any], start: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Who a run is, as plain values.

    Args:
        config: the adapter.
        base: the foundation model, as `models.describe` and `fingerprint` give it.
        start: the same for the model that the adapters were attached to.
        args: the flags as they stand when training begins.
    """
    return {
        "method": config.method,
        "options": config.options.to_json(),
        "base": {key: base.get(key) for key in ("name", "fingerprint")},
        "start": {key: start.get(key) for key in ("fingerprint", "atomic_energies", "heads")},
        "fixed": {key: _plain(getattr(args, key, None)) for key in _FIXED},
        "stage_two": {key: _plain(getattr(args, key, None)) for key in _STAGE_TWO},
        "free": {key: _plain(getattr(args, key, None)) for key in _FREE},
    }


def of_data(loop: Any) -> dict[str, int]:
    """What the order of the frames depends on. One process may be continued by two with half the
    batch size: the global batches are the same."""
    per_step = loop.train_loader.batch_size * processes.count(loop.distributed)
    return {
        "training frames": len(loop.train_loader.dataset),
        "frames per step (batch_size times processes)": per_step,
        "--accumulate": loop.taken.options.accumulate,
        "--warmup_steps": loop.taken.options.warmup_steps,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def apart(there: dict[str, Any], here: dict[str, Any], progress: dict[str, Any]) -> list[str]:
    """What keeps a checkpoint's run and this one apart, a text each; nothing if they fit.

    Args:
        there, here: as `of_run` gives them, with `of_data` under "data".
        progress: of the checkpoint.
    """
    if there["method"] != here["method"]:
        return [f"--adapter={there['method']} there, --adapter={here['method']} here"]
    method = here["method"]
    found = _differences(there["options"], here["options"], prefix=f"--{method}_")
    bases = there["base"], here["base"]
    if bases[0]["fingerprint"] != bases[1]["fingerprint"]:
        one, other = (f"{b['name']} (fingerprint {str(b['fingerprint'])[:12]})" for b in bases)
        found.append(f"foundation model {one} there, {other} here")
    elif there["start"]["fingerprint"] != here["start"]["fingerprint"]:
        found.append("the same foundation model, cut to other elements or heads of the data")
    elif not _same_energies(there["start"], here["start"]):
        one, other = (s["start"]["atomic_energies"] for s in (there, here))
        found.append(f"E0s {one} there, {other} here")
    found += _differences(there["data"], here["data"], prefix="")
    found += _differences(there["fixed"], here["fixed"], prefix="--")
    start = here["stage_two"]["start_swa"] if here["stage_two"]["swa"] else math.inf
    if progress["stage_two"]:
        found += _differences(there["stage_two"], here["stage_two"], prefix="--")
    elif start < progress["epoch"] or (start == progress["epoch"] and progress["steps"]):
        found.append(f"epoch {progress['epoch']} in stage one there, --start_swa={start} here")
    return found


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str) -> list[str]:
    keys = dict.fromkeys([*there, *here])
    return [
        f"{prefix}{key}={there.get(key)} there, {prefix}{key}={here.get(key)} here"
        for key in keys
        if there.get(key) != here.get(key)
    ]


def _same_energies(there: dict[str, Any], here: dict[str, Any]) -> bool:
    tables = [start["atomic_energies"] for start in (there, here)]
    if None in tables:
        return tables[0] is tables[1]
    one, other = ([e for row in table for e in row] for table in tables)
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=_SAME_ENERGY, abs_tol=_SAME_ENERGY)
        for a, b in zip(one, other, strict=True)
    )


def say_what_is_new(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Log flags that were changed on the way; they hold from now on."""
    for text in _differences(there["free"], here["free"], prefix="--"):
        logging.warning(f"Changed since the checkpoint, and followed from now on: {text}")


def apply_new_rates(
    loop: Any, fresh: list[dict[str, Any]], there: dict[str, Any], args: argparse.Namespace
) -> None:
    """The stored optimiser brings its old learning rate and weight decay along: put in new ones.

    A schedule goes on from where it was, scaled by the ratio of the learning rates.
    """
    for group, new in zip(loop.optimizer.param_groups, fresh, strict=True):
        if "weight_decay" in new:
            group["weight_decay"] = new["weight_decay"]
        for key, value in new.items():  # "swa_lr", where stage two is new
            group.setdefault(key, value)
    if there["lr"] == args.lr or isinstance(loop.optimizer, torch.optim.LBFGS):
        return
    ratio = args.lr / there["lr"]
    for group in loop.optimizer.param_groups:
        for key in ("lr", "initial_lr"):
            if key in group:
                group[key] *= ratio
    schedule = loop.scheduler.lr_scheduler
    if hasattr(schedule, "base_lrs"):
        schedule.base_lrs = [rate * ratio for rate in schedule.base_lrs]
