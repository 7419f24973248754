"""Single steps of adapted models, by any backend, and how far two of them differ."""

from __future__ import annotations

import contextlib

import torch

from mace_lora.backends.base import Backend
from mace_lora.config import AdapterConfig
from mace_lora.model.injection import adapter_parameters, inject
from mace_lora.testing import randomise_

METHODS = {
    "lora": {"targets": ("all",)},
    "elora": {},
    "dora": {"targets": ("all",)},
    "mmea": {},
    "full": {},
}


class Plain(Backend):
    """The model as it is: what every backend is compared with."""

    name = "plain"

    def active(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def adapted(model: torch.nn.Module, method: str = "lora", **options) -> torch.nn.Module:
    inject(model, AdapterConfig.create(method, **METHODS[method], **options))
    randomise_(model, std=0.1)
    return model


def step(
    backend: Backend, model: torch.nn.Module, batch, stress: bool = False, training: bool = True
):
    """(outputs, gradients of the adapters) of one batch, with a weight on every output."""
    parameters = adapter_parameters(model)
    with backend.active(model):
        found = model(batch.to_dict(), training=training, compute_stress=stress)
        keys = [k for k in ("energy", "forces", "stress", "dipole") if found.get(k) is not None]
        if not training:
            return {k: found[k].detach() for k in keys}, {}
        loss = sum(
            (found[k] * torch.linspace(0.5, 1.5, found[k].numel()).view_as(found[k])).sum()
            for k in keys
        )
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return {k: found[k].detach() for k in keys}, {k: g for k, g in pairs if g is not None}


def differs(one, other) -> float:
    """The largest difference, relative to the largest value of the same tensor."""
    assert one.keys() == other.keys()
    return max(
        ((one[k] - other[k]).abs().max() / one[k].abs().max().clamp_min(1e-12)).item() for k in one
    )
