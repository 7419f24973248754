"""Molecular dynamics until it breaks, and the drift of the energy where it may not change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

from mace_lora import MaceLoraCalculator
from reproduction.transfer.frames import relative_distances

BONDED = 1.25  # sums of covalent radii: closer pairs of the first frame are bonds
LONGEST = 1.8  # sums of covalent radii: a bond that is longer is broken
SHORTEST = 0.5  # sums of covalent radii: no pair may come closer
HOTTEST = 4.0  # times the thermostat's temperature, in small molecules well above fluctuations
SAMPLE = 10  # steps between two energies of NVE
FRICTION = 0.01 / units.fs
NVE_KELVIN = 300.0


@dataclass(frozen=True)
class Lengths:
    """What is simulated: picoseconds of each run, seeds of each temperature, time step in fs."""

    temperatures: tuple[float, ...] = (500.0, 1000.0, 1500.0)
    seeds: int = 3
    langevin_ps: float = 1.0
    nve_ps: float = 0.5
    step_fs: float = 0.5

    def steps(self, ps: float) -> int:
        return max(1, round(1e3 * ps / self.step_fs))


class Health:
    """Tells whether a molecule is still the one that it was at the start."""

    def __init__(self, atoms: Atoms, kelvin: float) -> None:
        self.bonds = relative_distances(atoms) < BONDED
        self.hottest = HOTTEST * kelvin

    def trouble(self, atoms: Atoms) -> str:
        """What is wrong, or ""."""
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.get_momenta()).all()):
            return "not a number"
        distances = relative_distances(atoms)
        if (distances[self.bonds] > LONGEST).any():
            return "a bond broke"
        if (distances < SHORTEST).any():
            return "atoms collapsed"
        return "too hot" if atoms.get_temperature() > self.hottest else ""


def _prepared(frame: Atoms, model: torch.nn.Module, kelvin: float, seed: int) -> Atoms:
    atoms = Atoms(frame.numbers, frame.positions)
    atoms.calc = MaceLoraCalculator(model)
    MaxwellBoltzmannDistribution(atoms, temperature_K=kelvin, rng=np.random.default_rng(seed))
    return atoms


def until_broken(
    model: torch.nn.Module, frame: Atoms, kelvin: float, seed: int, lengths: Lengths
) -> tuple[float, str]:
    """Picoseconds of Langevin dynamics until the molecule breaks, at most `langevin_ps`, and how it
    broke ("" if it did not).
    """
    atoms = _prepared(frame, model, kelvin, seed)
    health = Health(frame, kelvin)
    dynamics = Langevin(
        atoms,
        lengths.step_fs * units.fs,
        temperature_K=kelvin,
        friction=FRICTION,
        rng=np.random.default_rng(seed + 1000),
    )
    for step in range(1, lengths.steps(lengths.langevin_ps) + 1):
        if trouble := _step(dynamics, health):
            return step * lengths.step_fs / 1e3, trouble
    return lengths.langevin_ps, ""


def nve_drift(model: torch.nn.Module, frame: Atoms, lengths: Lengths, seed: int = 0) -> float:
    """The slope of the total energy with time, without its sign, in meV per atom and ps; infinite
    where the molecule breaks.
    """
    atoms = _prepared(frame, model, NVE_KELVIN, seed)
    health = Health(frame, NVE_KELVIN)
    dynamics = VelocityVerlet(atoms, lengths.step_fs * units.fs)
    times, energies = [], []
    for step in range(max(lengths.steps(lengths.nve_ps), 2 * SAMPLE)):
        if _step(dynamics, health):
            return float("inf")
        if step % SAMPLE == 0:
            times.append(step * lengths.step_fs / 1e3)
            energies.append(1e3 * atoms.get_total_energy() / len(atoms))
    return abs(float(np.polyfit(times, energies, 1)[0]))


def _step(dynamics: MolecularDynamics, health: Health) -> str:
    """One step, and what is wrong after it: neighbours of atoms at infinity can't be counted."""
    with np.errstate(all="ignore"):  # a broken molecule may overflow
        dynamics.run(1)
    return health.trouble(dynamics.atoms)


def simulate(
    model: torch.nn.Module, frames: list[Atoms], lengths: Lengths
) -> dict[str, float | list[list[float | str]]]:
    """Mean picoseconds until broken by temperature, every single run, and the mean drift in NVE;
    run number i starts from frame number i.
    """
    found: dict[str, float | list[list[float | str]]] = {}
    runs: list[list[float | str]] = []
    for kelvin in lengths.temperatures:
        lasted = []
        for seed in range(lengths.seeds):
            frame = frames[seed % len(frames)]
            ps, trouble = until_broken(model, frame, kelvin, seed, lengths)
            lasted.append(ps)
            runs.append([kelvin, seed, ps, trouble])
        found[f"ps_{kelvin:g}K"] = float(np.mean(lasted))
    starts = [frames[seed % len(frames)] for seed in range(lengths.seeds)]
    drifts = [nve_drift(model, frame, lengths, seed) for seed, frame in enumerate(starts)]
    return found | {"runs": runs, "nve_drift": float(np.mean(drifts))}
