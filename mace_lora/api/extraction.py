"""From weights to adapters: the best low-rank adapter of a fine-tuned model, and a merge undone."""

from __future__ import annotations

import contextlib
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from ase.data import chemical_symbols

from mace_lora.config import AdapterConfig
from mace_lora.errors import ArtefactError, ConfigError, FoundationModelError, NotMergeable
from mace_lora.model import artefact
from mace_lora.model.description import Description, atomic_numbers, describe, restore_constants
from mace_lora.model.fingerprint import base_state, fingerprint
from mace_lora.model.identity import identity
from mace_lora.model.injection import adapter_parameters, adapters, inject
from mace_lora.model.merging import changes, unload
from mace_lora.upstream import loading, rebuilding

# Steps of the iteration that undoes a merge; additive methods need one
UNMERGE_STEPS = 200


@dataclass(frozen=True)
class LayerError:
    """How much of the change of one weight its adapter holds.

    Attributes:
        name: of the weight.
        change: Frobenius norm of the fine-tuning's change, relative to that of the base weight.
        error: norm of what the adapter leaves, relative to that of the change: 0 is all of it.
        adapted: whether the weight has an adapter; where not, all of the change is left.
    """

    name: str
    change: float
    error: float
    adapted: bool


@dataclass(frozen=True)
class Extraction:
    """A low-rank adapter of a fine-tuned model.

    Attributes:
        model: the model that the fine-tuning started from, with the adapter attached.
        layers: what the adapter holds of each weight, in model order.
        config, base, start: what `artefact.write` needs besides the factors.
    """

    model: torch.nn.Module
    layers: list[LayerError]
    config: AdapterConfig
    base: Description
    start: Description

    def save(self, folder: str | Path) -> None:
        """Write the adapter directory."""
        parameters = adapter_parameters(self.model)
        artefact.write(folder, self.config, parameters, self.base, self.start)


def extract(
    base: torch.nn.Module | str | Path,
    finetuned: torch.nn.Module | str | Path,
    config: AdapterConfig | None = None,
    head: str | None = None,
) -> Extraction:
    """The best low-rank adapter of a fully fine-tuned model: an SVD per irrep or path.

    By Eckart and Young no adapter of this rank is closer to the change of a weight, in the
    Frobenius norm, for each of the matrices that the method gives factors to.

    Args:
        base: the foundation model that was fine-tuned; it is not changed.
        finetuned: the result. E0s, scale and shift are taken from it as they are.
        config: method, rank and targets; by default LoRA of rank 4 on all layers. alpha is without
            influence on the result.
        head: of `base`, where it has several.

    Raises:
        FoundationModelError: the second is no fine-tuning of the first: other shapes.
        ConfigError: the method has no best adapter that could be computed (only lora and elora do).
    """
    config = config or AdapterConfig.create("lora", targets=("all",))
    base_name = None if isinstance(base, torch.nn.Module) else str(base)
    finetuned = loading.given(finetuned, flag="finetuned")
    dtype = next(finetuned.parameters()).dtype
    base = rebuilding.one_head(loading.given(base, dtype=dtype, flag="base", copy=True), head)
    start_description = describe(finetuned)
    start, wanted = _start(base, finetuned, start_description)
    base_description = {
        "name": base_name,
        "head": head,
        **identity(base),
    }
    start_description = {**identity(start), **start_description}
    inject(start, config)
    _fit(start, wanted)
    layers = _left_over(start, wanted)
    return Extraction(start, layers, config, base_description, start_description)


def _start(
    base: torch.nn.Module, finetuned: torch.nn.Module, description: Description
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model that the fine-tuning started from, and the parameters that it led to."""
    own = describe(base)
    if all(own[key] == description[key] for key in ("atomic_numbers", "heads")):
        start = deepcopy(base)
        restore_constants(start, description)
        with contextlib.suppress(FoundationModelError):  # else mace-torch has built it anew
            return start, _same_shapes(start, finetuned)
    start = rebuilding.specialise(base, description)
    return start, _same_shapes(start, finetuned)


def _same_shapes(start: torch.nn.Module, finetuned: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of `finetuned` by name. Raises where they aren't those of `start`."""
    own, other = base_state(start), base_state(finetuned)
    names = {*own, *other}
    wrong = sorted(name for name in names if _shape(own, name) != _shape(other, name))
    if wrong:
        raise FoundationModelError(
            f"the fine-tuned model is no fine-tuning of the base: {len(wrong)} parameters differ "
            f"in name or shape, {wrong[0]} the first ({_shape(own, wrong[0])} in the base, "
            f"{_shape(other, wrong[0])} in the other)"
        )
    return {name: parameter.detach() for name, parameter in other.items()}


def _shape(state: dict[str, torch.Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None


def _lookup(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return state[name] if name in state else state[f"{name}.weight"]


@torch.no_grad()
def _fit(model: torch.nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    originals = {change.name: change.original for change in changes(model)}
    for name, adapter in adapters(model):
        adapter.fit(_lookup(wanted, name) - originals[name])


@torch.no_grad()
def _left_over(model: torch.nn.Module, wanted: dict[str, torch.Tensor]) -> list[LayerError]:
    effective = {change.name: change.effective for change in changes(model)}
    layers = []
    for parameter, original in base_state(model).items():
        name = parameter.removesuffix(".weight")
        target = wanted[parameter]
        change = (target - original).norm()
        left = (target - effective.get(name, original)).norm()
        layers.append(
            LayerError(
                name,
                float(change / original.norm().clamp_min(torch.finfo(change.dtype).tiny)),
                float(left / change) if change > 0 else 0.0,
                name in effective,
            )
        )
    return layers


def unmerge(model: torch.nn.Module, folder: str | Path) -> tuple[torch.nn.Module, bool]:
    """Take an adapter out of a model that it was merged into, in place.

    Solves f(W, factors) = W_merged for W by W <- W + (W_merged - f(W)): additive methods need one
    step, DoRA a few.

    Args:
        model: a merged model, such as `<name>.model`.
        folder: the adapter that was merged into it, such as `<name>_adapter`.

    Returns:
        The model that the run started from, and whether its weights are those to the last bit of
        single precision (False: within rounding).

    Raises:
        NotMergeable: the adapter was not merged into this model, or too far from it to be undone.
        ArtefactError: the adapter doesn't fit the model.
        ConfigError: the model carries adapters: it is not merged.
    """
    if any(True for _ in adapters(model)):
        raise ConfigError("the model carries adapters, it is not merged: use unload instead")
    content = artefact.read(folder)
    own, its = (
        " ".join(chemical_symbols[z] for z in numbers)
        for numbers in (atomic_numbers(model), content.model["atomic_numbers"])
    )
    if own != its:
        raise NotMergeable(
            f"the model is for {own} and {folder} for {its}: was it merged into this one?"
        )
    merged = {name: weight.detach().clone() for name, weight in base_state(model).items()}
    inject(model, content.config)
    try:
        artefact.load_factors(model, content.tensors, content.model)
    except ArtefactError:
        unload(model)
        raise
    left = _solve(model, merged)
    unload(model)
    tolerance = 100 * torch.finfo(next(model.parameters()).dtype).eps
    if not left <= tolerance:
        for name, parameter in base_state(model).items():
            parameter.data.copy_(merged[name])
        raise NotMergeable(
            f"{folder} can't be taken out of this model: the weights that it would give differ by "
            f"{left:.1e} from the model's; was it merged into this one?"
        )
    return model, fingerprint(model) == content.model["fingerprint"]


@torch.no_grad()
def _solve(model: torch.nn.Module, merged: dict[str, torch.Tensor]) -> float:
    """Move the originals until the effective weights are `merged`; the relative error left."""
    tolerance = torch.finfo(next(model.parameters()).dtype).eps
    worst = float("inf")
    for _ in range(UNMERGE_STEPS):
        worst = 0.0
        for change in changes(model):
            target = _lookup(merged, change.name)
            missing = target - change.effective
            worst = max(worst, float(missing.norm() / target.norm().clamp_min(1e-30)))
            change.original.add_(missing)
        if worst <= tolerance:
            break
    return worst
