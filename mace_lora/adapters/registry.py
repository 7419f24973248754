"""The methods that exist, one line each. They are imported on demand."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from mace_lora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from mace_lora.adapters.base import AnyAdapter
    from mace_lora.adapters.options import AdapterOptions

# name -> its class and the class of its options, each as file:name in this folder. Options that
# stand in the method's own file work as well, but reading the command line then imports torch.
METHODS: dict[str, tuple[str, str]] = {
    "lora": ("lora:Lora", "options:LoraOptions"),
    "elora": ("elora:Elora", "options:EloraOptions"),
    "mmea": ("mmea:Mmea", "options:MmeaOptions"),
    "dora": ("dora:Dora", "options:DoraOptions"),
    "full": ("full:Full", "options:FullOptions"),
}


def get_method(name: str) -> type[AnyAdapter]:
    """The adapter class called `name`.

    Raises:
        ConfigError: no such method; the message lists the known ones.
    """
    return cast("type[AnyAdapter]", _find(name, 0))


def options_of(name: str) -> type[AdapterOptions]:
    """The class of the options of the method called `name`. Imports no torch.

    Raises:
        ConfigError: no such method; the message lists the known ones.
    """
    return cast("type[AdapterOptions]", _find(name, 1))


def _find(name: str, which: int) -> object:
    if name not in METHODS:
        raise ConfigError(f"unknown adapter {name!r}; {did_you_mean(name, METHODS)}")
    file, _, attribute = METHODS[name][which].partition(":")
    return getattr(importlib.import_module(f"mace_lora.adapters.{file}"), attribute)
