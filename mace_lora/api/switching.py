"""Live with several adapters of one base model: switch, disable, remove, combine, count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import ase
import torch

from mace_lora.api import named, solving
from mace_lora.api.files import load_adapter
from mace_lora.errors import ArtefactError, ConfigError
from mace_lora.frames.reading import read_atoms
from mace_lora.model.description import describe, restore_constants
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.injection import check_model
from mace_lora.model.layers import find_sites
from mace_lora.model.merging import merge, unload
from mace_lora.upstream import predicting
from mace_lora.upstream.types import Batch


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
        named.choose_directory(model, adapter)
    return model


def combine_adapters(
    base: torch.nn.Module | str | Path,
    weights: Mapping[str | Path, float],
    frames: Mapping[str | Path, Sequence[ase.Atoms] | str | Path] | None = None,
) -> torch.nn.Module:
    """A plain model: the base plus the weighted sum of the updates of several adapters.

    Each weight of the model becomes W + sum_i w_i (W_i - W) with W_i as adapter i has it. E0s,
    scale and shift, where the runs differ in them, become their mean weighted by w_i. To have the
    result as an adapter again, give it to `extract`.

    Adapters interfere: a sum is not what either does. With `frames` the linear layers are solved
    for what all adapters give there, each on its own frames (`solving`); the other weights get the
    weighted mean.

    Args:
        base: the foundation model that all of them were trained from, as in `load_adapter`.
        weights: adapter directories and their weights, `{"a_adapter": 0.5, "b_adapter": 0.5}`.
        frames: by adapter, frames of what it is for (some tens do, without labels), or a file.

    Raises:
        ConfigError: no adapters, or weights that sum to zero where E0s, scale or shift differ;
            with `frames`, weights that aren't above 0, or adapters without frames.
        ArtefactError: an adapter is of another base, or has other elements or heads.
        NotMergeable: an adapter depends on the input.
    """
    named.check_weights(weights)
    if frames is not None:
        _check_frames(weights, frames)
    start: torch.nn.Module | None = None
    every: list[named.Updates] = []
    seen: list[solving.Moments] = []
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
        every.append(named.updates(model))
        if frames is not None:
            seen.append(solving.moments(merge(model), _batches(frames[folder], model)))
    assert start is not None  # there is at least one adapter
    _add(start, _combined(start, every, list(weights.values()), seen))
    restore_constants(start, named.mean_constants(descriptions))
    return start


def _check_frames(
    weights: Mapping[str | Path, float],
    frames: Mapping[str | Path, Sequence[ase.Atoms] | str | Path],
) -> None:
    if any(weight <= 0 for weight in weights.values()):
        raise ConfigError(f"with frames all weights must be above 0, found {dict(weights)}")
    for folder in weights:
        if folder not in frames:
            raise ConfigError(f"frames: none for {folder}; give some of what it was trained for")


def _batches(frames: Sequence[ase.Atoms] | str | Path, model: torch.nn.Module) -> list[Batch]:
    atoms = read_atoms(str(frames)) if isinstance(frames, (str, Path)) else list(frames)
    if not atoms:
        raise ConfigError(f"frames: {frames} holds none")
    return [predicting.frames_to_batch(atoms[i : i + 10], model) for i in range(0, len(atoms), 10)]


def _combined(
    start: torch.nn.Module,
    every: Sequence[named.Updates],
    weights: Sequence[float],
    seen: Sequence[solving.Moments],
) -> named.Updates:
    """The update of each weight: a sum, or with moments solved for, and else a mean."""
    if not seen:
        return named.weighted_sum(every, weights)
    found = named.weighted_sum(every, [w / sum(weights) for w in weights])
    layouts = {site.name: site.layout for site in find_sites(start)[0]}
    for name, some in found.items():
        if all(name in moments for moments in seen):
            own = [updates.get(name, torch.zeros_like(some)) for updates in every]
            moments = [moments[name] for moments in seen]
            found[name] = solving.solved(own, moments, weights, layouts[name])
    return found


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
