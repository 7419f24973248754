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

from mace_lora.upstream import names as upstream

_PREFIX = "Gated"


def __getattr__(name: str) -> type[torch.nn.Module]:
    plain = _plain(name.removeprefix(_PREFIX))
    if not name.startswith(_PREFIX) or plain is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(name, (plain,), {"__module__": __name__, "__doc__": f"A {plain.__name__} + gates."})
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
