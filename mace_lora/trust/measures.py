"""What a model says of unlabelled frames, and how far that is from what its start says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms

from mace_lora.model.description import e0s
from mace_lora.trust.frames import Scan
from mace_lora.upstream.predicting import frames_to_batch, in_parts, predict

BATCH = 64  # frames at once, and
ATOMS = 2000  # atoms, of which a single frame may have more
# A step of a scan counts as repulsive where the start's energy rises by more than this (eV): the
# place of a minimum may move by a little without harm
RISE = 0.1
SMALL = 1.0  # eV/A: differences of forces below this are judged as they are, above it relatively


@dataclass(frozen=True)
class Answers:
    """Energies without E0s, eV, (n_frames,), and forces, eV/A, (n_atoms, 3)."""

    energy: np.ndarray
    forces: np.ndarray


def answers(model: torch.nn.Module, frames: list[Atoms], head: str | None = None) -> Answers:
    """What `model` says of unlabelled frames. Fine-tuning moves E0s, so they are taken off.

    Args:
        model: of mace.
        frames: of elements that it knows.
        head: of the model, the last one if None.
    """
    energy, forces = [], []
    for part in in_parts(frames, len, ATOMS, BATCH):
        found = predict(model, [frames_to_batch(part, model, head)])
        energy.append(found["energy"].cpu().numpy())
        forces.append(found["forces"].cpu().numpy())
    total = np.concatenate(energy)
    return Answers(total - atoms_apart(model, frames, head), np.concatenate(forces))


def atoms_apart(model: torch.nn.Module, frames: list[Atoms], head: str | None = None) -> np.ndarray:
    """The sum of the E0s of each frame, eV, (n_frames,); the arguments are those of `answers`."""
    table = e0s(model, head)
    return np.array([sum(table[int(z)] for z in frame.numbers) for frame in frames])


def against_start(model: Answers, start: Answers, frames: list[Atoms]) -> dict[str, float]:
    """MAE of forces (meV/A) and of energies without E0s (meV per atom) against the start's own."""
    atoms = np.array([len(frame) for frame in frames])
    return {
        "forces": 1e3 * float(np.abs(model.forces - start.forces).mean()),
        "energy": 1e3 * float(np.abs((model.energy - start.energy) / atoms).mean()),
    }


def relative(model: np.ndarray, start: np.ndarray) -> float:
    """Mean over atoms of |F - F_start| / (SMALL + |F_start|), of forces (n_atoms, 3) in eV/A.

    A plain mean would be decided by one pair at 0.5 A, where an untouched model's forces can be
    60,000 eV/A.
    """
    difference = np.linalg.norm(model - start, axis=1)
    return float((difference / (SMALL + np.linalg.norm(start, axis=1))).mean())


def holes(model: np.ndarray, start: np.ndarray, fall: float = 0.0) -> bool:
    """Whether the energy (eV) falls by more than `fall` in a step of a scan, (n_points,) from far
    to near, in which that of the start rises by more than RISE.
    """
    return bool(np.any((np.diff(start) > RISE) & ~(np.diff(model) >= -fall)))


def by_scan(found: Answers, scans: list[Scan]) -> list[Answers]:
    """The answers on all frames of `scans`, one after the other, scan by scan."""
    frames = np.cumsum([len(scan.frames) for scan in scans])[:-1]
    atoms = np.cumsum([sum(map(len, scan.frames)) for scan in scans])[:-1]
    parts = zip(np.split(found.energy, frames), np.split(found.forces, atoms), strict=True)
    return [Answers(energy, forces) for energy, forces in parts]


def wall(
    model: torch.nn.Module, start: torch.nn.Module, scans: list[Scan]
) -> dict[str, float | int | list[str]]:
    """Force error against the start, mean in eV/A and `relative`, and the scans in which the model
    has a hole.
    """
    frames = [frame for scan in scans for frame in scan.frames]
    mine, theirs = answers(model, frames), answers(start, frames)
    parts = zip(scans, by_scan(mine, scans), by_scan(theirs, scans), strict=True)
    found = [scan.name for scan, one, other in parts if holes(one.energy, other.energy)]
    error = 1e-3 * against_start(mine, theirs, frames)["forces"]
    return {
        "forces": error,
        "relative": relative(mine.forces, theirs.forces),
        "holes": len(found),
        "where": found,
    }
