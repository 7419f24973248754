"""A file to be looked at: read as training reads it, under the keys that it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ase
import torch
from ase.formula import Formula

from mace_lora.check.findings import DOUBT, ERROR, Finding
from mace_lora.errors import DataError
from mace_lora.frames import checks, keys
from mace_lora.frames.checks import Rules
from mace_lora.frames.labels import DEFAULT_KEYS, under
from mace_lora.frames.reading import XyzFrames, read_atoms
from mace_lora.model.description import atomic_numbers
from mace_lora.upstream.inputs import inputs_of

LABELS = ("energy", "forces", "stress", "virials")
_MOST_FORMULAS = 6


@dataclass
class Looked:
    """A file, and what was found of it when it was read.

    Attributes:
        path: the file.
        frames: its frames, labels in eV and A; None where they can't be trained on.
        facts: plain data about it: frames, atoms, compositions, keys, labels, flags.
        findings: so far.
    """

    path: str
    frames: XyzFrames | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def look(
    path: str, asked: Mapping[str, str], factors: Mapping[str, float], model: torch.nn.Module
) -> Looked:
    """Read a file and check what training checks.

    Args:
        path: of a file that ASE reads.
        asked: names of labels and inputs in it, where they aren't mace-torch's.
        factors: by label, what turns its unit into ours.
        model: the base model.
    """
    found = Looked(path)
    try:
        atoms = read_atoms(path)
        names = _names(atoms, {**keys.DEFAULTS, **asked})
        rules = Rules(
            known=("the base model", set(atomic_numbers(model))),
            needed=("energy", "forces"),
            cutoff=float(model.get_buffer("r_max")),
            inputs=inputs_of(model),
        )
        frames = XyzFrames(path, names, inputs=rules.inputs, factors=factors, atoms=atoms)
        found.facts = _facts(path, atoms, frames)
        for sentence in checks.check(frames, rules).values():
            found.findings.append(Finding(DOUBT, "no label", path, sentence))
        found.frames = frames
    except DataError as error:
        why = str(error).removeprefix(f"{path}").lstrip(":, ")
        found.findings.append(Finding(ERROR, "can't be trained on", path, why))
        return found
    found.findings += _gaps(frames)
    return found


def _names(atoms: list[ase.Atoms], asked: dict[str, str]) -> dict[str, str]:
    """`asked`, and for labels that no frame has under that key the likeliest one that it has."""
    found = dict(asked)
    for label in LABELS:
        if any(under(frame, asked[label]) is not None for frame in atoms):
            continue
        if label in ("stress", "virials") and not all(frame.cell.rank == 3 for frame in atoms):
            continue  # programs write a stress of molecules, too
        candidates = keys.candidates(atoms, label)
        if candidates and asked[label] == DEFAULT_KEYS[label]:
            found[label] = candidates[0]
    return found


def _facts(path: str, atoms: list[ase.Atoms], frames: XyzFrames) -> dict[str, Any]:
    sizes = [len(frame) for frame in atoms]
    formulas = Counter(frame.get_chemical_formula() for frame in atoms)
    has = {
        label: sum(f.properties.get(label) is not None for f in frames.configurations)
        for label in LABELS
    }
    changed = {
        label: frames.keys[label]
        for label in LABELS
        if has[label] and frames.keys[label] != DEFAULT_KEYS[label]
    }
    inputs = {
        name: key
        for name, key in frames.keys.items()
        if name in keys.ALIASES and key != keys.DEFAULTS[name]
    }
    return {
        "path": path,
        "frames": len(atoms),
        "atoms": [min(sizes), max(sizes)] if sizes else [],
        "elements": sorted({symbol for f in formulas for symbol in Formula(f).count()}),
        "compositions": dict(formulas.most_common(_MOST_FORMULAS)),
        "n_compositions": len(formulas),
        "keys": keys.names_in(atoms),
        "labels": {label: n for label, n in has.items() if n},
        "flags": keys.flags({**changed, **inputs}),
    }


def _gaps(frames: XyzFrames) -> list[Finding]:
    """Labels that some frames have and others don't."""
    found = []
    for label in LABELS:
        without = [
            int(frames.place(i))
            for i, frame in enumerate(frames.configurations)
            if frame.properties.get(label) is None and len(frame.atomic_numbers) > 1
        ]
        if without and len(without) < len(frames.configurations):
            why = f"{len(without)} of {len(frames.configurations)} frames have none"
            found.append(Finding(DOUBT, f"no {label}", frames.path, why, tuple(without)))
    return found
