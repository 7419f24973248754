"""Frames and their labels are checked once, when they are read and before any training."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from typing import Any

import ase.io
import numpy as np
from ase.data import chemical_symbols

from mace_lora.errors import DataError
from mace_lora.host import upstream

# what must be there at all, unless the loss gives it no weight: property -> (flag, weight flag)
_NEEDED = {"energy": ("energy_key", "energy_weight"), "forces": ("forces_key", "forces_weight")}
# and what a loss of that name is about
_NEEDED_BY_LOSS = {
    "stress": ("stress_key", "stress_weight"),
    "virials": ("virials_key", "virials_weight"),
}
_SHAPES = {
    "energy": ((), (1,)),
    "stress": ((3, 3), (6,), (9,)),
    "virials": ((3, 3), (6,), (9,)),
    "dipole": ((3,), (1, 3)),
}
# Atoms nearer than this, in A, are the same atom twice
_SAME_SPOT = 0.1


def check(
    path: str,
    frames: list[Any],
    keys: dict[str, str],
    args: argparse.Namespace,
    known: set[int] | None = None,
    labels: bool = True,
) -> None:
    """Check one file; the message of an error names file and frame.

    Args:
        path: the file, for messages.
        frames: mace-torch's Configurations of that file.
        keys: the name of each property in the file.
        args: the run's flags (loss and its weights).
        known: atomic numbers of the foundation model, if there is one.
        labels: whether labels are needed; not where the foundation model gives them.

    Raises:
        DataError: no frames; labels missing, of a wrong shape or not finite; unknown elements;
            positions or cell not finite; two atoms on one spot; stress without a cell.
    """
    if not frames:
        raise DataError(f"{path} holds no frames to train on or to test with")
    dipole_only = getattr(args, "compute_dipole_only", False)
    if labels and not dipole_only and "dipole" not in str(args.loss):
        needed = {**_NEEDED}
        if args.loss in _NEEDED_BY_LOSS:
            needed[args.loss] = _NEEDED_BY_LOSS[args.loss]
        for name, (flag, weight) in needed.items():
            _check_present(path, frames, name, keys.get(name, name), flag, getattr(args, weight))
    for frame in frames:
        problem = (
            _wrong_label(frame, keys)
            or _wrong_geometry(frame)
            or (_unknown_elements(frame, known) if known is not None else None)
        )
        if problem:
            raise DataError(f"{path}, frame {_index(path, frame)}{problem}")
    _speak_of_lone_atoms(path, frames, float(args.r_max))


def _check_present(
    path: str, frames: list[Any], name: str, key: str, flag: str, weight: float
) -> None:
    missing = [i for i, frame in enumerate(frames) if frame.properties.get(name) is None]
    if not missing or not weight:
        return
    if len(missing) == len(frames):
        raise DataError(
            f"{path} has no {name} under the key {key!r} in any of its {len(frames)} frames; "
            f"its keys are {_keys_in_file(path)}; name the right one with --{flag}"
        )
    first = _index(path, frames[missing[0]])
    logging.warning(
        f"{path}: {len(missing)} of {len(frames)} frames have no {name} under {key!r}, "
        f"frame {first} the first: they are left out of the {name} part of the loss"
    )


def _keys_in_file(path: str) -> str:
    atoms = ase.io.read(path, index=0)
    calculated = list(atoms.calc.results) if atoms.calc is not None else []
    own = [k for k in atoms.arrays if k not in ("numbers", "positions")]
    return ", ".join(sorted({*atoms.info, *own, *calculated})) or "none"


def _wrong_label(frame: Any, keys: dict[str, str]) -> str | None:
    shapes = {**_SHAPES, "forces": ((len(frame.atomic_numbers), 3),)}
    for name, value in frame.properties.items():
        if value is None:
            continue
        label = f"{name} (key {keys.get(name, name)!r})"
        if not _is_finite(value):
            return f": {label} holds NaN or infinite values; mend or remove the frame"
        if name in shapes and np.shape(value) not in shapes[name]:
            expected = " or ".join(map(str, shapes[name]))
            return f": {label} of shape {np.shape(value)}, expected {expected}"
        if name == "stress" and not _has_cell(frame):
            return f": {label} but no periodic cell: a stress belongs to a volume"
    return None


def _wrong_geometry(frame: Any) -> str | None:
    if len(frame.atomic_numbers) == 0:
        return " holds no atoms"
    if not _is_finite(frame.positions):
        return " has positions that are not finite"
    if frame.cell is not None and not _is_finite(frame.cell):
        return " has a cell that is not finite"
    if any(frame.pbc or ()) and not _has_cell(frame):
        return f" is periodic (pbc {frame.pbc}) but its cell has no volume"
    edges = _pairs(frame, _SAME_SPOT)
    if edges.shape[1]:
        one, other = edges[:, 0]
        return f" has atoms {one} and {other} on one spot, less than {_SAME_SPOT} Å apart"
    return None


def _pairs(frame: Any, cutoff: float) -> np.ndarray:
    """Atoms within `cutoff` (A) of each other, or of their periodic images: shape (2, n)."""
    pairs, *_ = upstream.module("mace.data.neighborhood").get_neighborhood(
        np.array(frame.positions, dtype=float),
        cutoff,
        tuple(bool(p) for p in frame.pbc or (False,) * 3),
        np.array(frame.cell, dtype=float) if frame.cell is not None else None,
    )
    return pairs


def _has_cell(frame: Any) -> bool:
    return frame.cell is not None and abs(np.linalg.det(frame.cell)) > 1e-6


def _unknown_elements(frame: Any, known: set[int]) -> str | None:
    unknown = sorted({int(z) for z in frame.atomic_numbers} - known)
    if not unknown:
        return None
    return f" holds {_symbols(unknown)}; the foundation model knows {_symbols(sorted(known))}"


def _symbols(numbers: list[int]) -> str:
    return ", ".join(f"{chemical_symbols[z]} ({z})" for z in numbers)


def _speak_of_lone_atoms(path: str, frames: list[Any], r_max: float) -> None:
    lone = [f for f in frames if len(f.atomic_numbers) == 1 and not _pairs(f, r_max).size]
    if lone:
        logging.warning(
            f"{path}, frame {_index(path, lone[0])} is an atom alone ({len(lone)} such frames): "
            "without neighbours it has no forces, and its energy is its E0, whatever is trained; "
            "to have it taken for the E0 write config_type=IsolatedAtom into the frame"
        )


def _is_finite(value: Any) -> bool:
    try:
        return bool(np.isfinite(np.asarray(value, dtype=float)).all())
    except (TypeError, ValueError):
        return True  # texts, such as the head


def _index(path: str, frame: Any) -> str:
    """Where `frame` stands in the file: 0-based, as in ase.io.read(path, index)."""
    return next(iter(_places(path, [frame.positions])), "?")


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
