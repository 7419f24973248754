"""E0s where the compositions of the training frames leave some of them open.

Frames of one molecule determine one number: the sum of E0s over its atoms. Least squares then
spreads the offset of the labels over all elements, and H may get hundreds of eV. Here what is left
open follows isolated atoms of a known theory, the one that comes nearest to the labels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

LARGE = 2.0  # eV per atom: so far from the labels, a theory says little about what is open

E0s = Mapping[int, float]


@dataclass(frozen=True)
class Choice:
    """E0s by atomic number in eV, and how they came about.

    Attributes:
        e0s: of all elements asked for.
        determined: so many of them the frames determine, counted as independent directions.
        theory: whose isolated atoms the others follow; "" where nothing is left open.
        distance: of its energies from the labels, eV per atom.
        followed: elements in no frame that have the energies of its isolated atoms.
        foreign: elements in no frame that it does not know, and which stay as they were.
    """

    e0s: dict[int, float]
    determined: int
    theory: str = ""
    distance: float = 0.0
    followed: list[int] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)


def known_theories() -> dict[str, dict[int, float]]:
    """Isolated atoms by theory: eV by atomic number, from `data/isolated_atoms.json`."""
    text = resources.files("mace_lora").joinpath("data", "isolated_atoms.json").read_text("utf-8")
    return {
        name: {atomic_numbers[symbol]: energy for symbol, energy in table["eV"].items()}
        for name, table in json.loads(text).items()
    }


def settle(
    fitted: E0s, foundation: E0s, frames: Iterable[np.ndarray], kept: Iterable[int] = ()
) -> Choice:
    """E0s that fit the frames as well as `fitted` does, and are nearest to those of real atoms.

    Args:
        fitted: least-squares E0s, one solution of several where the frames leave some open.
        foundation: of the foundation model; its theory may be that of the labels.
        frames: atomic numbers of each frame with an energy, (n_atoms,).
        kept: elements that the run has, whether or not a frame holds them.

    The theory is taken whose energies are nearest to the labels. Its E0s change by the same for
    every element, and beyond that by as little as fits the frames, in the sense of least squares.
    Elements in no frame have those of its isolated atoms; where it does not know them, or where the
    frames determine all, they keep their value.
    """
    compositions = [np.unique(f, return_counts=True) for f in frames]
    present = sorted({int(z) for zs, _ in compositions for z in zs} & fitted.keys())
    counts = np.zeros((len(compositions), len(present)))
    for row, (zs, n) in zip(counts, compositions, strict=True):
        for z, k in zip(zs, n, strict=True):
            row[present.index(int(z))] = k
    counts = np.unique(counts, axis=0)
    rank = int(np.linalg.matrix_rank(counts)) if present else 0
    if rank == len(present):
        return Choice(dict(fitted), rank)
    solution = np.array([fitted[z] for z in present])
    atoms = counts.sum(axis=1)
    best = None
    for name, table in {"the foundation model": foundation, **known_theories()}.items():
        if not set(present) <= table.keys():
            continue
        change = solution - np.array([table[z] for z in present])
        distance = float(np.abs(counts @ change / atoms).mean())
        if best is None or distance < best[1]:
            same = (counts @ change) @ atoms / (atoms @ atoms)  # for every element
            # beyond that the part of the change that the compositions see, and nothing of the rest
            seen = np.linalg.pinv(counts) @ counts @ (change - same)
            best = name, distance, solution - change + same + seen
    if best is None:
        return Choice(dict(fitted), rank)
    name, distance, energies = best
    found = {**fitted, **dict(zip(present, energies.tolist(), strict=True))}
    theory = known_theories().get(name)
    if theory is None:  # the foundation model: they have its E0s
        return Choice(found, rank, name, distance)
    absent = sorted({*fitted, *kept} - set(present))
    followed = [z for z in absent if z in theory]
    found |= {z: theory[z] for z in followed}
    foreign = [z for z in absent if z not in theory]
    return Choice(found, rank, name, distance, followed, foreign)


def tell(choice: Choice, frames: Iterable[np.ndarray]) -> None:
    """Log what was left open, what it follows, and how far that is from the labels."""
    if not choice.theory:
        return
    elements = sorted({int(z) for f in frames for z in f})
    shown = ", ".join(f"{chemical_symbols[z]} {choice.e0s[z]:.2f}" for z in elements)
    text = (
        f"The frames determine {choice.determined} of {len(elements)} E0s; what they leave open "
        f"follows isolated atoms of {choice.theory}, {choice.distance:.2f} eV per atom from the "
        f"labels: {shown} eV. Energies of other compositions are as uncertain; --E0s takes those "
        "of real atoms"
    )
    if choice.followed:
        shown = ", ".join(f"{chemical_symbols[z]} {choice.e0s[z]:.2f}" for z in choice.followed)
        text += f". Elements in no frame have those of its isolated atoms: {shown} eV"
    if choice.foreign:
        shown = ", ".join(chemical_symbols[z] for z in choice.foreign)
        text += f". It has none of {shown}, in no frame either, which keep the foundation model's"
    (logging.warning if choice.distance > LARGE else logging.info)(text)
