"""Train a committee on a few frames, see how sure it is, and pick the frames to label next.

    python scripts/examples/committee.py TRAIN.xyz POOL.xyz --members 2 --max_num_epochs 2

The deviations are calibrated on validation frames, split off from the first file. Flags that are
not of this program go to the training.
"""

import argparse
import subprocess
import sys

import ase.io

from mace_lora import MaceLoraCalculator

parser = argparse.ArgumentParser(description="A committee, its deviations, and what to label next.")
parser.add_argument("frames", help="extended xyz with REF_energy (eV) and REF_forces (eV/A)")
parser.add_argument("pool", help="frames without labels, in any format of ASE")
parser.add_argument("--base", default="mini", help="foundation model: a name or a .model file")
parser.add_argument("--members", default=4, help="adapters to train")
parser.add_argument("--number", default=3, help="of frames to take from the pool")
parser.add_argument("--max_num_epochs", type=int, help="by default what suits the frames")
options = parser.parse_args()

command = [sys.executable, "-m", "mace_lora"]
train = [
    "train",
    f"--train_file={options.frames}",
    f"--foundation_model={options.base}",
    "--name=my",
]
train += ["--lora=True", "--lora_preset=balanced", f"--members={options.members}", "--bootstrap"]
train += [f"--max_num_epochs={options.max_num_epochs}"] if options.max_num_epochs else []
subprocess.run([*command, *train], check=True)

atoms = ase.io.read(options.pool, index=0)
atoms.calc = MaceLoraCalculator(options.base, "my_committee")
energy, found = atoms.get_potential_energy(), atoms.calc.results
print(f"first frame: {energy:.3f} eV, standard deviation {1000 * found['energy_std']:.1f} meV")
print(f"its forces: standard deviation up to {1000 * found['forces_std'].max():.0f} meV/A")

select = ["select", options.pool, f"--base={options.base}", "--adapter=my_committee"]
select += [f"--number={options.number}", "--output=next.xyz"]
subprocess.run([*command, *select], check=True)
