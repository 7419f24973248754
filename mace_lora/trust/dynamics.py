"""Molecular dynamics until it breaks, and the drift of the energy where it may not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

from mace_lora.model.description import heads
from mace_lora.trust.frames import relative_distances, scaled
from mace_lora.upstream.calculating import calculator

BONDED = 1.25  # sums of covalent radii: closer pairs of the first frame are bonds
LONGEST = 1.8  # sums of covalent radii: a bond that is longer is broken
SHORTEST = 0.5  # sums of covalent radii: no pair may come closer
HOTTEST = 4.0  # times the thermostat's temperature, in small molecules well above fluctuations
SAMPLE = 10  # steps between two energies of NVE
NOT_A_NUMBER, BOND_BROKE = "not a number", "a bond broke"
FRICTION = 0.01 / units.fs
NVE_KELVIN = 300.0
STEP_FS = 0.5


@dataclass
class Path:
    """What became of a run.

    Attributes:
        ps: picoseconds until it broke, or its whole length.
        kelvin: of the thermostat then.
        trouble: how it broke, "" if it did not.
        times, values: ps, and the total energy (meV per atom) or the temperature (K), each
            SAMPLE steps.
    """

    ps: float = 0.0
    kelvin: float = 0.0
    trouble: str = ""
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


class Health:
    """Tells whether a molecule is still the one that it was at the start."""

    def __init__(self, atoms: Atoms, kelvin: float) -> None:
        self.bonds = relative_distances(atoms) < BONDED
        self.hottest = HOTTEST * kelvin

    def trouble(self, atoms: Atoms) -> str:
        """What is wrong, or ""."""
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.get_momenta()).all()):
            return NOT_A_NUMBER
        distances = relative_distances(atoms)
        if (distances[self.bonds] > LONGEST).any():
            return BOND_BROKE
        if (distances < SHORTEST).any():
            return "atoms collapsed"
        return "too hot" if atoms.get_temperature() > self.hottest else ""


def prepared(
    frame: Atoms, model: torch.nn.Module, kelvin: float, seed: int, head: str | None = None
) -> Atoms:
    """The atoms of a frame with velocities of a temperature, computed by `model`, which from then
    on asks for no gradients of its parameters.
    """
    atoms = scaled(frame, 1.0)
    own = next(model.parameters())
    atoms.calc = calculator(
        [model],
        device=str(own.device),
        default_dtype=str(own.dtype).removeprefix("torch."),
        head=head or heads(model)[-1],
    )
    MaxwellBoltzmannDistribution(atoms, temperature_K=kelvin, rng=np.random.default_rng(seed))
    return atoms


def thermostat(atoms: Atoms, kelvin: float, seed: int, step_fs: float = STEP_FS) -> Langevin:
    """Langevin dynamics at a temperature, its noise other than that of the velocities."""
    return Langevin(
        atoms,
        step_fs * units.fs,
        temperature_K=kelvin,
        friction=FRICTION,
        fixcm=False,  # where a molecule drifts to is nothing to it
        rng=np.random.default_rng(seed + 1000),
    )


def langevin(
    model: torch.nn.Module,
    frame: Atoms,
    kelvin: Callable[[float], float],
    ps: float,
    seed: int = 0,
    step_fs: float = STEP_FS,
    head: str | None = None,
) -> Path:
    """Langevin dynamics until the molecule breaks.

    Args:
        model: with one head or several.
        frame: where it begins.
        kelvin: gives the temperature of the thermostat at a time, 0 at the start and 1 at the end.
        ps: the length, if nothing breaks.
        seed: of velocities and thermostat.
        step_fs: the time step.
        head: of the model, the last one if None.
    """
    atoms = prepared(frame, model, kelvin(0.0), seed, head)
    health = Health(atoms, kelvin(0.0))
    dynamics = thermostat(atoms, kelvin(0.0), seed, step_fs)
    path, n = Path(), steps(ps, step_fs)
    for step in range(1, n + 1):
        path.kelvin = kelvin(step / n)
        dynamics.set_temperature(temperature_K=path.kelvin)
        health.hottest = HOTTEST * path.kelvin
        if not _follow(path, dynamics, health, step, step_fs, atoms.get_temperature):
            return path
    path.ps = ps
    return path


def nve(
    model: torch.nn.Module,
    frame: Atoms,
    ps: float,
    seed: int = 0,
    step_fs: float = STEP_FS,
    head: str | None = None,
) -> Path:
    """Dynamics at constant energy from NVE_KELVIN; the arguments are those of `langevin`."""
    atoms = prepared(frame, model, NVE_KELVIN, seed, head)
    health = Health(atoms, NVE_KELVIN)
    dynamics = VelocityVerlet(atoms, step_fs * units.fs)
    path = Path(kelvin=NVE_KELVIN)

    def energy() -> float:
        return 1e3 * float(atoms.get_total_energy()) / len(atoms)

    for step in range(max(steps(ps, step_fs), 2 * SAMPLE)):
        if not _follow(path, dynamics, health, step, step_fs, energy):
            break
    return path


def drift(path: Path) -> float:
    """The slope of the total energy with time, without its sign, in meV per atom and ps; infinite
    where the molecule broke.
    """
    if path.trouble:
        return float("inf")
    return abs(slope(path.times, path.values))


def slope(times: npt.ArrayLike, values: npt.ArrayLike) -> float:
    """Of the straight line through values that are equally certain."""
    return float(np.polyfit(np.asarray(times), np.asarray(values), 1)[0])


def steps(ps: float, step_fs: float = STEP_FS) -> int:
    return max(1, round(1e3 * ps / step_fs))


def _follow(
    path: Path,
    dynamics: MolecularDynamics,
    health: Health,
    step: int,
    step_fs: float,
    value: Callable[[], float],
) -> bool:
    """One step of this number, written down in `path`; whether the molecule is still whole: beyond
    that neighbours can't be counted, of atoms at infinity.
    """
    with np.errstate(all="ignore"):  # a broken molecule may overflow
        dynamics.run(1)
    path.trouble = health.trouble(dynamics.atoms)
    path.ps = step * step_fs / 1e3
    if not path.trouble and step % SAMPLE == 0:
        path.times.append(path.ps)
        path.values.append(float(value()))
    return not path.trouble
