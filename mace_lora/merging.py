"""Fold adapters into the weights they change, and leave a model of plain layers."""

from __future__ import annotations

import torch

from mace_lora.adapters.base import Gated, OutputAdapter
from mace_lora.blocks import find_sites
from mace_lora.errors import NotMergeable
from mace_lora.injection import adapters


def merge(model: torch.nn.Module, keep_gates: bool = False) -> torch.nn.Module:
    """Write the effective weights down and remove the adapters, in place.

    Afterwards every module is of its original class, and every parameter has `requires_grad`.
    Copies that were made of `model` before keep their adapters.

    Args:
        model: carries adapters.
        keep_gates: leave adapters that depend on the input in place and merge the others; without
            it they are an error.

    Returns:
        `model` itself.

    Raises:
        NotMergeable: an adapter depends on the input; `model` is left as it was.
    """
    stuck = [name for name, adapter in adapters(model) if not adapter.mergeable]
    if stuck and not keep_gates:
        raise NotMergeable(
            f"{len(stuck)} adapters depend on the input and can't be merged, {stuck[0]} the first; "
            "merge(model, keep_gates=True) merges the others; loading the result needs mace_lora"
        )
    for module in list(model.modules()):
        # not parametrize.is_parametrized: the property must be ours alone to remove
        if "parametrizations" in module._modules:
            _write_effective_weights(module)
    for parameter in model.parameters():
        parameter.requires_grad = True
    return model


@torch.no_grad()
def _write_effective_weights(module: torch.nn.Module) -> None:
    """Turn a parametrised module back into one of its own class, with the effective weights.

    `parametrize.remove_parametrizations` also deletes the property from the generated class, which
    copies of the module share: they would lose their weights. Changing the class of this one module
    leaves them alone.
    """
    tensors = list(module.parametrizations)
    effective = {name: getattr(module, name).detach().clone() for name in tensors}
    originals = {name: module.parametrizations[name].original for name in tensors}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name in tensors:
        parameter = originals[name]
        parameter.data = effective[name]
        module.register_parameter(name, parameter)


def take_gates(model: torch.nn.Module) -> dict[str, OutputAdapter]:
    """Remove the adapters that depend on the input from a merged model, by layer, in place.

    `put_gates` attaches them again, to this model or to the same one in another kernel's layout.
    """
    gated = [(n, m) for n, m in model.named_modules() if isinstance(m, Gated)]
    for path, layer in gated:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.ungated)
    return {path: layer.gate for path, layer in gated}


def put_gates(model: torch.nn.Module, gates: dict[str, OutputAdapter]) -> None:
    """Attach gates to the layers of the same names, in the layout that these layers have."""
    sites = {site.name: site for site in find_sites(model)[0]}
    for name, gate in gates.items():
        fitting = type(gate)(sites[name].layout, gate.options)
        fitting.load_state_dict(gate.state_dict())
        fitting.config = gate.config
        fitting.attach(sites[name], model)
