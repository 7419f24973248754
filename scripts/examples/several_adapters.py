"""One base, several adapters: switch between them, go without, a committee, a combination.

    python scripts/examples/several_adapters.py one_adapter other_adapter TEST.xyz --base mini

The adapters must be for the same elements.
"""

from __future__ import annotations

import argparse

import ase.io
import torch

from mace_lora import MaceLoraCalculator, combine_adapters, load_adapter, set_adapter, unload

parser = argparse.ArgumentParser(description="Several adapters of one foundation model.")
parser.add_argument("one", help="an adapter's folder")
parser.add_argument("other", help="another's")
parser.add_argument("frames", help="a file with atoms; the first frame is used")
parser.add_argument("--base", default="mini", help="the foundation model of both")
options = parser.parse_args()

atoms = ase.io.read(options.frames)
atoms.calc = MaceLoraCalculator(options.base, options.one, default_dtype="float64")
print(f"{options.one}: {atoms.get_potential_energy():.6f} eV")
atoms.calc.set_adapter(options.other)  # the base is not read again
print(f"{options.other}: {atoms.get_potential_energy():.6f} eV")
atoms.calc.set_adapter([options.one, options.other])
energy = atoms.get_potential_energy()
spread = float(atoms.calc.results["energy_var"]) ** 0.5
print(f"both as a committee: {energy:.6f} eV, standard deviation {spread:.6f} eV")

# The same with models instead of a calculator
model = load_adapter(options.base, options.one)
set_adapter(model, options.other)
unload(model)  # what the run of the adapter started from
mixed = combine_adapters(options.base, {options.one: 0.5, options.other: 0.5})
torch.save(mixed, "mixed.model")  # a plain MACE model
atoms.calc = MaceLoraCalculator(mixed, default_dtype="float64")
print(f"half of each, as one model: {atoms.get_potential_energy():.6f} eV")
