"""Errors of a model on labelled frames: energies, forces and stress, by group and by element."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import torch
from ase.data import chemical_symbols
from ase.stress import voigt_6_to_full_3x3_stress

from mace_lora.errors import DataError
from mace_lora.upstream import predicting

KEYS = {"energy": "REF_energy", "forces": "REF_forces", "stress": "REF_stress"}
UNITS = {"energy": "meV/atom", "forces": "meV/Å", "stress": "meV/Å³"}
NO_GROUP = "none"
# meV per atom: no model is that wrong on the energies that it was trained for; it has other E0s
FAR = 1000.0


@dataclass(frozen=True)
class Values:
    """Labels or predictions; NaN where a frame has no label.

    Attributes:
        energy: (n_frames,), eV per atom.
        forces: (n_atoms, 3), eV/A, the atoms of all frames one after the other.
        stress: (n_frames, 3, 3), eV/A^3.
    """

    energy: np.ndarray
    forces: np.ndarray
    stress: np.ndarray


@dataclass(frozen=True)
class Frames:
    """Labelled frames.

    Attributes:
        name: of the file.
        atoms: the frames.
        labels: what a model should predict for them.
        numbers: (n_atoms,), atomic numbers.
        groups: (n_frames,), the configuration type of each frame.
    """

    name: str
    atoms: list[ase.Atoms]
    labels: Values
    numbers: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Errors:
    """Errors over part of the frames.

    Attributes:
        part: "all", "group" or "element".
        name: of the group or element.
        count: of frames; of atoms for an element.
        mae, rmse: by quantity, in UNITS; a quantity without labels is missing.
    """

    part: str
    name: str
    count: int
    mae: dict[str, float]
    rmse: dict[str, float]


def read_frames(
    path: str | Path,
    keys: dict[str, str] | None = None,
    group_by: str = "config_type",
    most: int | None = None,
) -> Frames:
    """Frames of an extended-xyz file (or whatever ASE reads) with their labels.

    Args:
        path: the file.
        keys: names of energy, forces and stress in it, where they aren't mace-torch's.
        group_by: the key in `atoms.info` that groups frames.
        most: read no more frames than this.

    Raises:
        DataError: no such file, not readable, empty, or without energies and forces.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        atoms = ase.io.read(path, index=":" if most is None else f":{most}")
    except Exception as error:  # ASE raises many kinds for a broken file
        raise DataError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    if not atoms:
        raise DataError(f"{path} holds no frames")
    return frames_of(atoms, str(path), keys, group_by)


def frames_of(
    atoms: list[ase.Atoms],
    path: str,
    keys: dict[str, str] | None = None,
    group_by: str = "config_type",
) -> Frames:
    """As `read_frames`, of frames that are read already; `path` is for messages."""
    keys = {**KEYS, **(keys or {})}
    labels = Values(
        np.array([_label(a, keys["energy"], ()) / len(a) for a in atoms]),
        np.concatenate([_label(a, keys["forces"], (len(a), 3)) for a in atoms]),
        np.array([_label(a, keys["stress"], (3, 3)) for a in atoms]),
    )
    if np.isnan(labels.energy).all() and np.isnan(labels.forces).all():
        found = sorted({*atoms[0].info, *atoms[0].arrays} - {"numbers", "positions"})
        raise DataError(
            f"{path} has no energies under {keys['energy']!r} and no forces under "
            f"{keys['forces']!r}; its keys are {', '.join(found)}: name them with --energy_key "
            "and --forces_key"
        )
    groups = np.array([str(a.info.get(group_by, NO_GROUP)) for a in atoms])
    numbers = np.concatenate([a.numbers for a in atoms])
    return Frames(Path(path).name, atoms, labels, numbers, groups)


def _label(atoms: ase.Atoms, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The label under `key`; ASE keeps those called energy, forces and stress in a calculator."""
    value = atoms.info.get(key, atoms.arrays.get(key))
    if value is None and atoms.calc is not None:
        value = atoms.calc.results.get(key)
    if value is None:
        return np.full(shape, np.nan)
    value = np.asarray(value, dtype=float)
    if shape == (3, 3) and value.shape == (6,):
        return voigt_6_to_full_3x3_stress(value)
    if value.size != int(np.prod(shape)):
        raise DataError(f"a label {key!r} has shape {value.shape}, expected {shape}")
    return value.reshape(shape)


def known_to(frames: Frames, known: Iterable[set[int]]) -> tuple[Frames, str]:
    """The frames whose elements all of several models know, and a word about the others.

    Args:
        frames: to choose from.
        known: the atomic numbers of each model.

    Raises:
        DataError: none is left.
    """
    common = set.intersection(*known)
    keep = np.array([common.issuperset(a.numbers.tolist()) for a in frames.atoms])
    if keep.all():
        return frames, ""
    lacking = [chemical_symbols[z] for z in sorted({int(z) for z in frames.numbers} - common)]
    said = (
        f"{int((~keep).sum())} of {len(keep)} frames of {frames.name} are left out: "
        f"not every model knows {', '.join(lacking)}"
    )
    if not keep.any():
        raise DataError(said)
    of_atoms = np.repeat(keep, [len(a) for a in frames.atoms])
    labels = frames.labels
    kept = Frames(
        frames.name,
        [a for a, k in zip(frames.atoms, keep, strict=True) if k],
        Values(labels.energy[keep], labels.forces[of_atoms], labels.stress[keep]),
        frames.numbers[of_atoms],
        frames.groups[keep],
    )
    return kept, said


def predict(
    model: torch.nn.Module, frames: Frames, batch_size: int = 16, head: str | None = None
) -> Values:
    """What `model` predicts for `frames`, whose elements it must know; stress where labelled.

    Raises:
        DataError: no energies and forces come out of this kind of model.
    """
    want_stress = bool(np.isfinite(frames.labels.stress).any())
    batches = (
        predicting.frames_to_batch(frames.atoms[i : i + batch_size], model, head=head)
        for i in range(0, len(frames.atoms), batch_size)
    )
    found = predicting.predict(model, batches, compute_stress=want_stress)
    if "energy" not in found or "forces" not in found:
        raise DataError(f"a {type(model).__name__} predicts no energies and forces to compare")
    sizes = np.array([len(a) for a in frames.atoms])
    stress = np.full((len(sizes), 3, 3), np.nan)
    if want_stress and "stress" in found:
        stress = found["stress"].cpu().double().numpy()
    energy = found["energy"].cpu().double().numpy() / sizes
    return Values(energy, found["forces"].cpu().double().numpy(), stress)


def with_fitted_e0s(frames: Frames, predicted: Values) -> Values:
    """`predicted` with energies shifted by one number per element, the best fit to the labels.

    For labels of another method than the model's, which count energies from other E0s.
    """
    known = np.isfinite(frames.labels.energy)
    if not known.any():
        return predicted
    elements = sorted(set(frames.numbers))
    shares = np.array([[np.mean(a.numbers == z) for z in elements] for a in frames.atoms])
    left = (frames.labels.energy - predicted.energy)[known]
    shifts = np.linalg.lstsq(shares[known], left, rcond=None)[0]
    return replace(predicted, energy=predicted.energy + shares @ shifts)


def errors(frames: Frames, predicted: Values) -> list[Errors]:
    """Over all frames, per group where there are several, and per element (forces alone)."""
    everything = np.ones(len(frames.atoms), dtype=bool)
    rows = [_errors(frames, predicted, "all", "all", everything)]
    groups = sorted(set(frames.groups))
    if len(groups) > 1:
        rows += [_errors(frames, predicted, "group", g, frames.groups == g) for g in groups]
    for z in sorted(set(frames.numbers)):
        mine = frames.numbers == z
        difference = predicted.forces[mine] - frames.labels.forces[mine]
        mae, rmse = _statistics({"forces": difference})
        rows.append(Errors("element", chemical_symbols[z], int(mine.sum()), mae, rmse))
    return rows


def _errors(frames: Frames, predicted: Values, part: str, name: str, mine: np.ndarray) -> Errors:
    of_atoms = np.repeat(mine, [len(a) for a in frames.atoms])
    mae, rmse = _statistics(
        {
            "energy": (predicted.energy - frames.labels.energy)[mine],
            "forces": (predicted.forces - frames.labels.forces)[of_atoms],
            "stress": (predicted.stress - frames.labels.stress)[mine],
        }
    )
    return Errors(part, name, int(mine.sum()), mae, rmse)


def _statistics(
    differences: dict[str, np.ndarray],
) -> tuple[dict[str, float], dict[str, float]]:
    """MAE and RMSE by quantity, in UNITS, over what is labelled."""
    mae, rmse = {}, {}
    for quantity, values in differences.items():
        values = 1e3 * values[np.isfinite(values)]
        if values.size:
            mae[quantity] = float(np.abs(values).mean())
            rmse[quantity] = float(np.sqrt((values**2).mean()))
    return mae, rmse


def as_json(rows: Sequence[Errors]) -> list[dict[str, Any]]:
    """Plain data, with the units in the keys' place: see UNITS."""
    return [vars(row) for row in rows]
