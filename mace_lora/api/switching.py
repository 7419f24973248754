"""Live with several adapters of one base model: switch, disable, remove, combine, count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path

import torch

from mace_lora.api import named
from mace_lora.api.files import load_adapter
from mace_lora.errors import ArtefactError
from mace_lora.model import artefact
from mace_lora.model.description import describe, restore_constants
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.injection import check_model, inject
from mace_lora.model.merging import unload


def set_adapter(
    model: torch.nn.Module, adapter: str | Path | Iterable[str] | Mapping[str, float]
) -> torch.nn.Module:
    """Put another adapter in the place of the one that `model` carries, in place.

    Args:
        model: as `load_adapter` gave it for another adapter of the same base and elements (with or
            without that adapter: see `unload`).
        adapter: the name of one that the model has in memory (`add_adapter`), several names, each
            of weight 1, or weights by name, `{"water": 0.7, "ice": 0.3}`; or a directory, written
            by `save_adapter` or by a training run, which isn't kept in memory.

    Returns:
        `model` itself; its own weights are the same tensors as before. Adapters in memory keep what
        they have learnt. Several at once, or a weight other than 1, are for predictions: they are
        attached as one update of all weights.

    Raises:
        ArtefactError: the directory is broken, or its run started from another model; `model` is
            left as it was.
        ConfigError: no adapter of this name, or weights that make no sense.
        NotMergeable: of several adapters, one depends on the input.
    """
    check_model(model)
    if isinstance(adapter, Mapping):
        named.choose(model, adapter)
    elif not isinstance(adapter, (str, Path)):
        named.choose(model, dict.fromkeys(adapter, 1.0))
    elif str(adapter) in named.names(model):
        named.choose(model, {str(adapter): 1.0})
    else:
        content = named.fitting(model, adapter)
        named.keep(model)
        unload(model)
        restore_constants(model, content.model)
        inject(model, content.config)
        artefact.load_factors(model, content.tensors)
        named.forget(model)
    return model


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
    named.check_weights(weights)
    start: torch.nn.Module | None = None
    sums: dict[str, torch.Tensor] = {}
    descriptions = []
    for folder, weight in weights.items():
        model = load_adapter(base, folder)
        if start is None:
            start, first = unload(deepcopy(model)), folder
        elif fingerprint(model) != fingerprint(start) or not named.same_places(
            describe(model), describe(start)
        ):
            raise ArtefactError(
                f"{first} and {folder} can't be combined: their runs started from models with "
                "different elements, heads or weights"
            )
        descriptions.append((weight, describe(model)))
        named.add_up(sums, model, weight)
    assert start is not None  # there is at least one adapter
    _add(start, sums)
    restore_constants(start, named.mean_constants(descriptions))
    return start


@torch.no_grad()
def _add(model: torch.nn.Module, updates: Mapping[str, torch.Tensor]) -> None:
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, update in updates.items():
        tensor = tensors[name] if name in tensors else tensors[f"{name}.weight"]
        tensor.add_(update.to(tensor))


def print_trainable_parameters(model: torch.nn.Module) -> None:
    """Print `trainable params: 8,386 || all params: 74,866 || trainable%: 11.20`, as PEFT does."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / max(1, total):.2f}"
    )
