"""The methods that exist, one line each. They are imported on demand."""

from __future__ import annotations

import importlib

from mace_lora.errors import ConfigError, did_you_mean

METHODS: dict[str, str] = {
    "lora": "mace_lora.adapters.lora:Lora",
    "elora": "mace_lora.adapters.elora:Elora",
    "mmea": "mace_lora.adapters.mmea:Mmea",
    "dora": "mace_lora.adapters.dora:Dora",
}


def get_method(name: str) -> type:
    """The adapter class called `name` (a subclass of `adapters.base.Adapter`).

    Raises:
        ConfigError: no such method; the message lists the known ones.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown adapter {name!r}; {did_you_mean(name, METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
