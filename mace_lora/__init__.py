"""Parameter-efficient, symmetry-preserving fine-tuning of MACE foundation models.

Train:    finetune (gives a Result), train: the command mace_run_train as a function
Start:    load_foundation, AdapterConfig, inject (gives an InjectionReport)
Options:  LoraOptions, EloraOptions, DoraOptions, MmeaOptions, FullOptions
Loop:     batches, fast_steps, adapter_parameters, print_trainable_parameters
Files:    save_adapter, load_adapter
Switch:   add_adapter, set_adapter, active_adapters, delete_adapter, disable_adapter, unload
Weights:  merge, unmerge, combine_adapters, extract, change_basis
Simulate: MaceLoraCalculator, an ASE calculator
mace-torch's names: inject_lora, merge_lora_weights

    from mace_lora import finetune

    result = finetune("mini", "train.xyz")
    atoms.calc = result.calculator()

`help(mace_lora.inject)` says more; errors raised on purpose are `MaceLoraError`s. On the command
line, training is `mace_run_train` and everything else `mace_lora`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and mypy, which read this and run nothing
    from mace_lora.adapters.options import DoraOptions as DoraOptions
    from mace_lora.adapters.options import EloraOptions as EloraOptions
    from mace_lora.adapters.options import FullOptions as FullOptions
    from mace_lora.adapters.options import LoraOptions as LoraOptions
    from mace_lora.adapters.options import MmeaOptions as MmeaOptions
    from mace_lora.api.calculator import MaceLoraCalculator as MaceLoraCalculator
    from mace_lora.api.command import train as train
    from mace_lora.api.extraction import extract as extract
    from mace_lora.api.extraction import unmerge as unmerge
    from mace_lora.api.files import change_basis as change_basis
    from mace_lora.api.files import load_adapter as load_adapter
    from mace_lora.api.files import load_foundation as load_foundation
    from mace_lora.api.files import save_adapter as save_adapter
    from mace_lora.api.finetuning import finetune as finetune
    from mace_lora.api.loops import batches as batches
    from mace_lora.api.loops import fast_steps as fast_steps
    from mace_lora.api.mace_torch import inject_lora as inject_lora
    from mace_lora.api.mace_torch import merge_lora_weights as merge_lora_weights
    from mace_lora.api.named import active_adapters as active_adapters
    from mace_lora.api.named import add_adapter as add_adapter
    from mace_lora.api.named import delete_adapter as delete_adapter
    from mace_lora.api.result import Result as Result
    from mace_lora.api.switching import combine_adapters as combine_adapters
    from mace_lora.api.switching import print_trainable_parameters as print_trainable_parameters
    from mace_lora.api.switching import set_adapter as set_adapter
    from mace_lora.config import AdapterConfig as AdapterConfig
    from mace_lora.errors import MaceLoraError as MaceLoraError
    from mace_lora.model.injection import adapter_parameters as adapter_parameters
    from mace_lora.model.injection import disable_adapter as disable_adapter
    from mace_lora.model.injection import inject as inject
    from mace_lora.model.merging import merge as merge
    from mace_lora.model.merging import unload as unload
    from mace_lora.model.report import InjectionReport as InjectionReport

__version__ = "0.1.0"  # the one place: pyproject.toml reads it here

# Where each name is. It is imported on first use: the command line answers before torch is
# imported, and `mace_lora doctor` even where torch is broken
_EXPORTS = {
    "AdapterConfig": "mace_lora.config",
    "DoraOptions": "mace_lora.adapters.options",
    "EloraOptions": "mace_lora.adapters.options",
    "FullOptions": "mace_lora.adapters.options",
    "InjectionReport": "mace_lora.model.report",
    "LoraOptions": "mace_lora.adapters.options",
    "MaceLoraCalculator": "mace_lora.api.calculator",
    "MaceLoraError": "mace_lora.errors",
    "MmeaOptions": "mace_lora.adapters.options",
    "Result": "mace_lora.api.result",
    "active_adapters": "mace_lora.api.named",
    "adapter_parameters": "mace_lora.model.injection",
    "add_adapter": "mace_lora.api.named",
    "batches": "mace_lora.api.loops",
    "change_basis": "mace_lora.api.files",
    "combine_adapters": "mace_lora.api.switching",
    "delete_adapter": "mace_lora.api.named",
    "disable_adapter": "mace_lora.model.injection",
    "extract": "mace_lora.api.extraction",
    "fast_steps": "mace_lora.api.loops",
    "finetune": "mace_lora.api.finetuning",
    "inject": "mace_lora.model.injection",
    "inject_lora": "mace_lora.api.mace_torch",
    "load_adapter": "mace_lora.api.files",
    "load_foundation": "mace_lora.api.files",
    "merge": "mace_lora.model.merging",
    "merge_lora_weights": "mace_lora.api.mace_torch",
    "print_trainable_parameters": "mace_lora.api.switching",
    "save_adapter": "mace_lora.api.files",
    "set_adapter": "mace_lora.api.switching",
    "train": "mace_lora.api.command",
    "unload": "mace_lora.model.merging",
    "unmerge": "mace_lora.api.extraction",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mace_lora' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
