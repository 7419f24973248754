"""Some labelled frames of a file beside what the base model predicts for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from mace_lora.frames.isolated_atoms import known_theories
from mace_lora.frames.reading import XyzFrames
from mace_lora.model.description import atomic_numbers, e0s, heads
from mace_lora.upstream.answers import Answers
from mace_lora.upstream.graphs import Configuration, has_volume, is_placeholder

Array: TypeAlias = npt.NDArray[np.float64]

_CHARGE = "total_charge"


@dataclass(frozen=True)
class Compared:
    """Labels and predictions of a sample; NaN where a frame lacks a label.

    Attributes:
        places: (n,), the frames' numbers in the file.
        kinds: (n,), what the file says that they are: head and type.
        elements: atomic numbers, those of the first columns of `counts`.
        sizes: (n,), atoms of each.
        counts: (n, k), atoms of each element, and the total charge where it differs.
        energy, predicted_energy: (n,), eV.
        forces, predicted_forces: (n_atoms, 3), eV/A, of all frames one after the other.
        stress, predicted_stress: (n, 3, 3), eV/A^3.
        virials, predicted_virials: (n, 3, 3), eV.
        apart: by theory (n,), the energy that a frame should have: isolated atoms of it, and the
            interaction that the base model predicts; theories that know all elements.
    """

    places: list[int]
    kinds: list[str]
    elements: list[int]
    sizes: npt.NDArray[np.int64]
    counts: Array
    energy: Array
    predicted_energy: Array
    forces: Array
    predicted_forces: Array
    stress: Array
    predicted_stress: Array
    virials: Array
    predicted_virials: Array
    apart: dict[str, Array]

    @property
    def frame_of(self) -> npt.NDArray[np.int64]:
        """(n_atoms,), the position in the sample of each atom's frame."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)


def sample(frames: Sequence[Configuration], most: int, atoms: int, least: int) -> list[int]:
    """Evenly spaced frames: at most `most`, with `atoms` in all or no fewer than `least` frames."""
    usable = [i for i, frame in enumerate(frames) if len(frame.atomic_numbers) > 1]
    if not usable:
        return []
    mean = sum(len(frames[i].atomic_numbers) for i in usable) / len(usable)
    n = min(len(usable), most, max(least, int(atoms / mean)))
    return [usable[i] for i in np.unique(np.linspace(0, len(usable) - 1, n).round().astype(int))]


def compare(
    file: XyzFrames,
    chosen: Iterable[int],
    model: torch.nn.Module,
    head: str | None = None,
    answers: Answers | None = None,
) -> Compared | None:
    """What `model` predicts for some frames of a file; None where it knows none of them.

    Args:
        file: the frames.
        chosen: which of them, as in `sample`.
        model: the base model.
        head: of it; the default one, or the last, if None or unknown.
        answers: what it has predicted so far.
    """
    known, own = set(atomic_numbers(model)), heads(model)
    default = next((name for name in own if name.lower() == "default"), own[-1])
    head = head if head in own else default
    kept = [i for i in chosen if known.issuperset(file.configurations[i].atomic_numbers.tolist())]
    if not kept:
        return None
    frames = [replace(file.configurations[i], head=head) for i in kept]  # type: ignore[type-var]
    wants_stress = any(_label(f, name) is not None for f in frames for name in _MATRICES)
    values = (answers or Answers()).predict(model, frames, wants_stress)
    if "energy" not in values or "forces" not in values:
        return None
    return _compared(file, kept, frames, values, e0s(model, head))


_MATRICES = ("stress", "virials")


def _compared(
    file: XyzFrames,
    kept: list[int],
    frames: list[Configuration],
    values: dict[str, Array],
    e0s: dict[int, float],
) -> Compared:
    sizes = np.array([len(f.atomic_numbers) for f in frames])
    empty = np.full((len(frames), 3, 3), np.nan)
    stress = values.get("stress", empty)
    volumes = np.array([np.abs(np.linalg.det(_cell(f))) for f in frames])
    interaction = values["energy"] - _atoms(frames, e0s)
    theories = {**known_theories(), "the base model": e0s}
    present = {int(z) for f in frames for z in f.atomic_numbers}
    return Compared(
        places=[int(file.place(i)) for i in kept],
        kinds=[file.kind(i) for i in kept],
        elements=sorted(present),
        sizes=sizes,
        counts=composition(frames),
        energy=np.array([_or_nan(_label(f, "energy"), ()) for f in frames]),
        predicted_energy=values["energy"],
        forces=np.concatenate(
            [_or_nan(_label(f, "forces"), (len(f.atomic_numbers), 3)) for f in frames]
        ),
        predicted_forces=values["forces"],
        stress=np.array([_or_nan(_label(f, "stress"), (3, 3)) for f in frames]),
        predicted_stress=stress,
        virials=np.array([_or_nan(_label(f, "virials"), (3, 3)) for f in frames]),
        predicted_virials=-stress * volumes[:, None, None],
        apart={
            name: interaction + _atoms(frames, table)
            for name, table in theories.items()
            if present <= table.keys()
        },
    )


def composition(frames: Sequence[Configuration]) -> Array:
    """(n, k): how many atoms of each element, and the total charge where it differs."""
    elements = np.unique(np.concatenate([f.atomic_numbers for f in frames]))
    counts = np.array([(f.atomic_numbers[:, None] == elements).sum(0) for f in frames], float)
    charges = np.array([_number(f.properties.get(_CHARGE)) for f in frames])
    return np.column_stack([counts, charges]) if np.ptp(charges) else counts


def _number(value: object) -> float:
    try:
        number = float(np.asarray(value, dtype=float).reshape(-1)[0])
    except (TypeError, ValueError, IndexError):
        return 0.0
    return number if np.isfinite(number) else 0.0


def _label(frame: Configuration, name: str) -> Array | None:
    """A label; None for a stress that stands there for the form's sake, or without a volume."""
    value = frame.properties.get(name)
    if value is None or (name == "stress" and is_placeholder(frame)):
        return None
    if name in _MATRICES and not has_volume(frame.cell):
        return None
    return np.asarray(value, dtype=float)


def _or_nan(value: Array | None, shape: tuple[int, ...]) -> Array:
    return np.full(shape, np.nan) if value is None else value.reshape(shape)


def _cell(frame: Configuration) -> Array:
    return np.zeros((3, 3)) if frame.cell is None else np.asarray(frame.cell, dtype=float)


def _atoms(frames: Sequence[Configuration], table: dict[int, float]) -> Array:
    return np.array([sum(table.get(int(z), 0.0) for z in f.atomic_numbers) for f in frames])
