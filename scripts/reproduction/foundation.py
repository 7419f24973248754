"""The foundation model as a file: what the baselines need where mace-torch can't start from a name.

mace-torch 0.3.16 does not know `mini`, and it estimates E0s only in the foundation model's own
precision. Where the data hold every element that the foundation model knows, it also puts the
foundation's E0s back in place of those that it has just estimated, and training starts hundreds of
eV per atom away. Adapters are spared this by mace_lora; for a fair comparison the baselines start
from a file in the right precision, with E0s fitted to the training frames.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from mace_lora import load_foundation
from mace_lora.files import whole_file
from reproduction.evaluation import predictions

FILE = "foundation.model"


@functools.cache
def elements(name: str) -> frozenset[int]:
    """Atomic numbers that a foundation model knows."""
    return frozenset(int(z) for z in load_foundation(name).atomic_numbers)


def is_needed(settings: dict[str, Any], upstream: bool, numbers: Iterable[int]) -> bool:
    """Whether a run of these settings, on these elements, must start from a file."""
    name = settings.get("foundation_model")
    if name is None or "adapter" in settings:
        return False
    return upstream or (settings.get("E0s") == "estimated" and elements(name) == set(numbers))


def write(path: Path, settings: dict[str, Any], frames: list[Atoms]) -> None:
    """The foundation model of `settings`, with E0s fitted to labelled frames if these say so."""
    model = load_foundation(settings["foundation_model"], dtype=torch.float64)
    if settings.get("E0s") == "estimated":
        fit_e0s(model, frames)
    with whole_file(path) as temporary:
        torch.save(model.to(getattr(torch, settings["default_dtype"])), temporary)


def fit_e0s(model: torch.nn.Module, frames: list[Atoms]) -> None:
    """Move the E0s of `model` so that its energies fit the labels best (least squares)."""
    numbers = [int(z) for z in model.atomic_numbers]
    counts = np.array([[np.sum(f.numbers == z) for z in numbers] for f in frames], dtype=float)
    found = predictions(model, frames)
    correction, *_ = np.linalg.lstsq(counts, found.energy_reference - found.energy, rcond=None)
    energies = model.atomic_energies_fn.atomic_energies  # a buffer
    energies += torch.tensor(correction, dtype=energies.dtype).reshape(energies.shape)
