"""Frames and their labels are checked once, when they are read and before any training."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from ase.data import chemical_symbols

from mace_lora.errors import DataError
from mace_lora.frames import labels
from mace_lora.frames.inputs import InputCheck
from mace_lora.frames.overlaps import SAME_SPOT, first_overlap, is_alone
from mace_lora.frames.reading import read_atoms
from mace_lora.upstream import graphs
from mace_lora.upstream.graphs import Configuration, periodic_in
from mace_lora.upstream.inputs import Input
from mace_lora.upstream.types import Graph

# What the losses of mace-torch need, where that is not energy and forces
_NEEDED = {
    "forces_only": ("forces",),
    "stress": ("energy", "forces", "stress"),
    "virials": ("energy", "forces", "virials"),
    "energy_forces_dipole": ("energy", "forces", "dipole"),
    "dipole": (),
    "dipole_polar": (),
}
# So many frames at once are searched for atoms on one spot
_TOGETHER = 512


class Frames(Protocol):
    """The frames of one file, as mace-torch's Configurations, and how messages speak of them."""

    path: str

    @property
    def keys(self) -> Mapping[str, str]:
        """The name of each property in the file; empty where that has no names of its own."""

    def __iter__(self) -> Iterator[Configuration]: ...

    def place(self, number: int) -> str:
        """Where the frame stands in the file, the `number`-th that was given out."""

    def called(self, label: str) -> str:
        """A label and the name that it has in the file."""

    def remedy(self, label: str) -> str:
        """What to say after "has no <label>" where no frame has it."""

    def may_hold(self, label: str) -> bool:
        """Whether the file has something that could be the label under another name."""


@dataclass
class Rules:
    """What frames are checked against.

    Attributes:
        known: who knows elements, for messages, and their atomic numbers; None to take all.
        needed: the labels that are trained on.
        welcome: those that are trained on where there are some.
        cutoff: of the model, A.
        padded: the model divides by the volume of mace-torch's padded cells, see `graphs`.
        inputs: what the model reads of frames beside atoms and cell.
    """

    known: tuple[str, set[int]] | None
    needed: Sequence[str]
    cutoff: float
    welcome: Sequence[str] = ()
    padded: bool = False
    inputs: Mapping[str, Input] = field(default_factory=dict)


@dataclass
class _Seen:
    """What is noticed of the frames of a file: how many there are, and where the first is."""

    count: int = 0
    first: int = -1

    def add(self, number: int) -> None:
        self.first = number if not self.count else self.first
        self.count += 1


@dataclass
class _Notes:
    frames: int = 0
    lone: _Seen = field(default_factory=_Seen)
    placeholders: _Seen = field(default_factory=_Seen)
    without: dict[str, _Seen] = field(default_factory=dict)


def counted(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The labels to which the loss of a run gives a weight: those it needs, those it may lack."""
    needed = _NEEDED.get(str(args.loss), ("energy", "forces"))
    welcome = ("stress",) if args.loss in ("huber", "universal") else ()
    return tuple(  # type: ignore[return-value]
        [label for label in names if getattr(args, f"{label}_weight")]
        for names in (needed, welcome)
    )


def check(file: Frames, rules: Rules) -> dict[str, str]:
    """Check the frames of one file; the message of an error names file and frame.

    Args:
        file: is gone through once.
        rules: what must hold.

    Returns:
        The needed labels that no frame has, with a sentence that says so. There is nothing in the
        file that could be one of them, so that it may lack them for good reason.

    Raises:
        DataError: no frames; a label that no frame has, though something in the file could be it;
            labels of a wrong shape or not finite; unknown elements; positions or cell not finite;
            two atoms on one spot; stress without a volume.
    """
    notes = _Notes(without={label: _Seen() for label in (*rules.needed, *rules.welcome)})
    together: list[Configuration] = []
    inputs = InputCheck(file.path, rules.inputs, file.keys)
    for number, frame in enumerate(file):
        notes.frames += 1
        problem = (
            _wrong_label(file, frame, rules) or _wrong_geometry(frame) or _unknown(frame, rules)
        )
        if problem:
            raise DataError(f"{file.path}, frame {file.place(number)}{problem}")
        inputs.see(file.place(number), len(frame.atomic_numbers), frame.properties)
        _note(notes, number, frame, rules)
        together.append(frame)
        if len(together) == _TOGETHER:
            _refuse_overlaps(file, together, number + 1 - _TOGETHER)
            together = []
    _refuse_overlaps(file, together, notes.frames - len(together))
    if not notes.frames:
        raise DataError(f"{file.path} holds no frames to train on or to test with")
    for sentence in inputs.gaps():
        logging.warning(sentence)
    return _say_what_was_noticed(file, notes, rules)


def _refuse_overlaps(file: Frames, together: list[Configuration], first: int) -> None:
    found = first_overlap(together)
    if found is not None:
        number, one, other = found
        raise DataError(
            f"{file.path}, frame {file.place(first + number)} has atoms {one} and {other} on one "
            f"spot, less than {SAME_SPOT} Å apart"
        )


def _note(notes: _Notes, number: int, frame: Configuration, rules: Rules) -> None:
    for label, seen in notes.without.items():
        if frame.properties.get(label) is None:
            seen.add(number)
    if graphs.is_placeholder(frame):
        notes.placeholders.add(number)
    if is_alone(frame, rules.cutoff):
        notes.lone.add(number)


def _say_what_was_noticed(file: Frames, notes: _Notes, rules: Rules) -> dict[str, str]:
    lacking = {}
    for label, seen in notes.without.items():
        if seen.count == notes.frames:
            if label in rules.welcome:
                continue
            lacking[label] = f"{file.path} has no {label} {file.remedy(label)}"
            if file.may_hold(label):
                raise DataError(f"{lacking[label]}; or train without it: --{label}_weight=0")
        if seen.count:
            logging.warning(
                f"{file.path}: {seen.count} of {notes.frames} frames have no {file.called(label)}, "
                f"frame {file.place(seen.first)} the first: they are left out of the {label} part "
                "of the loss"
            )
    if notes.placeholders.count:
        logging.warning(
            f"{file.path}: in {notes.placeholders.count} frames that are not periodic the stress "
            f"is exactly 0, frame {file.place(notes.placeholders.first)} the first: taken for a "
            "placeholder, and left out of the stress part of the loss"
        )
    if notes.lone.count:
        logging.warning(
            f"{file.path}, frame {file.place(notes.lone.first)} is an atom alone "
            f"({notes.lone.count} such frames): "
            "without neighbours it has no forces, and its energy is its E0, whatever is trained; "
            "to have it taken for the E0 write config_type=IsolatedAtom into the frame"
        )
    return lacking


def _wrong_label(file: Frames, frame: Configuration, rules: Rules) -> str | None:
    for name, value in frame.properties.items():
        if value is None:
            continue
        if name in labels.DEFAULT_KEYS:
            try:
                value = labels.in_shape(name, value, len(frame.atomic_numbers), file.called(name))
            except DataError as error:
                return f": {error}"
        if not _is_finite(value):
            return f": {file.called(name)} holds NaN or infinite values; mend or remove the frame"
    if frame.properties.get("stress") is not None and not graphs.is_placeholder(frame):
        return _wrong_volume(file, frame, rules)
    return None


def _wrong_volume(file: Frames, frame: Configuration, rules: Rules) -> str | None:
    if not graphs.has_volume(frame.cell):
        return (
            f": {file.called('stress')} but no cell with a volume, which a stress belongs to: give "
            "three lattice vectors, or remove the label"
        )
    if rules.padded and "stress" in (*rules.needed, *rules.welcome) and not all(periodic_in(frame)):
        return (
            f": {file.called('stress')} but periodic in {sum(periodic_in(frame))} directions: for "
            "a model with long-range parts mace-torch divides by the volume of another cell; make "
            "the frame periodic in three, or remove the label"
        )
    return None


def _wrong_geometry(frame: Configuration) -> str | None:
    n = len(frame.atomic_numbers)
    if n == 0:
        return " holds no atoms"
    if np.shape(frame.positions) != (n, 3):
        return f" has positions of shape {np.shape(frame.positions)}, expected {(n, 3)}"
    if not _is_finite(frame.positions):
        return " has positions that are not finite"
    if frame.cell is not None and not _is_finite(frame.cell):
        return " has a cell that is not finite"
    periodic = periodic_in(frame)
    if not any(periodic):
        return None
    # mace-torch's own: long vectors along x, y, z where a frame is not periodic
    vectors = np.zeros((3, 3)) if frame.cell is None else np.asarray(frame.cell, dtype=float)
    if not all(periodic):
        vectors = np.where(np.array(periodic)[:, None], vectors, np.eye(3))
    if not graphs.has_volume(vectors):
        return (
            f" is periodic (pbc {periodic}) but its cell has no volume, with unit vectors along x, "
            "y, z in the directions that are not periodic"
        )
    return None


def _unknown(frame: Configuration, rules: Rules) -> str | None:
    if rules.known is None:
        return None
    who, numbers = rules.known
    unknown = sorted(set(frame.atomic_numbers.tolist()) - numbers)
    if not unknown:
        return None
    return f" holds {symbols(unknown)}; {who} knows {symbols(sorted(numbers))}"


def symbols(numbers: Iterable[int]) -> str:
    """Elements for a message: "H (1), C (6)"."""
    named = {z: chemical_symbols[z] for z in numbers if 0 < z < len(chemical_symbols)}
    return ", ".join(f"{named.get(z, '?')} ({z})" for z in numbers)


def _is_finite(value: npt.ArrayLike) -> bool:
    if isinstance(value, str):
        return True
    try:
        return math.isfinite(np.asarray(value, dtype=float).sum())  # one number to look at
    except (TypeError, ValueError):
        return True  # texts, such as the head


def sources(paths: Iterable[str], data: Iterable[Graph]) -> str:
    """Where frames of a data set came from, as "train.xyz, frames 3, 7"; for messages.

    Args:
        paths: the files that may hold them; read again.
        data: items of a data set, with `positions` of shape (n_atoms, 3).
    """
    wanted = [np.asarray(item.positions.detach().cpu(), dtype=float) for item in data]
    parts = []
    for path in dict.fromkeys(paths):
        found = _places(path, wanted)
        if found:
            parts.append(f"{path}, frames {', '.join(found)}")
    return "; ".join(parts)


def _places(path: str, wanted: list[np.ndarray]) -> list[str]:
    found = []
    for i, atoms in enumerate(read_atoms(path)):
        for positions in wanted:
            if positions.shape == atoms.positions.shape and np.allclose(
                atoms.positions, positions, rtol=0, atol=1e-5, equal_nan=True
            ):
                found.append(str(i))
                break
    return found
