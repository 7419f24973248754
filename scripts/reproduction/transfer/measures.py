"""Errors of a model against labels, and against the model that it was trained from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms

from mace_lora.model.description import atomic_numbers
from mace_lora.upstream.predicting import frames_to_batch, predict
from reproduction.evaluation import predictions
from reproduction.transfer.frames import Scan

BATCH = 64
# A step of a scan counts as repulsive where the start's energy rises by more than this (eV): the
# place of a minimum may move by a little without harm
RISE = 0.1

Numbers = dict[str, float]


@dataclass(frozen=True)
class Answers:
    """Energies without E0s, eV, (n_frames,), and forces, eV/A, (n_atoms, 3)."""

    energy: np.ndarray
    forces: np.ndarray


def answers(model: torch.nn.Module, frames: list[Atoms]) -> Answers:
    """What `model` says of unlabelled frames. Fine-tuning moves E0s, so they are taken off."""
    energy, forces = [], []
    for start in range(0, len(frames), BATCH):
        found = predict(model, [frames_to_batch(frames[start : start + BATCH], model)])
        energy.append(found["energy"].cpu().numpy())
        forces.append(found["forces"].cpu().numpy())
    total = np.concatenate(energy)
    return Answers(total - _atoms_apart(model, frames), np.concatenate(forces))


def _atoms_apart(model: torch.nn.Module, frames: list[Atoms]) -> np.ndarray:
    e0s = model.atomic_energies_fn.atomic_energies.reshape(-1).tolist()
    table = dict(zip(atomic_numbers(model), e0s, strict=True))
    return np.array([sum(table[int(z)] for z in frame.numbers) for frame in frames])


def against_labels(model: torch.nn.Module, frames: list[Atoms]) -> Numbers:
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


def against_start(model: Answers, start: Answers, frames: list[Atoms]) -> Numbers:
    """MAE of forces (meV/A) and of energies without E0s (meV per atom) against the start's own."""
    atoms = np.array([len(frame) for frame in frames])
    return {
        "forces": 1e3 * float(np.abs(model.forces - start.forces).mean()),
        "energy": 1e3 * float(np.abs((model.energy - start.energy) / atoms).mean()),
    }


def holes(model: np.ndarray, start: np.ndarray) -> bool:
    """Whether the energy (eV) falls in a step of a scan, (n_points,) from far to near, in which
    that of the start rises by more than RISE.
    """
    return bool(np.any((np.diff(start) > RISE) & ~(np.diff(model) >= 0)))


def wall(
    model: torch.nn.Module, start: torch.nn.Module, scans: list[Scan]
) -> dict[str, float | int | list[str]]:
    """Force error against the start, and the scans in which the model has a hole.

    `forces` is the mean in eV/A, which single pairs at 0.5 A decide, where an untouched model may
    have forces of 60,000 eV/A; `relative` the mean over atoms of |dF| / (1 eV/A + |F|).
    """
    frames = [frame for scan in scans for frame in scan.frames]
    mine, theirs = answers(model, frames), answers(start, frames)
    found, first = [], 0
    for scan in scans:
        part = slice(first, first + len(scan.frames))
        if holes(mine.energy[part], theirs.energy[part]):
            found.append(scan.name)
        first = part.stop
    error = 1e-3 * against_start(mine, theirs, frames)["forces"]
    difference = np.linalg.norm(mine.forces - theirs.forces, axis=1)
    relative = float((difference / (1.0 + np.linalg.norm(theirs.forces, axis=1))).mean())
    return {"forces": error, "relative": relative, "holes": len(found), "where": found}
