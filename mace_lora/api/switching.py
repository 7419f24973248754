"""Live with several adapters of one base model: switch, disable, remove, combine, count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from numbers import Real
from pathlib import Path

import torch

from mace_lora.api.files import load_adapter
from mace_lora.errors import ArtefactError, ConfigError
from mace_lora.model import artefact
from mace_lora.model.description import Description, describe, restore_constants
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.injection import check_model, inject
from mace_lora.model.merging import changes, check_mergeable, unload

_CONSTANTS = ("atomic_energies", "scale", "shift")


def set_adapter(model: torch.nn.Module, folder: str | Path) -> torch.nn.Module:
    """Put the adapter in `folder` in the place of the one that `model` carries, in place.

    Args:
        model: as `load_adapter` gave it for another adapter of the same base and elements (with or
            without that adapter: see `unload`).
        folder: written by `save_adapter` or by a training run.

    Returns:
        `model` itself; its own weights are the same tensors as before.

    Raises:
        ArtefactError: the directory is broken, or its run started from another model; `model` is
            left as it was.
    """
    check_model(model)
    content = artefact.read(folder)
    found, asked = fingerprint(model), content.model["fingerprint"]
    if found != asked or not _same_places(describe(model), content.model):
        raise ArtefactError(
            f"{folder} does not fit this model: it started from a model of elements "
            f"{content.model['atomic_numbers']}, heads {content.model['heads']}, fingerprint "
            f"{asked[:12]}, and this one has {describe(model)['atomic_numbers']}, "
            f"{describe(model)['heads']}, {found[:12]}; "
            "load it with load_adapter(base, folder)"
        )
    unload(model)
    restore_constants(model, content.model)
    inject(model, content.config)
    artefact.load_factors(model, content.tensors)
    return model


def _same_places(one: Description, other: Description) -> bool:
    return all(one[key] == other[key] for key in ("atomic_numbers", "heads"))


def combine_adapters(
    base: torch.nn.Module | str | Path, weights: Mapping[str | Path, float]
) -> torch.nn.Module:
    """A plain model: the base plus the weighted sum of the updates of several adapters.

    Each weight of the model becomes W + sum_i w_i (W_i - W) with W_i as adapter i has it. E0s,
    scale and shift, where the runs differ in them, become their mean weighted by w_i. To have the
    result as an adapter again, give it to `extract`.

    Args:
        base: the foundation model that all of them were trained from, as in `load_adapter`.
        weights: adapter directories and their weights, `{"a_adapter": 0.5, "b_adapter": 0.5}`.

    Raises:
        ConfigError: no adapters, or weights that sum to zero where E0s, scale or shift differ.
        ArtefactError: an adapter is of another base, or has other elements or heads.
        NotMergeable: an adapter depends on the input.
    """
    _check_weights(weights)
    start: torch.nn.Module | None = None
    sums: dict[str, torch.Tensor] = {}
    descriptions = []
    for folder, weight in weights.items():
        model = load_adapter(base, folder)
        check_mergeable(model)
        if start is None:
            start, first = unload(deepcopy(model)), folder
        elif fingerprint(model) != fingerprint(start) or not _same_places(
            describe(model), describe(start)
        ):
            raise ArtefactError(
                f"{first} and {folder} can't be combined: their runs started from models with "
                "different elements, heads or weights"
            )
        descriptions.append((weight, describe(model)))
        for change in changes(model):
            update = weight * change.update.detach()
            sums[change.name] = sums[change.name] + update if change.name in sums else update
    assert start is not None  # there is at least one adapter
    _add(start, sums)
    restore_constants(start, _mean_constants(descriptions))
    return start


def _check_weights(weights: object) -> None:
    """Raises ConfigError unless there are adapter directories, each with a finite number."""
    if not weights or not isinstance(weights, Mapping):
        raise ConfigError(
            "nothing to combine: give adapter directories with their weights, such as "
            '{"a_adapter": 0.5, "b_adapter": 0.5}'
        )
    for folder, weight in weights.items():
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ConfigError(f"the weight of {folder} must be a finite number, found {weight!r}")


@torch.no_grad()
def _add(model: torch.nn.Module, updates: Mapping[str, torch.Tensor]) -> None:
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, update in updates.items():
        tensor = tensors[name] if name in tensors else tensors[f"{name}.weight"]
        tensor.add_(update.to(tensor))


def _mean_constants(descriptions: list[tuple[float, Description]]) -> Description:
    mean: Description = {}
    total = sum(weight for weight, _ in descriptions)
    for key in _CONSTANTS:
        values = [d[key] for _, d in descriptions]
        if all(v == values[0] for v in values):
            mean[key] = values[0]
        elif total == 0:
            raise ConfigError(
                f"the runs of these adapters differ in {key}, of which a mean with weights that "
                "sum to zero makes no sense"
            )
        else:
            stacked = torch.tensor(values, dtype=torch.float64)
            shares = torch.tensor([w for w, _ in descriptions], dtype=torch.float64) / total
            mean[key] = torch.tensordot(shares, stacked, dims=1).tolist()
    return mean


def print_trainable_parameters(model: torch.nn.Module) -> None:
    """Print `trainable params: 8,386 || all params: 74,866 || trainable%: 11.20`, as PEFT does."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / max(1, total):.2f}"
    )
