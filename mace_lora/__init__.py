"""Parameter-efficient, symmetry-preserving fine-tuning of MACE foundation models.

Start:    load_foundation, AdapterConfig.create, inject
Train:    adapter_parameters, print_trainable_parameters
Files:    save_adapter, load_adapter
Switch:   set_adapter, disable_adapter, unload
Weights:  merge, unmerge, combine_adapters, extract
Simulate: MaceLoraCalculator, an ASE calculator
mace-torch's names: inject_lora, merge_lora_weights

    from mace_lora import AdapterConfig, inject, load_foundation

    model = load_foundation("mini")
    print(inject(model, AdapterConfig.create("lora", rank=8)))

`help(mace_lora.inject)` says more; errors raised on purpose are `MaceLoraError`s. On the command
line, training is `mace_run_train` and everything else `mace_lora`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported on first use, so that `mace_lora doctor` can speak even where torch is broken
_EXPORTS = {
    "AdapterConfig": "mace_lora.config",
    "InjectionReport": "mace_lora.model.report",
    "MaceLoraCalculator": "mace_lora.api.calculator",
    "MaceLoraError": "mace_lora.errors",
    "adapter_parameters": "mace_lora.model.injection",
    "combine_adapters": "mace_lora.api.switching",
    "disable_adapter": "mace_lora.model.injection",
    "extract": "mace_lora.api.extraction",
    "inject": "mace_lora.model.injection",
    "inject_lora": "mace_lora.api.files",
    "load_adapter": "mace_lora.api.files",
    "load_foundation": "mace_lora.api.files",
    "merge": "mace_lora.model.merging",
    "merge_lora_weights": "mace_lora.api.files",
    "print_trainable_parameters": "mace_lora.api.switching",
    "save_adapter": "mace_lora.api.files",
    "set_adapter": "mace_lora.api.switching",
    "unload": "mace_lora.model.merging",
    "unmerge": "mace_lora.api.extraction",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mace_lora' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
