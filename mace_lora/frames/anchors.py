"""Unlabelled frames where training says nothing, and where a model must still behave: atoms close
to each other, and frames of the training set compressed, stretched or shaken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import ase
import numpy as np

# Of pairs, A: the wall is dense, since a model that is held at distances of 0.1 A keeps the start's
# forces there and may have a hole between two of them
WALL = np.arange(0.45, 1.0, 0.025)
BONDS = np.arange(1.0, 3.0, 0.1)
MOST_PAIRS = 4000
# Of all distances in a compressed or stretched frame, and standard deviation of displacements (A)
SCALES = (0.7, 1.15)
RATTLES = (0.03, 0.3)
PIECE = 200  # atoms: of larger frames a piece says as much


def pairs(numbers: Iterable[int], without: Iterable[int] = (), seed: int = 0) -> list[ase.Atoms]:
    """Two atoms at distances from contact to bonds long broken, of each two elements.

    Args:
        numbers: atomic numbers.
        without: pairs of these alone are left out.
        seed: chooses MOST_PAIRS where there would be more.
    """
    left_out = set(without)
    every = itertools.combinations_with_replacement(sorted(set(numbers)), 2)
    kinds = [pair for pair in every if not set(pair) <= left_out]
    found = [(a, b, d) for a, b in kinds for d in np.concatenate([WALL, BONDS])]
    if len(found) > MOST_PAIRS:
        chosen = np.random.default_rng(seed).choice(len(found), MOST_PAIRS, replace=False)
        found = [found[i] for i in sorted(chosen)]
    return [ase.Atoms([a, b], [[0, 0, 0], [d, 0, 0]]) for a, b, d in found]


def distorted(
    frames: Sequence[ase.Atoms], n: int, seed: int = 0
) -> tuple[list[ase.Atoms], list[int]]:
    """Frames with all distances scaled and all atoms displaced, both at random; of large ones the
    PIECE atoms around one of them.

    Returns:
        `n` frames, each with the number of the one that it was made of.
    """
    rng = np.random.default_rng(seed)
    made, sources = [], []
    for _ in range(n):
        i = int(rng.integers(len(frames)))
        atoms, scale = _piece(frames[i], rng), rng.uniform(*SCALES)
        atoms.set_cell(atoms.cell * scale)
        atoms.positions *= scale
        atoms.positions += rng.uniform(*RATTLES) * scale * rng.normal(size=(len(atoms), 3))
        made.append(atoms)
        sources.append(i)
    return made, sources


def _piece(frame: ase.Atoms, rng: np.random.Generator) -> ase.Atoms:
    if len(frame) <= PIECE:
        whole: ase.Atoms = frame.copy()
        return whole
    centre = int(rng.integers(len(frame)))
    everything = list(range(len(frame)))
    vectors = frame.get_distances(centre, everything, mic=frame.pbc.any(), vector=True)
    nearest = np.argsort((vectors**2).sum(axis=1), kind="stable")[:PIECE]
    return ase.Atoms(frame.numbers[nearest], vectors[nearest])
