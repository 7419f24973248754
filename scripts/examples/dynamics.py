"""Relax a molecule and run molecular dynamics with a base model and an adapter, in ASE.

    python scripts/examples/dynamics.py my_model_adapter START.xyz --base mini --steps 100

Prints the drift of the total energy: in NVE it should stay far below the kinetic energy.
"""

from __future__ import annotations

import argparse

import ase.io
import numpy as np
from ase import units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from mace_lora import MaceLoraCalculator

parser = argparse.ArgumentParser(description="Relaxation and NVE dynamics with an adapter.")
parser.add_argument("adapter", help="the adapter's folder")
parser.add_argument("start", help="a file with the atoms, in any format of ASE")
parser.add_argument("--base", default="mini", help="the foundation model of the adapter")
parser.add_argument("--steps", type=int, default=100, help="of 0.5 fs")
parser.add_argument("--temperature", type=float, default=300.0, help="in K")
options = parser.parse_args()

atoms = ase.io.read(options.start)
atoms.calc = MaceLoraCalculator(options.base, options.adapter, default_dtype="float64")
BFGS(atoms, logfile=None).run(fmax=0.05, steps=50)
print(f"relaxed: {atoms.get_potential_energy():.4f} eV")

rng = np.random.default_rng(0)
MaxwellBoltzmannDistribution(atoms, temperature_K=options.temperature, rng=rng)
Stationary(atoms)
dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs, trajectory="dynamics.traj")
energies: list[float] = []
dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
dynamics.run(options.steps)
drift = 1000 * (energies[-1] - energies[0]) / len(atoms)
print(f"{options.steps} steps at {options.temperature:g} K: the total energy moved by ", end="")
print(f"{drift:+.3f} meV per atom; trajectory in dynamics.traj")
