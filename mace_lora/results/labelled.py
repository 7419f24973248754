"""Labelled frames that a model's predictions are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import ase
import numpy as np
from ase.data import chemical_symbols

from mace_lora.errors import DataError
from mace_lora.frames import keys
from mace_lora.frames.inputs import InputCheck
from mace_lora.frames.keys import DEFAULTS
from mace_lora.frames.labels import labels as labels_in
from mace_lora.frames.labels import type_of, under
from mace_lora.frames.reading import read_atoms
from mace_lora.upstream.graphs import has_volume
from mace_lora.upstream.inputs import Input

Array: TypeAlias = np.ndarray

QUANTITIES = ("energy", "forces", "stress")
NO_GROUP = "none"


@dataclass(frozen=True)
class Values:
    """Labels or predictions; NaN where a frame has no label.

    Attributes:
        energy: (n_frames,), eV per atom.
        forces: (n_atoms, 3), eV/A, the atoms of all frames one after the other.
        stress: (n_frames, 3, 3), eV/A^3.
    """

    energy: Array
    forces: Array
    stress: Array


@dataclass(frozen=True)
class LabelledFrames:
    """Frames with what a model should predict for them.

    Attributes:
        name: of the file.
        atoms: the frames.
        labels: of all frames.
        numbers: (n_atoms,), atomic numbers.
        groups: (n_frames,), the configuration type of each frame.
        keys: the names of labels and of inputs of a model (the total charge, ...) in the file.
        said: what was taken without being asked for; a sentence each.
    """

    name: str
    atoms: list[ase.Atoms]
    labels: Values
    numbers: Array
    groups: Array
    keys: Mapping[str, str] = field(default_factory=lambda: DEFAULTS)
    said: tuple[str, ...] = ()


def read_frames(
    path: str | Path,
    asked: Mapping[str, str] | None = None,
    group_by: str = "config_type",
    most: int | None = None,
    factors: Mapping[str, float] | None = None,
) -> LabelledFrames:
    """Frames of an extended-xyz file (or whatever ASE reads) with their labels.

    Args:
        path: the file.
        asked: names of labels and inputs in it, where they aren't mace-torch's.
        group_by: the key in `atoms.info` that groups frames.
        most: read no more frames than this.
        factors: by label, what turns its unit in the file into ours; see `frames/units.py`.

    Raises:
        DataError: no such file, not readable, empty, or without energies and forces.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file")
    atoms = read_atoms(path, most)
    if not atoms:
        raise DataError(f"{path} holds no frames")
    return frames_of(atoms, str(path), asked, group_by, factors)


def frames_of(
    atoms: list[ase.Atoms],
    path: str,
    asked: Mapping[str, str] | None = None,
    group_by: str = "config_type",
    factors: Mapping[str, float] | None = None,
) -> LabelledFrames:
    """As `read_frames`, of frames that are read already; `path` is for messages."""
    found = keys.find(path, atoms, {**DEFAULTS, **(asked or {})})
    labels, said = _labels(path, atoms, found.names, factors)
    if np.isnan(labels.energy).all() and np.isnan(labels.forces).all():
        lacking = {label: found.names[label] for label in ("energy", "forces")}
        raise DataError(
            f"{path} has no energies under {lacking['energy']!r} and no forces under "
            f"{lacking['forces']!r}: {keys.remedy(atoms, lacking)}"
        )
    return LabelledFrames(
        Path(path).name,
        atoms,
        labels,
        np.concatenate([a.numbers for a in atoms]),
        np.array([type_of(a.info.get(group_by, NO_GROUP)) for a in atoms]),
        found.names,
        (*found.said, *said),
    )


def _labels(
    path: str,
    atoms: list[ase.Atoms],
    names: Mapping[str, str],
    factors: Mapping[str, float] | None = None,
) -> tuple[Values, list[str]]:
    """Labels, NaN where a frame has none; and a word about stresses that are left out."""
    rows, left_out = [], 0
    for i, frame in enumerate(atoms):
        try:
            found = labels_in(
                frame, {quantity: names[quantity] for quantity in QUANTITIES}, factors
            )
        except DataError as error:
            raise DataError(f"{path}, frame {i}: {error}") from None
        stress = found.get("stress", np.full((3, 3), np.nan))
        if "stress" in found and not _has_a_stress(frame, stress):
            stress, left_out = np.full((3, 3), np.nan), left_out + 1
        energy = found.get("energy", np.array(np.nan)) / max(len(frame), 1)
        rows.append((energy, found.get("forces", np.full((len(frame), 3), np.nan)), stress))
    energies, forces, stresses = zip(*rows, strict=True)
    values = Values(np.array(energies), np.concatenate(forces), np.array(stresses))
    said = f"{path}: {left_out} frames have a stress and no volume: it is left out"
    return values, [said] if left_out else []


def _has_a_stress(frame: ase.Atoms, stress: Array) -> bool:
    """Not without a volume; and a molecule whose stress is exactly 0 has a placeholder."""
    return has_volume(frame.cell.array) and bool(frame.pbc.any() or stress.any())


def with_inputs(frames: LabelledFrames, inputs: Mapping[str, Input]) -> LabelledFrames:
    """`frames` with the names of what models read beside atoms and cell.

    Args:
        frames: of a file.
        inputs: those of all models that are to predict, by name.

    Raises:
        DataError: a value is missing or makes no sense, or it can't be told where it stands.
    """
    found = keys.find(frames.name, frames.atoms, frames.keys, wanted=(), inputs=inputs)
    check = InputCheck(frames.name, inputs, found.names)
    for i, atoms in enumerate(frames.atoms):
        values = {name: under(atoms, found.names[name]) for name in inputs}
        check.see(str(i), len(atoms), values)
    return replace(frames, keys=found.names, said=(*frames.said, *found.said, *check.gaps()))


def without_stress_of_slabs(frames: LabelledFrames) -> LabelledFrames:
    """`frames` without stresses where they aren't periodic in three directions.

    mace-torch gives models with long-range parts another cell there, by whose volume they divide.
    """
    periodic = np.array([a.pbc.all() for a in frames.atoms])
    left_out = ~periodic & np.isfinite(frames.labels.stress).any(axis=(1, 2))
    if not left_out.any():
        return frames
    stress = np.where(periodic[:, None, None], frames.labels.stress, np.nan)
    said = (
        f"{frames.name}: the stress of {int(left_out.sum())} frames is left out, since they are "
        "not periodic in three directions and the model is long-ranged"
    )
    labels = replace(frames.labels, stress=stress)
    return replace(frames, labels=labels, said=(*frames.said, said))


def known_to(frames: LabelledFrames, known: Iterable[set[int]]) -> tuple[LabelledFrames, str]:
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
    kept = replace(
        frames,
        atoms=[a for a, k in zip(frames.atoms, keep, strict=True) if k],
        labels=Values(labels.energy[keep], labels.forces[of_atoms], labels.stress[keep]),
        numbers=frames.numbers[of_atoms],
        groups=frames.groups[keep],
    )
    return kept, said
