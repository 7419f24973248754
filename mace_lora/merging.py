"""Fold adapters into the weights they change, and leave a model of plain layers."""

from __future__ import annotations

import torch

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
