"""Frames and their labels are checked once, when they are read and before any training."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import ase.io
import numpy as np
from ase.data import chemical_symbols

from mace_lora.errors import DataError
from mace_lora.upstream import library

# Losses that are about a label beside energy and forces
_LABEL_OF_LOSS = ("stress", "virials")
_SHAPES = {
    "energy": ((), (1,)),
    "stress": ((3, 3), (6,), (9,)),
    "virials": ((3, 3), (6,), (9,)),
    "dipole": ((3,), (1, 3)),
}
# Atoms nearer than this, in A, are the same atom twice
_SAME_SPOT = 0.1


class Frames(Protocol):
    """The frames of one file, as mace-torch's Configurations, and how messages speak of them."""

    path: str

    def __iter__(self) -> Iterator[Any]: ...

    def place(self, number: int, frame: Any) -> str:
        """Where the frame stands in the file, the `number`-th that was given out."""

    def called(self, label: str) -> str:
        """A label and the name that it has in the file."""

    def remedy(self, label: str) -> str:
        """What to say after "has no <label>" where no frame has it."""


class XyzFrames:
    """Frames that ASE has read.

    Args:
        path: the file.
        frames: those of it that mace-torch trains on or tests with.
        keys: the name of each label in the file.
    """

    def __init__(self, path: str, frames: list[Any], keys: dict[str, str]) -> None:
        self.path, self._frames, self._keys = path, frames, keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self._frames)

    def place(self, number: int, frame: Any) -> str:
        """0-based, as in ase.io.read(path, index); mace-torch has left some out, so look again."""
        del number
        return next(iter(_places(self.path, [frame.positions])), "?")

    def called(self, label: str) -> str:
        return f"{label} (key {self._keys.get(label, label)!r})"

    def remedy(self, label: str) -> str:
        return (
            f"under the key {self._keys.get(label, label)!r}; its keys are "
            f"{_keys_in_file(self.path)}; name the right one with --{label}_key"
        )


def check(
    file: Frames,
    args: argparse.Namespace,
    known: tuple[str, set[int]] | None = None,
    labels: bool = True,
) -> None:
    """Check the frames of one file; the message of an error names file and frame.

    Args:
        file: is gone through once.
        args: the run's flags (loss and its weights).
        known: who knows elements, for messages, and their atomic numbers.
        labels: whether labels are needed; not where the foundation model gives them.

    Raises:
        DataError: no frames; labels missing, of a wrong shape or not finite; unknown elements;
            positions or cell not finite; two atoms on one spot; stress without a cell.
    """
    without: dict[str, list[str]] = {label: [] for label in _needed(args, labels)}
    lone: list[str] = []
    count = 0
    for number, frame in enumerate(file):
        count += 1
        problem = (
            _wrong_label(file, frame) or _wrong_geometry(frame) or _unknown_elements(frame, known)
        )
        if problem:
            raise DataError(f"{file.path}, frame {file.place(number, frame)}{problem}")
        for label, places in without.items():
            if frame.properties.get(label) is None:
                places.append(file.place(number, frame) if not places else "")
        if len(frame.atomic_numbers) == 1 and not _pairs(frame, float(args.r_max)).size:
            lone.append(file.place(number, frame) if not lone else "")
    if not count:
        raise DataError(f"{file.path} holds no frames to train on or to test with")
    for label, places in without.items():
        _say_what_is_missing(file, label, places, count)
    if lone:
        logging.warning(
            f"{file.path}, frame {lone[0]} is an atom alone ({len(lone)} such frames): "
            "without neighbours it has no forces, and its energy is its E0, whatever is trained; "
            "to have it taken for the E0 write config_type=IsolatedAtom into the frame"
        )


def _needed(args: argparse.Namespace, labels: bool) -> list[str]:
    """The labels that must be there: those to which the loss gives a weight."""
    dipole_only = getattr(args, "compute_dipole_only", False)
    if not labels or dipole_only or "dipole" in str(args.loss):
        return []
    needed = ["energy", "forces", *(label for label in _LABEL_OF_LOSS if label == args.loss)]
    return [label for label in needed if getattr(args, f"{label}_weight")]


def _say_what_is_missing(file: Frames, label: str, places: list[str], count: int) -> None:
    if len(places) == count:
        raise DataError(f"{file.path} has no {label} {file.remedy(label)}")
    if places:
        logging.warning(
            f"{file.path}: {len(places)} of {count} frames have no {file.called(label)}, frame "
            f"{places[0]} the first: they are left out of the {label} part of the loss"
        )


def _keys_in_file(path: str) -> str:
    atoms = ase.io.read(path, index=0)
    calculated = list(atoms.calc.results) if atoms.calc is not None else []
    own = [k for k in atoms.arrays if k not in ("numbers", "positions")]
    return ", ".join(sorted({*atoms.info, *own, *calculated})) or "none"


def _wrong_label(file: Frames, frame: Any) -> str | None:
    shapes = {**_SHAPES, "forces": ((len(frame.atomic_numbers), 3),)}
    for name, value in frame.properties.items():
        if value is None:
            continue
        if not _is_finite(value):
            return f": {file.called(name)} holds NaN or infinite values; mend or remove the frame"
        if name in shapes and np.shape(value) not in shapes[name]:
            expected = " or ".join(map(str, shapes[name]))
            return f": {file.called(name)} of shape {np.shape(value)}, expected {expected}"
        if name == "stress" and not _has_cell(frame):
            return f": {file.called(name)} but no periodic cell: a stress belongs to a volume"
    return None


def _wrong_geometry(frame: Any) -> str | None:
    n = len(frame.atomic_numbers)
    if n == 0:
        return " holds no atoms"
    if np.shape(frame.positions) != (n, 3):
        return f" has positions of shape {np.shape(frame.positions)}, expected {(n, 3)}"
    if not _is_finite(frame.positions):
        return " has positions that are not finite"
    if frame.cell is not None and not _is_finite(frame.cell):
        return " has a cell that is not finite"
    if any(_periodic(frame)) and not _has_cell(frame):
        return f" is periodic (pbc {_periodic(frame)}) but its cell has no volume"
    edges = _pairs(frame, _SAME_SPOT)
    if edges.shape[1]:
        one, other = edges[:, 0]
        return f" has atoms {one} and {other} on one spot, less than {_SAME_SPOT} Å apart"
    return None


def _pairs(frame: Any, cutoff: float) -> np.ndarray:
    """Atoms within `cutoff` (A) of each other, or of their periodic images: shape (2, n)."""
    return library.neighbours(
        np.array(frame.positions, dtype=float),
        cutoff,
        _periodic(frame),
        np.array(frame.cell, dtype=float) if frame.cell is not None else None,
    )


def _periodic(frame: Any) -> tuple[bool, bool, bool]:
    return (False,) * 3 if frame.pbc is None else tuple(bool(p) for p in frame.pbc)


def _has_cell(frame: Any) -> bool:
    return frame.cell is not None and abs(np.linalg.det(frame.cell)) > 1e-6


def _unknown_elements(frame: Any, known: tuple[str, set[int]] | None) -> str | None:
    if known is None:
        return None
    who, numbers = known
    unknown = sorted({int(z) for z in frame.atomic_numbers} - numbers)
    if not unknown:
        return None
    return f" holds {symbols(unknown)}; {who} knows {symbols(sorted(numbers))}"


def symbols(numbers: Iterable[int]) -> str:
    """Elements for a message: "H (1), C (6)"."""
    named = {z: chemical_symbols[z] for z in numbers if 0 < z < len(chemical_symbols)}
    return ", ".join(f"{named.get(z, '?')} ({z})" for z in numbers)


def _is_finite(value: Any) -> bool:
    try:
        return bool(np.isfinite(np.asarray(value, dtype=float)).all())
    except (TypeError, ValueError):
        return True  # texts, such as the head


def _places(path: str, wanted: list[np.ndarray]) -> list[str]:
    found = []
    for i, atoms in enumerate(ase.io.read(path, index=":")):
        for positions in wanted:
            if positions.shape == atoms.positions.shape and np.allclose(
                atoms.positions, positions, rtol=0, atol=1e-5, equal_nan=True
            ):
                found.append(str(i))
                break
    return found


def sources(paths: Iterable[str], data: list[Any]) -> str:
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
