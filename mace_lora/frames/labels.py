"""What a frame says of itself: its labels, its weights and its type, in one form each.

A label is the number that stands in the file. Constraints are not applied to it: mace-torch asks
ASE for forces, and so trains those of fixed atoms as zero. A label that a frame lacks is absent
from what is returned, never zero. README.md in this folder says what a file may hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import ase
import numpy as np
import numpy.typing as npt

from mace_lora.errors import DataError

Array: TypeAlias = npt.NDArray[np.float64]

# name of a label -> the key under which mace-torch looks for it
DEFAULT_KEYS = {
    "energy": "REF_energy",
    "forces": "REF_forces",
    "stress": "REF_stress",
    "virials": "REF_virials",
    "dipole": "dipole",
    "charges": "REF_charges",
    "polarizability": "polarizability",
}
DEFAULT_TYPE = "Default"
# Where the six numbers xx, yy, zz, yz, xz, xy stand in a matrix
_VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])
_MATRICES = ("stress", "virials", "polarizability")
_UNITS = {
    "energy": "eV",
    "forces": "eV/Å",
    "stress": "eV/Å^3",
    "virials": "eV",
    "dipole": "e Å",
    "charges": "e",
}


def labels(
    atoms: ase.Atoms, keys: Mapping[str, str], factors: Mapping[str, float] | None = None
) -> dict[str, Array]:
    """The labels of a frame; one that it lacks is missing.

    Args:
        atoms: as ASE has read it.
        keys: the name of each label in the file, as in DEFAULT_KEYS; of names that are no labels
            (the total charge, the head) no notice is taken.
        factors: by label, what turns the unit of the file into the one below; see `units`.

    Returns:
        energy of shape (), eV; forces (n_atoms, 3), eV/A; stress (3, 3), eV/A^3; virials (3, 3),
        eV; dipole (3,), e A; charges (n_atoms,), e; polarizability (3, 3).

    Raises:
        DataError: a label is a text, or of a wrong shape; the caller adds file and frame.
    """
    found = {}
    for name in DEFAULT_KEYS:
        value = under(atoms, keys[name]) if name in keys else None
        if value is not None:
            number = in_shape(name, value, len(atoms), f"{name} (key {keys[name]!r})")
            found[name] = number * factors[name] if factors and name in factors else number
    return found


def under(atoms: ase.Atoms, key: str) -> object | None:
    """Whatever stands under `key` in a frame, None for nothing.

    ASE keeps what is called energy, forces, stress, dipole, ... in a calculator, which gives them
    to those who ask with constraints applied; here they are as in the file.
    """
    results = getattr(atoms.calc, "results", {})
    for place in (results, atoms.info, atoms.arrays):
        value = place.get(key)
        if value is not None and not (isinstance(value, str) and value in ("", "None")):
            return value
    return None


def in_shape(name: str, value: object, n_atoms: int, called: str) -> Array:
    """A label as numbers, in the shape that `labels` promises.

    Raises:
        DataError: it can't be brought into it; the message begins with `called`.
    """
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        unit = f", in {_UNITS[name]}" if name in _UNITS else ""
        raise DataError(
            f"{called} holds {str(value)!r}, where plain numbers are needed{unit}"
        ) from None
    if name in _MATRICES and array.shape == (6,):
        matrix: Array = array[_VOIGT]
        return matrix
    shapes = _shapes(name, n_atoms)
    if array.shape in shapes:
        return array.reshape(shapes[0])
    expected = " or ".join(map(str, _allowed(name, n_atoms)))
    raise DataError(f"{called} of shape {array.shape}, expected {expected}")


def _allowed(name: str, n_atoms: int) -> list[tuple[int, ...]]:
    return [*_shapes(name, n_atoms), *([(6,)] if name in _MATRICES else [])]


def _shapes(name: str, n_atoms: int) -> list[tuple[int, ...]]:
    """The shape of a label, and others that hold the same numbers in the same order."""
    if name == "energy":
        return [(), (1,)]
    if name == "forces":
        return [(n_atoms, 3)]
    if name == "charges":
        return [(n_atoms,), (n_atoms, 1)]
    if name == "dipole":
        return [(3,), (1, 3)]
    return [(3, 3), (9,)]


def type_of(value: object) -> str:
    """A type of frames (`config_type`) as a text.

    ASE reads config_type=300 as a number and config_type=T as a truth value: they are given back as
    they stand in the file.
    """
    if isinstance(value, (bool, np.bool_)):
        return "T" if value else "F"
    if isinstance(value, np.ndarray):
        return " ".join(type_of(v) for v in value.ravel())
    return str(value)


def weight(atoms: ase.Atoms, key: str) -> float | Array:
    """The weight that stands under `key`, 1 where there is none; one of a dipole may be a vector.

    Raises:
        DataError: it is no finite number, or negative.
    """
    value = atoms.info.get(key)
    if value is None:
        return 1.0
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.array(np.nan)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise DataError(f"{key}={value}: a number, 0 or more, is needed")
    return numbers if numbers.ndim else float(numbers)
