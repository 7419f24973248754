"""Faster code in the place of a model's modules, for the length of a block.

The model's modules, its state and its files are those of mace-torch at all other times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from mace_lora.backends.plain_layers import plain_forward

# A module, an attribute of it (`forward` above all), and what stands in its place
StandIn = tuple[torch.nn.Module, str, object]
_NOTHING = object()


@contextlib.contextmanager
def replaced(stand_ins: Sequence[StandIn]) -> Iterator[None]:
    """Attributes of modules are others meanwhile; blocks may lie in one another."""
    before: list[StandIn] = []
    try:
        for module, name, value in stand_ins:
            before.append((module, name, module.__dict__.get(name, _NOTHING)))
            module.__dict__[name] = value
        yield
    finally:
        for module, name, value in reversed(before):
            if value is _NOTHING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


def plain_layers(model: torch.nn.Module) -> list[StandIn]:
    """e3nn's layers without TorchScript; modules that aren't known are left as they are."""
    found = ((module, plain_forward(module)) for module in model.modules())
    return [(module, "forward", forward) for module, forward in found if forward is not None]
