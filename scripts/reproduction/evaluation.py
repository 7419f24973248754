"""Errors of saved models: on test frames, and on what a foundation model knew before."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms

from mace_lora import load_foundation
from mace_lora.trust.measures import atoms_apart
from mace_lora.upstream.predicting import frames_to_batch, predict

HOLDOUT = Path(str(resources.files("mace_lora") / "data" / "mini_holdout.xyz"))
BATCH = 25


@dataclass(frozen=True)
class Predictions:
    """Labels and predictions: energies in eV, (n_frames,); forces in eV/A, (n_atoms, 3)."""

    atoms: np.ndarray
    energy_reference: np.ndarray
    energy: np.ndarray
    forces_reference: np.ndarray
    forces: np.ndarray

    def errors(self) -> dict[str, float]:
        """MAE and RMSE of total energy (meV), of energy per atom (meV) and of forces (meV/A)."""
        found: dict[str, float] = {}
        energy = 1e3 * (self.energy - self.energy_reference)
        for name, values in (
            ("energy", energy),
            ("energy_per_atom", energy / self.atoms),
            ("forces", 1e3 * (self.forces - self.forces_reference)),
        ):
            found[f"{name}_mae"] = float(np.abs(values).mean())
            found[f"{name}_rmse"] = float(np.sqrt((values**2).mean()))
        return found


def load_model(path: Path) -> torch.nn.Module:
    """A saved model, in float64: in float32 a total energy of 1e4 eV has steps of 1 meV."""
    return torch.load(path, weights_only=False, map_location="cpu").to(torch.float64)


def predictions(model: torch.nn.Module, frames: list[Atoms]) -> Predictions:
    """Predictions of `model` for labelled frames (REF_energy, REF_forces)."""
    parts: dict[str, list[np.ndarray]] = {k: [] for k in Predictions.__dataclass_fields__}
    for start in range(0, len(frames), BATCH):
        batch = frames_to_batch(frames[start : start + BATCH], model)
        found = predict(model, [batch])
        values = {
            "atoms": batch.ptr[1:] - batch.ptr[:-1],
            "energy_reference": batch.energy,
            "energy": found["energy"],
            "forces_reference": batch.forces,
            "forces": found["forces"],
        }
        for key, value in values.items():
            parts[key].append(value.cpu().numpy())
    return Predictions(**{key: np.concatenate(value) for key, value in parts.items()})


def forgetting(model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """Errors before and after fine-tuning `mini` on its own kind of data, those held out from it.

    Frames of elements that the fine-tuned model knows, labels of GFN2-xTB. Fine-tuning changes the
    E0s, so energies are compared without them; they count per atom.
    """
    known = {int(z) for z in model.atomic_numbers}
    frames = [f for f in ase.io.read(HOLDOUT, index=":") if set(f.numbers) <= known]
    before = load_foundation("mini", dtype=torch.float64)
    labels = _interaction(predictions(before, frames).energy_reference, frames, before)
    found = {}
    for name, m in (("before", before), ("after", model)):
        p = predictions(m, frames)
        energy = (_interaction(p.energy, frames, m) - labels) / p.atoms
        found[name] = {
            "energy_per_atom_mae": float(1e3 * np.abs(energy).mean()),
            "forces_mae": p.errors()["forces_mae"],
            "frames": len(frames),
        }
    return found


def _interaction(energy: np.ndarray, frames: list[Atoms], model: torch.nn.Module) -> np.ndarray:
    """Energies (eV) without the E0s of `model`."""
    return energy - atoms_apart(model, frames)
