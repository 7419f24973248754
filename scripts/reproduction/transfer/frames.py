"""The frames that a fine-tuned model is asked about: ASE's molecules, or test sets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import ase.build
import numpy as np
from ase import Atoms
from ase.collections import g2
from ase.data import covalent_radii

RATTLES = {"mild": 0.06, "strong": 0.2}  # standard deviation of each coordinate, A
COLLISION = 0.6  # sums of covalent radii
DISTANCES = np.round(np.arange(3.0, 0.45, -0.1), 1)  # of dimers, A: from far to near
SCALES = (1.0, 0.92, 0.85, 0.78, 0.7)  # of all distances in a compressed frame


@dataclass
class Scan:
    """Frames on a path along which atoms approach each other, from far to near."""

    name: str
    frames: list[Atoms]


@dataclass
class Questions:
    """Everything that one model is asked. Labels are REF_energy (eV) and REF_forces (eV/A)."""

    valid: list[Atoms]
    target: list[Atoms]
    others: dict[str, list[Atoms]]
    broad: dict[str, list[Atoms]]
    dimers: list[Scan]
    compressed: list[Scan]
    notes: list[str] = field(default_factory=list)


def molecules(numbers: Iterable[int], rattle: float, seed: int = 1) -> list[Atoms]:
    """The G2 molecules of these elements with more than two atoms, displaced at random by `rattle`
    (A). The displacements of a molecule do not depend on which other elements are known; those
    that make atoms collide are left out, for walls are another question and would drown this one.
    """
    known = set(numbers)
    found = []
    for i, name in enumerate(g2.names):
        atoms = ase.build.molecule(name)
        if len(atoms) > 2 and set(atoms.numbers) <= known:
            rng = np.random.default_rng((seed, i))
            positions = atoms.positions + rattle * rng.normal(size=atoms.positions.shape)
            displaced = Atoms(atoms.numbers, positions)
            if relative_distances(displaced).min() > COLLISION:
                found.append(displaced)
    return found


def relative_distances(atoms: Atoms) -> np.ndarray:
    """In sums of covalent radii, (n_atoms, n_atoms); an atom is infinitely far from itself."""
    radii = covalent_radii[atoms.numbers]
    distances = atoms.get_all_distances() / (radii[:, None] + radii[None, :])
    np.fill_diagonal(distances, np.inf)
    return distances


def dimers(numbers: Iterable[int]) -> list[Scan]:
    """Each pair of elements, like pairs included, at DISTANCES."""
    order = sorted(set(numbers))
    return [
        Scan(
            str(Atoms([a, b]).symbols),
            [Atoms([a, b], [[0, 0, 0], [d, 0, 0]]) for d in DISTANCES],
        )
        for i, a in enumerate(order)
        for b in order[i:]
    ]


def compressed(frames: list[Atoms]) -> list[Scan]:
    """Each frame with all its distances scaled by SCALES."""
    return [
        Scan(
            f"{frame.symbols} {i}",
            [Atoms(frame.numbers, frame.positions * scale) for scale in SCALES],
        )
        for i, frame in enumerate(frames)
    ]


def askable(
    sets: dict[str, list[Atoms]], numbers: Iterable[int]
) -> tuple[dict[str, list[Atoms]], list[str]]:
    """The sets whose elements a model knows, and a note on each of the rest."""
    known = set(numbers)
    fit = {name: frames for name, frames in sets.items() if _elements(frames) <= known}
    notes = []
    for name, frames in sets.items():
        if name not in fit:
            foreign = Atoms(sorted(_elements(frames) - known)).get_chemical_symbols()
            notes.append(f"{name} is left out: the model doesn't know {', '.join(foreign)}")
    return fit, notes


def _elements(frames: list[Atoms]) -> set[int]:
    return {int(z) for frame in frames for z in frame.numbers}
