"""Fold adapters into the weights that they change, or take them off: a model of plain layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from mace_lora.adapters.base import Gated, OutputAdapter
from mace_lora.errors import NotMergeable
from mace_lora.model.injection import adapters
from mace_lora.model.layers import find_sites


@dataclass(frozen=True)
class Change:
    """An adapted weight: as it was, and as it takes effect."""

    name: str
    original: torch.Tensor
    effective: torch.Tensor

    @property
    def update(self) -> torch.Tensor:
        return self.effective - self.original


def merge(model: torch.nn.Module, keep_gates: bool = False, scale: float = 1.0) -> torch.nn.Module:
    """Write the effective weights down and remove the adapters, in place; `model` is returned.

    Afterwards every module is of its original class, and every parameter has `requires_grad`.
    Copies that were made of `model` before keep their adapters.

    Args:
        model: carries adapters.
        keep_gates: leave adapters that depend on the input in place and merge the others; without
            it they are an error.
        scale: each weight becomes original + scale (effective - original): 1 is the adapter as it
            was trained, 0.5 half of it, 0 the model without it.

    Raises:
        NotMergeable: an adapter depends on the input; `model` is left as it was.
    """
    if not keep_gates or scale != 1.0:
        check_mergeable(model)

    def written(change: Change) -> torch.Tensor:
        return change.effective if scale == 1.0 else change.original + scale * change.update

    return _without_adapters(model, written)


def unload(model: torch.nn.Module) -> torch.nn.Module:
    """Remove the adapters, in place, and leave the weights as they were before the injection.

    Every module is of its original class again, every parameter has `requires_grad`.
    """
    take_gates(model)
    return _without_adapters(model, lambda change: change.original)


def check_mergeable(model: torch.nn.Module) -> None:
    """Raises NotMergeable where an adapter depends on the input."""
    stuck = [name for name, adapter in adapters(model) if not adapter.mergeable]
    if stuck:
        raise NotMergeable(
            f"{len(stuck)} adapters depend on the input and can't be merged, {stuck[0]} the first; "
            "merge(model, keep_gates=True) merges the others; loading the result needs mace_lora"
        )


@torch.no_grad()
def changes(model: torch.nn.Module) -> Iterator[Change]:
    """Every adapted weight of `model`, in model order; gates on outputs have none."""
    for path, module in model.named_modules():
        for tensor, change in _changes(module):
            yield Change(f"{path}.{tensor}".removesuffix(".weight"), *change)


def _changes(module: torch.nn.Module) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    # not parametrize.is_parametrized: the property must be ours alone to remove
    if "parametrizations" in module._modules:
        for tensor, chain in module.get_submodule("parametrizations").named_children():
            assert isinstance(chain, parametrize.ParametrizationList)
            yield tensor, (chain.original, getattr(module, tensor).detach())


@torch.no_grad()
def _without_adapters(
    model: torch.nn.Module, written: Callable[[Change], torch.Tensor]
) -> torch.nn.Module:
    """Turn parametrised modules back into ones of their own class, with the weights `written`.

    `parametrize.remove_parametrizations` also deletes the property from the generated class, which
    copies of the module share: they would lose their weights. Changing the class of this one module
    leaves them alone.
    """
    for module in list(model.modules()):
        new = {name: (pair[0], written(Change(name, *pair))) for name, pair in _changes(module)}
        if not new:
            continue
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
        for name, (original, values) in new.items():
            if isinstance(original, torch.nn.Parameter):
                original.data = values.detach().clone()
                module.register_parameter(name, original)
            else:
                module.register_buffer(name, values.detach().clone())
    for parameter in model.parameters():
        parameter.requires_grad = True
    return model


def take_gates(model: torch.nn.Module) -> dict[str, OutputAdapter[Any]]:
    """Remove the adapters that depend on the input from a merged model, by layer, in place.

    `put_gates` attaches them again, to this model or to the same one in another kernel's layout.
    """
    gated = [(n, m) for n, m in model.named_modules() if isinstance(m, Gated)]
    for path, layer in gated:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.ungated)
    return {path: layer.gate for path, layer in gated}


def put_gates(model: torch.nn.Module, gates: dict[str, OutputAdapter[Any]]) -> None:
    """Attach gates to the layers of the same names, in the layout that these layers have."""
    sites = {site.name: site for site in find_sites(model)[0]}
    for name, gate in gates.items():
        fitting = type(gate)(sites[name].layout, gate.options)
        fitting.load_state_dict(gate.state_dict())
        fitting.config = gate.config
        fitting.attach(sites[name], model)
