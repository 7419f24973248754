"""The frames that a fine-tuned model is asked about in a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ase import Atoms

from mace_lora.trust.frames import Scan


@dataclass
class Questions:
    """Everything that one model is asked. Labels are REF_energy (eV) and REF_forces (eV/A)."""

    valid: list[Atoms]
    target: list[Atoms]
    others: dict[str, list[Atoms]]
    broad: dict[str, list[Atoms]]
    dimers: list[Scan]  # of the elements of the training frames
    foreign: list[Scan]  # with one or two other elements of the foundation model
    compressed: list[Scan]
    notes: list[str] = field(default_factory=list)


def askable(
    sets: dict[str, list[Atoms]], numbers: Iterable[int]
) -> tuple[dict[str, list[Atoms]], list[str]]:
    """The sets whose elements a model knows, and a note on each of the rest."""
    known = set(numbers)
    fit = {name: frames for name, frames in sets.items() if elements(frames) <= known}
    notes = []
    for name, frames in sets.items():
        if name not in fit:
            foreign = Atoms(sorted(elements(frames) - known)).get_chemical_symbols()
            notes.append(f"{name} is left out: the model doesn't know {', '.join(foreign)}")
    return fit, notes


def elements(frames: list[Atoms]) -> set[int]:
    return {int(z) for frame in frames for z in frame.numbers}
