"""Adapter directories as training runs leave them, with random factors instead of trained ones."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from mace_lora import AdapterConfig, inject
from mace_lora.model import artefact
from mace_lora.model.description import describe, restore_constants
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.injection import adapter_parameters
from mace_lora.testing import randomise_
from mace_lora.upstream import rebuilding


def make_adapter(
    base: torch.nn.Module,
    folder: Path,
    method: str = "lora",
    seed: int = 0,
    elements: tuple[int, ...] | None = None,
    shift: float = 0.0,
    std: float = 0.3,
    heads: tuple[str, ...] = ("Default",),
    **options: Any,
) -> Path:
    """An adapter of `base`, for some of its elements or all, its E0s moved by `shift` (eV) each.

    Of several heads each further one has E0s lower by 1 eV.
    """
    own = describe(base)
    elements = elements or own["atomic_numbers"]
    places = [own["atomic_numbers"].index(z) for z in elements]
    run = {
        **own,
        "atomic_numbers": list(elements),
        "heads": list(heads),
        "atomic_energies": [
            [own["atomic_energies"][0][i] + shift - k for i in places] for k in range(len(heads))
        ],
        **{name: own[name] * len(heads) for name in ("scale", "shift")},
    }
    if list(elements) == own["atomic_numbers"] and len(heads) == 1:
        start = deepcopy(base)
        restore_constants(start, run)
    else:
        start = rebuilding.specialise(base, run)
    description = {**run, "fingerprint": fingerprint(start)}
    config = AdapterConfig.create(method, **options)
    inject(start, config)
    randomise_(start, seed, std)
    origin = {"name": "base", "head": None, **own, "fingerprint": fingerprint(base)}
    artefact.write(folder, config, adapter_parameters(start), origin, description)
    return folder
