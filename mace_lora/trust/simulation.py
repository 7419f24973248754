"""A dynamics that is written down as it goes, and what to think of it at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field, fields

import numpy as np
from ase import Atoms, units
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet

from mace_lora.trust import dynamics
from mace_lora.trust.checks import DRIFT, SHORTEST_NVE


@dataclass(frozen=True)
class Settings:
    """Of a dynamics: nvt or nve, K, fs, a random seed, steps from one sample to the next."""

    ensemble: str
    kelvin: float
    steps: int
    step_fs: float
    seed: int
    every: int


@dataclass(frozen=True)
class Sample:
    """One line of the log; energies of all atoms together."""

    step: int
    time_ps: float
    potential_eV: float
    kinetic_eV: float
    total_eV: float
    temperature_K: float

    @classmethod
    def of(cls, atoms: Atoms, step: int, step_fs: float) -> Sample:
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        total, kelvin = potential + kinetic, atoms.get_temperature()
        values = (potential, kinetic, total, kelvin)
        return cls(step, step * step_fs / 1e3, *map(float, values))


COLUMNS = tuple(f.name for f in fields(Sample))


@dataclass
class Run:
    """What became of a dynamics.

    Attributes:
        n_atoms: of the system.
        samples: its log.
        trouble: what is the matter with the atoms, "" if nothing.
        since_ps: picoseconds until that was seen.
    """

    n_atoms: int
    samples: list[Sample] = field(default_factory=list)
    trouble: str = ""
    since_ps: float = 0.0

    @property
    def length_ps(self) -> float:
        return self.samples[-1].time_ps

    def column(self, name: str) -> np.ndarray:
        """(n_samples,) of COLUMNS."""
        return np.array([astuple(s)[COLUMNS.index(name)] for s in self.samples])

    def drift(self) -> float | None:
        """The slope of the total energy with time, meV per atom and ps; None for runs too short:
        vibrations would look like a drift.
        """
        if self.length_ps < SHORTEST_NVE or len(self.samples) < 3:
            return None
        times, energies = self.column("time_ps"), self.column("total_eV")
        return 1e3 * dynamics.slope(times, energies) / self.n_atoms

    def mean_kelvin(self) -> float:
        """Over the second half."""
        kelvin = self.column("temperature_K")
        return float(kelvin[len(kelvin) // 2 :].mean())


def simulate(atoms: Atoms, settings: Settings, written: Callable[[Atoms, Sample], None]) -> Run:
    """Run a dynamics from random velocities; it ends before its time where atoms collapse, fly
    apart or become too hot, and goes on where a bond breaks.

    Args:
        atoms: with a calculator; they are moved.
        settings: of the dynamics.
        written: gets each sample and the atoms as they are then.
    """
    rng = np.random.default_rng(settings.seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=settings.kelvin, rng=rng)
    if len(atoms) > 1:
        Stationary(atoms)
    health = dynamics.Health(atoms, settings.kelvin)
    mover, run = _mover(atoms, settings), Run(len(atoms))
    for step in range(0, settings.steps + 1, settings.every):
        if step:
            with np.errstate(all="ignore"):  # a broken molecule may overflow
                mover.run(settings.every)
        trouble = health.trouble(atoms)
        if trouble and not run.trouble:
            run.trouble, run.since_ps = trouble, step * settings.step_fs / 1e3
        if trouble == dynamics.NOT_A_NUMBER:
            break
        run.samples.append(Sample.of(atoms, step, settings.step_fs))
        written(atoms, run.samples[-1])
        if trouble not in ("", dynamics.BOND_BROKE):
            break
    return run


def problems(run: Run, settings: Settings) -> list[str]:
    """What is wrong with a run, in words; nothing where it is sound."""
    found = []
    if run.trouble:
        found.append(f"{run.trouble} at {run.since_ps:.3f} ps")
    drift = run.drift()
    if settings.ensemble == "nve" and drift is not None and not abs(drift) <= DRIFT:
        found.append(f"the energy drifts by {drift:+.3g} meV per atom and ps, limit {DRIFT:g}")
    return found


def _mover(atoms: Atoms, settings: Settings) -> MolecularDynamics:
    if settings.ensemble == "nve":
        return VelocityVerlet(atoms, settings.step_fs * units.fs)
    return dynamics.thermostat(atoms, settings.kelvin, settings.seed, settings.step_fs)
