"""Frames that a caller has in memory: their labels, wherever they are, under names for a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import ase
import numpy as np
from ase.calculators.calculator import PropertyNotImplementedError, all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from mace_lora.errors import DataError
from mace_lora.frames import keys, labels
from mace_lora.frames.keys import DEFAULTS


def labelled(
    frames: ase.Atoms | Iterable[ase.Atoms], called: str, asked: Mapping[str, str] | None = None
) -> list[ase.Atoms]:
    """Copies of frames, whose labels stand under the keys that were asked for.

    Labels are those under these keys, and else the results of attached calculators, without
    constraints; one that can compute is asked to, where it has no results for the frame.

    Args:
        frames: one or several.
        called: what messages call them.
        asked: key by label or input, where that isn't one of DEFAULTS.

    Returns:
        Frames without constraints, ready for a file.

    Raises:
        DataError: these are no frames; results are those of other positions; a label can't be read.
    """
    given = [frames] if isinstance(frames, ase.Atoms) else list(_several(frames, called))
    names = {**DEFAULTS, **(asked or {})}
    own = [names[label] for label in ("energy", "forces")]
    copies = []
    for i, atoms in enumerate(given):
        if not isinstance(atoms, ase.Atoms):
            raise DataError(f"{called}[{i}]: an ase.Atoms is needed, found {type(atoms).__name__}")
        copy = atoms.copy()
        if atoms.calc is not None and _counts(atoms, own):
            results = _results(atoms, f"{called}[{i}]")
            copy.calc = SinglePointCalculator(copy, **results)
        copies.append(copy)
    found = keys.find(called, copies, names).names
    return [_under(frame, found, names, f"{called}[{i}]") for i, frame in enumerate(copies)]


def _counts(atoms: ase.Atoms, keys: list[str]) -> bool:
    """Whether labels are to be looked for in the calculator: not beside labels of other names."""
    lacking = [key for key in keys if key not in atoms.info and key not in atoms.arrays]
    return len(lacking) == len(keys) or any(key in all_properties for key in lacking)


def _several(frames: object, called: str) -> Iterable[object]:
    if isinstance(frames, Iterable) and not isinstance(frames, (str, bytes, Mapping)):
        return frames
    raise DataError(f"{called}: ase.Atoms or a path is needed, found {type(frames).__name__}")


def _results(atoms: ase.Atoms, called: str) -> dict[str, object]:
    """What the calculator of a frame says of it; computed, if need be."""
    calc = atoms.calc
    if isinstance(calc, SinglePointCalculator):
        changed = calc.check_state(atoms)
        if changed and calc.results:
            raise DataError(
                f"{called}: {', '.join(changed)} changed after its calculator's results were "
                "stored, so that they may be those of another frame; write labels that still hold "
                "into atoms.info['REF_energy'] and atoms.arrays['REF_forces']"
            )
        return {name: value for name, value in calc.results.items() if value is not None}
    asked: dict[str, Callable[[], object]] = {
        "energy": atoms.get_potential_energy,
        "forces": partial(atoms.get_forces, apply_constraint=False),
    }
    if atoms.pbc.all():
        asked["stress"] = partial(atoms.get_stress, apply_constraint=False)
    found: dict[str, object] = {}
    for name, compute in asked.items():
        try:
            found[name] = compute()
        except (PropertyNotImplementedError, NotImplementedError):
            continue
        except Exception as error:  # of any program that may stand behind it
            raise DataError(f"{called}: its calculator fails: {error}") from error
    return found


def _under(
    atoms: ase.Atoms, found: Mapping[str, str], names: Mapping[str, str], called: str
) -> ase.Atoms:
    """`atoms` with labels from `found` moved to `names`, and nothing that ASE takes for a label."""
    try:
        values = labels.labels(atoms, found)
    except DataError as error:
        raise DataError(f"{called}: {error}") from None
    atoms.calc = None
    atoms.set_constraint()
    gone = {*all_properties, *(found[label] for label in values)}
    for place in (atoms.info, atoms.arrays):
        for key in gone & place.keys():
            del place[key]
    for key in [key for key, value in atoms.info.items() if not _is_plain(value)]:
        del atoms.info[key]  # a file can't hold it
    ases: dict[str, object] = {}  # names that ASE keeps for calculators
    for label, value in values.items():
        key = names[label]
        if key in all_properties:
            is_stress = key == "stress"
            ases[key] = full_3x3_to_voigt_6_stress(value) if is_stress else value
        elif label in ("forces", "charges"):
            atoms.arrays[key] = value
        else:
            atoms.info[key] = value if value.ndim else float(value)
    if ases:
        atoms.calc = SinglePointCalculator(atoms, **ases)
    return atoms


def _is_plain(value: object) -> bool:
    return np.asarray(value).dtype.kind in "biufU"
