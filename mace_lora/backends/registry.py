"""The backends that exist, one line each. They are imported on demand, and torch by them."""

from __future__ import annotations

import importlib
from typing import cast

from mace_lora.backends.base import Backend
from mace_lora.errors import ConfigError, did_you_mean

AUTO = "auto"
# name -> its class, as file:name in this folder. "auto" is the first one that can serve and isn't
# experimental
BACKENDS: dict[str, str] = {
    "fused": "fused:Fused",
    "eager": "eager:Eager",
    "cudagraph": "cudagraph:CudaGraph",
}
CHOICES = (AUTO, *BACKENDS)


def get_backend(name: str) -> type[Backend]:
    """The backend class called `name`.

    Raises:
        ConfigError: no such backend; the message lists the known ones.
    """
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend {name!r}; {did_you_mean(name, BACKENDS)}")
    file, _, attribute = BACKENDS[name].partition(":")
    module = importlib.import_module(f"mace_lora.backends.{file}")
    return cast("type[Backend]", getattr(module, attribute))


def describe() -> str:
    """What each value of `--step` stands for, for `--help`."""
    lines = [f"{AUTO}: the first of these that serves this model on this machine"]
    for name in BACKENDS:
        backend = get_backend(name)
        facts = [*backend.devices]
        facts += ["pads batches"] if backend.needs_fixed_shapes else []
        facts += ["experimental"] if backend.experimental else []
        where = f" ({', '.join(facts)})" if facts else ""
        lines.append(f"{name}{where}: {backend.summary}")
    return "; ".join(lines)
