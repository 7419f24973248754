"""Fine-tune on frames in memory, then run molecular dynamics with the result.

python scripts/examples/finetune.py mace_lora/data/ethanol_train.xyz --max_num_epochs 2
"""

import argparse

import ase.io
from ase import units
from ase.md.langevin import Langevin

from mace_lora import finetune

parser = argparse.ArgumentParser(description="Fine-tuning and dynamics in Python.")
parser.add_argument("frames", help="anything that ASE reads, with energies and forces")
parser.add_argument("--base", default="mini", help="foundation model: a name or a .model file")
parser.add_argument("--max_num_epochs", type=int, help="by default what suits the frames")
options = parser.parse_args()

frames = ase.io.read(options.frames, index=":")
result = finetune(
    options.base, frames[:-5], test=frames[-5:], max_num_epochs=options.max_num_epochs
)
for row in result.errors:  # pandas.DataFrame(result.errors) shows them as a table
    print(f"{row['set']}: {row['quantity']} {row['after']:.1f} {row['unit']}")
print(*result.verdict, sep="\n")
result.save("my_model")  # models, adapter, page, pictures

atoms = frames[0]
atoms.calc = result.calculator()
dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, fixcm=False)
dynamics.run(20)
print(f"after 10 fs: {atoms.get_potential_energy():.3f} eV, {atoms.get_temperature():.0f} K")
