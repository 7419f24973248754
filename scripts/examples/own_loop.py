"""Attach an adapter, train it in a loop of your own, save it, and merge it into a plain MACE model.

    python scripts/examples/own_loop.py mace_lora/data/ethanol_train.xyz --steps 20

The command `mace_run_train` does this and much more (restart, checks, fast steps, reports); a loop
of one's own is for trying out losses or optimisers.
"""

from __future__ import annotations

import argparse
import copy

import ase.io
import torch
from mace.calculators import MACECalculator
from mace.data import AtomicData, KeySpecification, config_from_atoms
from mace.tools import AtomicNumberTable
from mace.tools.torch_geometric.dataloader import DataLoader

from mace_lora import (
    AdapterConfig,
    adapter_parameters,
    inject,
    load_foundation,
    merge,
    save_adapter,
)

parser = argparse.ArgumentParser(description="LoRA in a training loop of your own.")
parser.add_argument("frames", help="extended xyz with REF_energy (eV) and REF_forces (eV/A)")
parser.add_argument("--base", default="mini", help="foundation model: a name or a .model file")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model = load_foundation(options.base, dtype=torch.float64)
print(inject(model, AdapterConfig.create("lora", preset="balanced")))

# mace-torch's batches, with labels under its default names
labels = KeySpecification({"energy": "REF_energy"}, {"forces": "REF_forces"})
elements = AtomicNumberTable([int(z) for z in model.atomic_numbers])
frames = [
    AtomicData.from_config(
        config_from_atoms(atoms, key_specification=labels),
        z_table=elements,
        cutoff=float(model.r_max),
    )
    for atoms in ase.io.read(options.frames, index=":")
]
loader = DataLoader(frames, batch_size=5, shuffle=True, drop_last=True)

# Forces alone: energies also need E0s of the same theory, which mace_run_train estimates
optimiser = torch.optim.Adam(adapter_parameters(model).values(), lr=0.01)
step = 0
while step < options.steps:
    for batch in loader:
        optimiser.zero_grad()
        output = model(batch.to_dict(), training=True, compute_force=True)
        loss = (output["forces"] - batch.forces).square().mean()
        loss.backward()
        optimiser.step()
        print(f"step {step}: RMSE of forces {1000 * loss.item() ** 0.5:.1f} meV/A")
        step += 1
        if step == options.steps:
            break

save_adapter(model, "ethanol_forces_adapter")  # factors alone
plain = merge(copy.deepcopy(model))  # an ordinary MACE model ...
torch.save(plain, "ethanol_forces.model")
atoms = ase.io.read(options.frames)
atoms.calc = MACECalculator("ethanol_forces.model", default_dtype="float64")  # ... for any program
print(f"energy of the first frame: {atoms.get_potential_energy():.6f} eV")
