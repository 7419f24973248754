"""The frames that a model is asked about where training says nothing: molecules, pairs, walls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import ase.build
import numpy as np
from ase import Atoms
from ase.collections import g2
from ase.data import covalent_radii

RATTLES = {"mild": 0.06, "strong": 0.2}  # standard deviation of each coordinate, A
COLLISION = 0.6  # sums of covalent radii
DISTANCES = np.round(np.arange(3.0, 0.45, -0.1), 1)  # of dimers, A: from far to near
SCALES = (1.0, 0.92, 0.85, 0.78, 0.7)  # of all distances in a compressed frame
DENSE = 130.0  # A^3 per atom: a periodic frame with more is a molecule in a box


@dataclass
class Scan:
    """Frames on a path along which atoms approach each other, from far to near."""

    name: str
    frames: list[Atoms]


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
    """In sums of covalent radii, (n_atoms, n_atoms), to the nearest image in periodic directions;
    an atom is infinitely far from itself.
    """
    radii = covalent_radii[atoms.numbers]
    distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
    distances = distances / (radii[:, None] + radii[None, :])
    np.fill_diagonal(distances, np.inf)
    return np.asarray(distances)


def dimer(a: int, b: int) -> Scan:
    """Two elements at DISTANCES."""
    frames = [Atoms([a, b], [[0, 0, 0], [d, 0, 0]]) for d in DISTANCES]
    return Scan(str(frames[0].symbols), frames)


def pairs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Each two elements, like pairs included."""
    return list(itertools.combinations_with_replacement(sorted(set(numbers)), 2))


def dimers(numbers: Iterable[int]) -> list[Scan]:
    """Each pair of elements, like pairs included, at DISTANCES."""
    return [dimer(a, b) for a, b in pairs(numbers)]


def compressed(frames: list[Atoms]) -> list[Scan]:
    """Each frame with all its distances scaled by SCALES."""
    return [
        Scan(f"{frame.symbols} {i}", [scaled(frame, scale) for scale in SCALES])
        for i, frame in enumerate(frames)
    ]


def scaled(frame: Atoms, scale: float) -> Atoms:
    """Elements, positions and, where it is dense, cell of a frame, all distances scaled."""
    atoms = Atoms(frame.numbers, frame.positions * scale)
    if is_dense(frame):
        atoms.set_cell(frame.cell * scale)
        atoms.set_pbc(frame.pbc)
    return atoms


def is_dense(frame: Atoms) -> bool:
    """Whether a frame is periodic and no molecule in a box."""
    return bool(frame.pbc.any() and 0 < frame.cell.volume < DENSE * len(frame))
