"""Models with known faults."""

from __future__ import annotations

import torch


class PairFault(torch.nn.Module):
    """A model with one more energy for pairs closer than 0.8 A: `strength` * (0.8 - d)**2 eV."""

    def __init__(self, model: torch.nn.Module, strength: float) -> None:
        super().__init__()
        self.model = model
        self.strength = strength
        self.heads = model.heads
        self.atomic_energies_fn = model.atomic_energies_fn
        for name in ("atomic_numbers", "r_max"):
            self.register_buffer(name, getattr(model, name))

    def forward(self, data: dict[str, torch.Tensor], **keywords: object) -> dict[str, torch.Tensor]:
        output = dict(self.model(data, **keywords))
        positions = data["positions"].detach().requires_grad_()
        sender, receiver = data["edge_index"]
        lengths = torch.linalg.norm(positions[receiver] - positions[sender], dim=1)
        pairs = self.strength * torch.relu(0.8 - lengths) ** 2 / 2  # each pair is there twice
        per_atom = torch.zeros_like(positions[:, 0]).index_add(0, sender, pairs)
        (gradient,) = torch.autograd.grad(per_atom.sum(), positions)
        energy = output["energy"]
        output["energy"] = energy + torch.zeros_like(energy).index_add(
            0, data["batch"], per_atom.detach()
        )
        output["forces"] = output["forces"] - gradient
        return output
