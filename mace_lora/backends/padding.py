"""Batches of a few fixed shapes.

A batch is filled up with one fake structure of atoms far from everything and edges longer than the
cutoff, whose contribution is exactly zero, and with empty structures where it has fewer than the
shape. Energies, forces and stresses of the real ones are the first rows of the results.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# What a MACE model for energies reads of a batch
KEYS = (
    *("positions", "node_attrs", "edge_index", "shifts", "unit_shifts"),
    *("cell", "batch", "ptr", "head"),
)
ROOM = 1.05  # a new shape has room for batches that are a little larger
MOST_WASTED = 0.25  # of the edges, before a batch gets a shape of its own

Data = dict[str, Tensor]


@dataclass(frozen=True, order=True)
class Shape:
    """Sizes of a padded batch, its fake structure and atoms included."""

    edges: int
    atoms: int
    structures: int

    @classmethod
    def around(cls, edges: int, atoms: int, structures: int) -> Shape:
        """A shape for batches of about so many."""
        return cls(int(edges * ROOM) // 8 * 8 + 8, int(atoms * ROOM) + 1, structures + 1)

    def suits(self, edges: int, atoms: int, structures: int) -> bool:
        """Whether a batch of so many can be padded to it, and wastes little."""
        holds = edges <= self.edges and atoms < self.atoms and structures < self.structures
        return holds and (self.edges - edges <= max(8, MOST_WASTED * self.edges))


def sizes(data: Data) -> tuple[int, int, int]:
    """(edges, atoms, structures) of a batch."""
    return data["edge_index"].shape[1], data["positions"].shape[0], data["ptr"].shape[0] - 1


def shape_for(data: Data, known: Iterable[Shape]) -> Shape:
    """The smallest of the known shapes that suits the batch, or else a new one."""
    real = sizes(data)
    return min((s for s in known if s.suits(*real)), default=Shape.around(*real))


def pad(data: Data, shape: Shape, r_max: float) -> Data:
    """The batch `data` with exactly the sizes of `shape`; only what is in KEYS, detached.

    Args:
        data: a batch as mace-torch's `Batch.to_dict` gives it.
        shape: one that suits it.
        r_max: the cutoff, in Å; fake edges are twice as long.
    """
    edges, atoms, structures = sizes(data)
    more_edges, more_atoms = shape.edges - edges, shape.atoms - atoms
    more = shape.structures - structures
    vector = data["positions"].new_tensor([[1.0, 0.0, 0.0]])
    box = 2 * r_max * torch.eye(3, dtype=vector.dtype, device=vector.device)
    attributes = torch.zeros_like(data["node_attrs"][:1])
    attributes[:, 0] = 1
    ends = data["ptr"].new_full((more,), atoms)
    ends[-1] = shape.atoms
    fake = {
        "positions": torch.zeros_like(vector).expand(more_atoms, -1),
        "node_attrs": attributes.expand(more_atoms, -1),
        "edge_index": data["edge_index"].new_full((2, more_edges), shape.atoms - 1),
        "shifts": (2 * r_max * vector).expand(more_edges, -1),
        "unit_shifts": vector.expand(more_edges, -1).to(data["unit_shifts"].dtype),
        "cell": box.repeat(more, 1),
        "batch": data["batch"].new_full((more_atoms,), shape.structures - 1),
        "ptr": ends,
        "head": data["head"].new_zeros(more),
    }
    dims = {"edge_index": 1}
    return {k: torch.cat([data[k].detach(), fake[k]], dim=dims.get(k, 0)) for k in KEYS}
