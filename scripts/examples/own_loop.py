"""Attach an adapter, train it in a loop of your own, save it, and merge it into a plain MACE model.

    python scripts/examples/own_loop.py mace_lora/data/ethanol_train.xyz --steps 20

`finetune` and the command `mace_run_train` do this and much more (E0s, restart, protection,
reports); a loop of one's own is for trying out losses or optimisers.
"""

from __future__ import annotations

import argparse
import copy

import ase.io
import torch

from mace_lora import (
    AdapterConfig,
    MaceLoraCalculator,
    adapter_parameters,
    batches,
    fast_steps,
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
model = load_foundation(options.base, dtype=torch.float64)
print(inject(model, AdapterConfig.create("lora", preset="balanced")))
loader = batches(options.frames, model, batch_size=5, shuffle=True)

# Forces alone: energies also need E0s of the same theory, which mace_run_train estimates
optimiser = torch.optim.Adam(adapter_parameters(model).values(), lr=0.01)
step = 0
with fast_steps(model):
    while step < options.steps:
        for batch in loader:
            optimiser.zero_grad()
            output = model(batch.to_dict(), training=True)
            loss = (output["forces"] - batch.forces).square().mean()
            loss.backward()
            optimiser.step()
            print(f"step {step}: RMSE of forces {1000 * loss.item() ** 0.5:.1f} meV/A")
            step += 1
            if step == options.steps:
                break

save_adapter(model, "ethanol_forces_adapter")  # factors alone
torch.save(merge(copy.deepcopy(model)), "ethanol_forces.model")  # plain MACE, for any program
atoms = ase.io.read(options.frames)
atoms.calc = MaceLoraCalculator("ethanol_forces.model")
print(f"energy of the first frame: {atoms.get_potential_energy():.6f} eV")
