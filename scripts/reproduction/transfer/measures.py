"""Errors of a model against labels."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms

from reproduction.evaluation import predictions


def against_labels(model: torch.nn.Module, frames: list[Atoms]) -> dict[str, float]:
    """MAE of forces (meV/A) and of energies (meV per atom) on frames of one molecule: `energy`
    with the mean error taken out, `energy_absolute` as it is.
    """
    found = predictions(model, frames)
    energy = 1e3 * (found.energy - found.energy_reference) / found.atoms
    return {
        "forces": 1e3 * float(np.abs(found.forces - found.forces_reference).mean()),
        "energy": float(np.abs(energy - energy.mean()).mean()),
        "energy_absolute": float(np.abs(energy).mean()),
    }
