"""What is asked of a fine-tuned model before it is trusted: each a check with a verdict.

Limits are for faults, not for merits: a model that learnt another theory has other forces on
ordinary structures and passes, one that lost the repulsion of atoms, or E0s, does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from mace_lora.frames.isolated_atoms import known_theories
from mace_lora.model.description import atomic_numbers, e0s
from mace_lora.trust import dynamics
from mace_lora.trust.frames import (
    RATTLES,
    Scan,
    compressed,
    dimers,
    is_dense,
    molecules,
    relative_distances,
    scaled,
)
from mace_lora.trust.measures import (
    RISE,
    Answers,
    answers,
    atoms_apart,
    by_scan,
    holes,
    relative,
)

PASS, FAIL, TOLD = "pass", "FAIL", "told"
MOST_ELEMENTS = 8  # without data, pairs of the lightest elements of a model with more
THOMAS_FERMI = -20.917  # eV, of Z**(7/3): a neutral atom's energy lies above it in any theory
HIGHEST = 5.0  # eV, of an E0: isolated atoms have none above 0, averages over molecules may
NEAR = 15.0  # eV: so near are all E0s to those of some theory that is known
OFFSET = 0.5  # eV per atom of the labels
WALL, SQUEEZED, ORDINARY = 0.5, 1.0, 1.0  # mean of |dF| / (1 eV/A + |F|)
CONTACT = 0.6  # sums of covalent radii
DRIFT = 2.0  # meV per atom and ps, or three times the start's
SHORTEST_NVE = 0.2  # ps: over less, vibrations look like 10 meV per atom and ps of drift
LASTS = 0.8  # of the start's time in the ramp
RAMP_KELVIN = (300.0, 1500.0)
STRAINS = np.linspace(0.94, 1.06, 7) ** (1 / 3)  # of lengths, in an equation of state
MOST_PICTURES = 6


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        name: what was asked.
        verdict: PASS, FAIL, or TOLD where there is nothing to judge by.
        value, start: of the model and of its start; None where there is no number.
        limit: of `value`.
        unit: of all three.
        why: in words.
    """

    name: str
    verdict: str
    value: float | None = None
    start: float | None = None
    limit: float | None = None
    unit: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name}, {self.verdict}: {self.why}"


COLUMNS = ("", "check", "model", "start", "limit", "unit")


def cells(check: Mapping[str, Any]) -> list[str]:
    """The attributes of a Check as a row of a table under COLUMNS."""
    numbers = (check[name] for name in ("value", "start", "limit"))
    shown = ["" if number is None else f"{number:.3g}" for number in numbers]
    return [check["verdict"], check["name"], *shown, check["unit"]]


@dataclass
class Asked:
    """A model, what it is compared with, and where.

    Attributes:
        model: to be trusted or not.
        start: the model that it was trained from, if it is known.
        frames: of the data, elements that the model knows; none without data.
        energies: of the frames, eV per atom, NaN where unknown.
        head: of the model; the last one if None. The start answers by its last.
        ps: length of the ramp, and NVE half of it or SHORTEST_NVE; 0: no dynamics.
        curves: what was drawn, for pictures: by title the lines, by label x and y.
    """

    model: torch.nn.Module
    start: torch.nn.Module | None = None
    frames: Sequence[Atoms] = ()
    energies: np.ndarray = field(default_factory=lambda: np.empty(0))
    head: str | None = None
    ps: float = 0.5
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = field(default_factory=dict)

    @property
    def elements(self) -> list[int]:
        """Those whose pairs are asked about: of the data, or the lightest that the model knows."""
        of_data = {int(z) for frame in self.frames for z in frame.numbers}
        known = set(atomic_numbers(self.model))
        if self.start is not None:
            known &= set(atomic_numbers(self.start))
        return sorted(of_data or known)[: None if of_data else MOST_ELEMENTS]

    def both(self, frames: list[Atoms]) -> tuple[Answers, Answers | None]:
        mine = answers(self.model, frames, self.head)
        return mine, None if self.start is None else answers(self.start, frames)


def all_checks(asked: Asked) -> Iterator[Check]:
    """One after the other; those of dynamics last."""
    yield check_e0s(asked)
    if np.isfinite(asked.energies).any():
        yield check_offset(asked)
    yield check_wall(asked, "pairs of atoms", dimers(asked.elements), WALL)
    if asked.frames:
        frames = list(asked.frames[:: max(1, len(asked.frames) // 5)][:5])
        yield check_wall(asked, "compressed frames", compressed(frames), SQUEEZED)
    yield from check_ordinary(asked)
    crystals = [frame for frame in asked.frames if is_dense(frame)]
    if crystals:
        yield check_equation_of_state(asked, crystals[0])
    if asked.ps > 0:
        frame = asked.frames[0] if asked.frames else _molecule(asked)
        if frame is not None:
            yield check_drift(asked, frame)
            yield check_ramp(asked, frame)


def check_e0s(asked: Asked) -> Check:
    """E0s are those of atoms: none lies below the Thomas-Fermi energy or far above 0, whatever the
    theory, and all are near a theory that is known, or near the start's.
    """
    mine = e0s(asked.model, asked.head)
    present = {z: mine[z] for z in asked.elements}
    tables = known_theories()
    if asked.start is not None:
        tables["the start"] = e0s(asked.start)
    distances = {
        name: max(abs(energy - table[z]) for z, energy in present.items())
        for name, table in tables.items()
        if present.keys() <= table.keys()
    }
    shown = ", ".join(f"{chemical_symbols[z]} {e:.2f}" for z, e in present.items())
    theory = min(distances, key=lambda name: distances[name], default="")
    if not all(map(math.isfinite, present.values())):
        return Check("E0s", FAIL, why=f"not finite: {shown}")
    for z, energy in present.items():
        deepest = THOMAS_FERMI * z ** (7 / 3)
        if not deepest <= energy <= HIGHEST:
            limit = deepest if energy < deepest else HIGHEST
            why = f"{chemical_symbols[z]} has {energy:.2f} eV, in any theory it lies between "
            why += f"{deepest:.0f} and {HIGHEST:.0f} ({shown})"
            return Check("E0s", FAIL, energy, limit=limit, unit="eV", why=why)
    if theory and distances[theory] <= NEAR:
        why = f"near {theory}: {shown}"
        return Check("E0s", PASS, distances[theory], limit=NEAR, unit="eV", why=why)
    return Check("E0s", TOLD, why=f"of no theory that is known here: {shown}")


def check_offset(asked: Asked) -> Check:
    """Energies on the data lie where the labels do, or no farther off than the start's: of another
    theory it may be.
    """
    value = _offset(asked, asked.model, asked.head)
    start = None if asked.start is None else _offset(asked, asked.start, None)
    limit = max(OFFSET, start or 0.0)
    why = "mean distance of the energies from the labels of the data"
    return Check("energies", _judge(value, limit), value, start, limit, "eV per atom", why)


def _offset(asked: Asked, model: torch.nn.Module, head: str | None) -> float:
    frames = list(asked.frames)
    energy = answers(model, frames, head).energy + atoms_apart(model, frames, head)
    errors = energy / [len(frame) for frame in frames] - asked.energies
    return float(np.abs(errors[np.isfinite(asked.energies)]).mean())


def check_wall(asked: Asked, name: str, scans: list[Scan], limit: float) -> Check:
    """Atoms that approach each other repel as they did in the start; without one, at all."""
    mine, start = asked.both([frame for scan in scans for frame in scan.frames])
    parts = by_scan(mine, scans)
    if start is None:
        open_ = [s.name for s, found in zip(scans, parts, strict=True) if not _rises(s, found)]
        value = None
    else:
        compared = list(zip(scans, parts, by_scan(start, scans), strict=True))
        open_ = [
            scan.name for scan, one, other in compared if holes(one.energy, other.energy, RISE)
        ]
        value = relative(mine.forces, start.forces)
        compared.sort(key=lambda c: (c[0].name not in open_, -relative(c[1].forces, c[2].forces)))
        for scan, one, other in compared[:MOST_PICTURES]:
            _draw(asked, scan, one, other)
    why = (
        f"{len(open_)} of {len(scans)} have a hole: {', '.join(open_[:8])}" if open_ else "no hole"
    )
    bad = bool(open_) or (value is not None and not value <= limit)
    return Check(name, FAIL if bad else PASS, value, limit=limit, unit="relative", why=why)


def _rises(scan: Scan, found: Answers) -> bool:
    """Whether the energy rises from its lowest value at a distance to the frame in which atoms come
    as close as CONTACT, where every sound model repels; closer even good ones may have holes.
    """
    closest = np.array([relative_distances(frame).min() for frame in scan.frames])
    energy = found.energy[: max(1, int(np.sum(closest >= CONTACT)))]
    return bool(np.isfinite(energy).all() and energy[-1] > energy.min())


def _draw(asked: Asked, scan: Scan, one: Answers, other: Answers) -> None:
    x = [float(f.get_distance(0, 1)) for f in scan.frames if len(f) == 2]
    if x:
        lines = {"start": other.energy, "model": one.energy}
        asked.curves[scan.name] = {k: (x, (y - y[0]).tolist()) for k, y in lines.items()}


def check_ordinary(asked: Asked) -> Iterator[Check]:
    """On small molecules: how far the forces went from the start's. A new theory changes them, so
    only a change as large as the forces themselves is a fault.
    """
    if asked.start is None:
        return
    for name, rattle in RATTLES.items():
        frames = molecules(asked.elements, rattle)
        if not frames:
            continue
        mine, start = answers(asked.model, frames, asked.head), answers(asked.start, frames)
        value = relative(mine.forces, start.forces)
        why = f"forces on {len(frames)} molecules, displaced by {rattle} A, against the start's"
        verdict = _judge(value, ORDINARY)
        yield Check(f"molecules, {name}", verdict, value, None, ORDINARY, "relative", why)


def check_equation_of_state(asked: Asked, crystal: Atoms) -> Check:
    """The energy of a crystal bends upwards with its volume where the start's does, with a single
    minimum or none.
    """
    frames = [scaled(crystal, strain) for strain in STRAINS]
    mine, start = asked.both(frames)
    n = len(crystal)
    curves = {"model": mine.energy / n} | ({} if start is None else {"start": start.energy / n})
    asked.curves["equation of state"] = {
        name: (STRAINS.tolist(), (y - y[len(y) // 2]).tolist()) for name, y in curves.items()
    }
    bends = {name: float(np.polyfit(STRAINS, y, 2)[0]) for name, y in curves.items()}
    why = "curvature of the energy per atom with the length of the cell"
    turns = {name: int((np.diff(np.sign(np.diff(y))) != 0).sum()) for name, y in curves.items()}
    bumpy = turns["model"] > max(1, turns.get("start", 0))
    if bumpy:
        why += f"; it turns {turns['model']} times"
    bad = bumpy or (not bends["model"] > 0 and bends.get("start", 1.0) > 0)
    verdict = FAIL if bad else PASS
    return Check(
        "equation of state", verdict, bends["model"], bends.get("start"), 0.0, "eV per atom", why
    )


def check_drift(asked: Asked, frame: Atoms) -> Check:
    """The energy is conserved at 300 K."""
    ps = max(asked.ps / 2, SHORTEST_NVE)
    value = dynamics.drift(dynamics.nve(asked.model, frame, ps, head=asked.head))
    start = None
    if asked.start is not None:
        start = dynamics.drift(dynamics.nve(asked.start, frame, ps))
    limit = DRIFT if start is None else max(DRIFT, 3 * start)  # infinite if the start breaks
    why = f"drift of the total energy of {frame.symbols} at 300 K"
    return Check("NVE", _judge(value, limit), value, start, limit, "meV per atom and ps", why)


def check_ramp(asked: Asked, frame: Atoms) -> Check:
    """A molecule that is heated holds together about as long as with the start."""
    low, high = RAMP_KELVIN

    def kelvin(part: float) -> float:
        return low + part * (high - low)

    mine = dynamics.langevin(asked.model, frame, kelvin, asked.ps, head=asked.head)
    start = None
    if asked.start is not None:
        start = dynamics.langevin(asked.start, frame, kelvin, asked.ps).ps
    limit = LASTS * (asked.ps if start is None else start)
    why = f"{frame.symbols} heated from {low:.0f} to {high:.0f} K: "
    why += f"{mine.trouble} at {mine.kelvin:.0f} K" if mine.trouble else "it held"
    verdict = PASS if mine.ps >= limit else FAIL
    return Check("heating", verdict, mine.ps, start, limit, "ps", why)


def _molecule(asked: Asked) -> Atoms | None:
    """The largest of the small molecules of these elements; None where there is none."""
    return max(molecules(asked.elements, 0.0), key=len, default=None)


def _judge(value: float, limit: float) -> str:
    return PASS if value <= limit else FAIL
