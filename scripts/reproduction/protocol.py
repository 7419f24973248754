"""What is run: methods, their settings by data set, the published figures to compare with."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mace_lora import load_foundation
from mace_lora.adapters.registry import METHODS, options_of
from mace_lora.errors import ConfigError, did_you_mean
from mace_lora.upstream import library
from reproduction.datasets import System

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NOT_IN_NAMES = ("device", "num_workers")  # flags that don't make another run
# MAE or RMSE, as the papers give them
MEASURE = {"rmd17": "mae", "3bpa": "rmse", "acac": "rmse"}
# Options of a method that the published runs give beyond its own defaults
PUBLISHED_OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("rmd17", "mmea"): {"mmea_rank": 16},
    ("acac", "mmea"): {"mmea_rank": 16},
    ("3bpa", "mmea"): {"mmea_rank": 32, "mmea_std": 0.001},
}
# (data set, molecule, method, foundation model): energy in meV, forces in meV/A, on the test set
PUBLISHED: dict[tuple[str, str, str, str], dict[str, float]] = {
    ("rmd17", "aspirin", "mmea", "medium_off"): {
        "trainable_parameters": 151354,
        "energy_mae": 7.2,
        "forces_mae": 16.4,
    },
}


@dataclass(frozen=True)
class Method:
    """A way of training: the settings that make it, and whose command runs them."""

    name: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    upstream: bool = False
    foundation: bool = True


def preset(method: str, name: str) -> dict[str, Any]:
    """The flags that a preset stands for: a run is known by its settings, not by their name."""
    found = options_of(method).presets[name]
    return {f"{method}_{k}": list(v) if isinstance(v, tuple) else v for k, v in found.items()}


# With `mini` (64 thousand parameters) the defaults, made for 128 channels, are nothing like a few
# per cent of the model. Chosen by validation errors on aspirin and acetylacetone; of full
# fine-tuning's learning rates, 0.005 of the protocol was the best, too. `lora_tuned` has a quarter
# of the model's parameters: the preset "balanced"; `lora_max` is the preset "max-accuracy"
STUDY = [
    Method(
        "lora_tuned",
        "lora, all layers, rank 6, alpha 6, lr 0.02",
        {"adapter": "lora", **preset("lora", "balanced"), "lr": 0.02},
    ),
    Method(
        "lora_max",
        "lora, all layers, rank 16, alpha 8, lr 0.02",
        {"adapter": "lora", **preset("lora", "max-accuracy"), "lr": 0.02},
    ),
    Method(
        "upstream_tuned",
        "mace-torch's --lora, rank 16, alpha 16, lr 0.02",
        {"lora": True, "lora_rank": 16, "lora_alpha": 16.0, "lr": 0.02},
        upstream=True,
    ),
    Method(
        "elora_tuned",
        "elora, rank 4, alpha 2, lr 0.02",
        {"adapter": "elora", "elora_rank": 4, "elora_alpha": 2.0, "lr": 0.02},
    ),
]


def methods(study: bool = False) -> dict[str, Method]:
    """Baselines, every registered adapter, and those of the study with settings found for it."""
    found = [
        Method("scratch", "from scratch", foundation=False),
        Method("full", "full fine-tuning"),
        *(
            Method(
                f"upstream_rank{rank}",
                f"mace-torch's --lora, rank {rank}, alpha {alpha}",
                {"lora": True, "lora_rank": rank, "lora_alpha": float(alpha)},
                upstream=True,
            )
            for rank, alpha in ((4, 1), (16, 16))
        ),
    ]
    found += STUDY if study else []
    # `full` is the baseline, by mace-torch's own steps
    found += [Method(name, name, {"adapter": name}) for name in METHODS if name != "full"]
    return {method.name: method for method in found}


def select(names: str, study: bool = False) -> list[Method]:
    """Methods by comma-separated names, or "all".

    Raises:
        ConfigError: no such method.
    """
    known = methods(study)
    chosen = list(known) if names == "all" else names.split(",")
    for name in chosen:
        if name not in known:
            raise ConfigError(f"--adapter={name}: {did_you_mean(name, ['all', *known])}")
    return [known[name] for name in chosen]


def flags(rest: list[str]) -> dict[str, Any]:
    """Flags for `mace_run_train`, written --name=value.

    Raises:
        ConfigError: something is not.
    """
    found = {}
    for text in rest:
        name, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or not equals or not name:
            raise ConfigError(f"{text!r} is not understood; flags are written --name=value")
        found[name] = yaml.safe_load(value)
    return found


@functools.cache
def architecture(foundation: str) -> dict[str, Any]:
    """Settings that build the architecture of a foundation model, to train it from scratch."""
    model = load_foundation(foundation)
    c = library.architecture(model)
    return {
        "model": type(model).__name__,
        "hidden_irreps": str(c["hidden_irreps"]),
        "r_max": float(c["r_max"]),
        "num_radial_basis": int(c["num_bessel"]),
        "num_cutoff_basis": int(c["num_polynomial_cutoff"]),
        "max_ell": int(c["max_ell"]),
        "num_interactions": int(c["num_interactions"]),
        "correlation": c["correlation"],
        "interaction": c["interaction_cls"].__name__,
        "interaction_first": c["interaction_cls_first"].__name__,
        "MLP_irreps": str(c["MLP_irreps"]),
        "radial_MLP": str([int(n) for n in c["radial_MLP"]]),
        # one molecule tells its atoms' energies only as a sum, and that is what average fits
        "E0s": "average",
    }


def settings(
    config: Path | None,
    system: System,
    method: Method,
    foundation: str,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Everything that `mace_run_train` is told, but for files and seed, in this order of priority:
    `extra`, the method's own, those that the published runs give, the protocol's file.
    """
    path = config or CONFIGS / f"{system.dataset}.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    for key in ("train_file", "valid_file", "test_file", "foundation_model", "adapter"):
        found.pop(key, None)
    if method.foundation:
        found["foundation_model"] = foundation
    else:
        found.pop("E0s", None)
        found |= architecture(foundation)
    found |= PUBLISHED_OPTIONS.get((system.dataset, method.name), {})
    found |= method.settings
    return found | {key: value for key, value in extra.items() if _concerns(key, method)}


def _concerns(flag: str, method: Method) -> bool:
    """Whether a flag is anything to a method: the options of another adapter are not."""
    owner = flag.split("_")[0]
    if owner not in METHODS or owner == method.settings.get("adapter"):
        return True
    return method.upstream and flag in ("lora_rank", "lora_alpha")


def fit_budget(found: dict[str, Any], n_train: int, steps: int) -> dict[str, Any]:
    """The settings with as many epochs as make `steps` optimiser steps, or slightly more.

    mace-torch leaves out an incomplete last batch. Stage two starts at the same part of the run,
    and about ten validations are made.
    """
    per_epoch = n_train // int(found["batch_size"])
    if not per_epoch:
        raise ConfigError(f"batch_size={found['batch_size']} is more than {n_train} frames")
    epochs = math.ceil(steps / per_epoch)
    fitted = {**found, "max_num_epochs": epochs, "eval_interval": max(1, epochs // 10)}
    if found.get("swa"):
        part = found["start_swa"] / found["max_num_epochs"]
        fitted["start_swa"] = min(max(1, round(part * epochs)), epochs - 1)
        fitted["swa"] = epochs > 1
    return fitted
