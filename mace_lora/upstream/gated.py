"""The classes of saved models that keep gates (see `adapters.base.OutputAdapter`).

A model with gates is of a class of its own, `GatedScaleShiftMACE` for a ScaleShiftMACE, so that no
reader takes it for a plain one: upstream's conversions rebuild a model of a class that they know
and copy the weights whose names they find, which would drop the gates without a word. Loading such
a file needs mace_lora, and without it fails with the name of this module.

The classes are made on first use, which pickle does by importing them from here.
"""

from __future__ import annotations

import sys

import torch

from mace_lora.adapters.registry import get_method
from mace_lora.config import AdapterConfig
from mace_lora.errors import FoundationModelError
from mace_lora.model.layers import find_sites
from mace_lora.upstream import names as upstream
from mace_lora.upstream.hyperparameters import part, plain
from mace_lora.upstream.reading import Made

_PREFIX = "Gated"


def __getattr__(name: str) -> type[torch.nn.Module]:
    base = _plain(name.removeprefix(_PREFIX))
    if not name.startswith(_PREFIX) or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(name, (base,), {"__module__": __name__, "__doc__": f"A {base.__name__} + gates."})
    globals()[name] = made
    return made


def mark(model: torch.nn.Module) -> None:
    """Make `model`, which holds gates, one of a gated class; a class not of mace.modules stays."""
    name = type(model).__name__
    if _plain(name) is type(model):
        model.__class__ = getattr(sys.modules[__name__], _PREFIX + name)


def _plain(name: str) -> type[torch.nn.Module] | None:
    """mace-torch's class of this name."""
    found: type[torch.nn.Module] | None = getattr(upstream.original("modules"), name, None)
    return found


def take_out(tree: Made, path: str = "") -> dict[str, Made]:
    """Remove the gates from what a file holds of a model, leaving plain layers; by layer."""
    found: dict[str, Made] = {}
    for name, child in tree.children.items():
        here = f"{path}.{name}".lstrip(".")
        if child.name == "Gated" and child.module.startswith("mace_lora."):
            found[here] = child.children["gate"]
            tree.held("_modules")[name] = child.children["ungated"]
        else:
            found |= take_out(child, here)
    return found


def put_back(model: torch.nn.Module, gates: dict[str, Made]) -> None:
    """Attach the gates of a file to a model without any, which becomes one of a gated class.

    Raises:
        FoundationModelError: they don't fit its layers.
    """
    sites = {site.name: site for site in find_sites(model)[0]}
    for name, made in gates.items():
        kept = part(made, "config").state
        options = {key: plain(value) for key, value in part(made, "config.options").state.items()}
        config = AdapterConfig.create(str(kept["method"]), None, **options)
        gate = get_method(config.method).make(sites[name], config.options)
        own, there = dict(gate.named_parameters()), made.tensors("_parameters")
        if type(gate).__name__ != made.name or own.keys() != there.keys():
            raise FoundationModelError(f"the gate of {name} is not as {config.method} makes it")
        for key, parameter in own.items():
            parameter.data = there[key].detach().clone().reshape(parameter.shape)
        gate.config = config
        gate.attach(sites[name], model)
    mark(model)
