"""Fine-tune a crystal with its stress, then relax atoms and cell with the result.

    python scripts/examples/crystal_stress.py --max_num_epochs 2

The labels here come from a Lennard-Jonesium, so that the program needs no data; yours come from
your own calculations. A stress is trained where the frames have one. The run remarks that E0s are
wrong: such atoms have no energies of real ones.
"""

import argparse

import ase
import numpy as np
from ase.calculators.lj import LennardJones
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE

from mace_lora import finetune

parser = argparse.ArgumentParser(description="A crystal with stress, labelled on the way.")
parser.add_argument("--base", default="mini", help="foundation model: a name or a .model file")
parser.add_argument("--max_num_epochs", type=int, help="by default what suits the frames")
parser.add_argument("--frames", type=int, default=20)
options = parser.parse_args()

# diamond, strained by a few per cent, atoms displaced by 0.05 A
rng = np.random.default_rng(0)
unit = ase.Atoms("C2", [[0, 0, 0], [0.89, 0.89, 0.89]], cell=1.78 * (1 - np.eye(3)), pbc=True)
frames = []
for _ in range(options.frames):
    atoms = unit.repeat((2, 1, 1))
    strain = np.eye(3) + 0.02 * rng.normal(size=(3, 3))
    atoms.set_cell(atoms.cell @ (strain + strain.T) / 2, scale_atoms=True)
    atoms.positions += 0.05 * rng.normal(size=(len(atoms), 3))
    # asked for energy, forces and stress by finetune
    atoms.calc = LennardJones(sigma=1.37, epsilon=0.4, rc=4.0, smooth=True)
    frames.append(atoms)

result = finetune(
    options.base, frames, valid_fraction=0.2, max_num_epochs=options.max_num_epochs, check=False
)
for row in result.errors:
    print(
        f"{row['set']}, {row['quantity']}: {row['before']:.1f} -> {row['after']:.1f} {row['unit']}"
    )

atoms = frames[0]
atoms.calc = result.calculator()
FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=0.05, steps=20)
print(f"volume per atom: {atoms.get_volume() / len(atoms):.3f} A^3")
