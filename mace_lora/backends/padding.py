"""Batches of a few fixed shapes: what a graph needs that is traced, compiled or captured once.

A batch is filled up with one fake structure of atoms far from everything and edges longer than the
cutoff, whose contribution is exactly zero, and with empty structures where it has fewer than the
shape. Energies, forces and stresses of the real ones are the first rows of the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What a MACE model for energies reads of a batch
KEYS = (
    *("positions", "node_attrs", "edge_index", "shifts", "unit_shifts"),
    *("cell", "batch", "ptr", "head"),
)
# Wasted edges, on average, that are accepted before another shape is added
WASTE = 0.10
MOST_SHAPES = 4

Data = dict[str, Tensor]
# Along the edges, and along the atoms; all else is one for each structure
PER_EDGE = ("edge_index", "shifts", "unit_shifts")
PER_ATOM = ("positions", "node_attrs", "batch", "forces", "charges", "density_coefficients")


@dataclass(frozen=True, order=True)
class Shape:
    """Sizes of a padded batch, its fake structure and atoms included."""

    edges: int
    atoms: int
    structures: int

    @classmethod
    def around(cls, edges: int, atoms: int, structures: int) -> Shape:
        """The shape that holds so many, with room for one fake structure of one atom."""
        return cls(_round_up(edges), atoms + 1, structures + 1)

    def holds(self, real: tuple[int, int, int]) -> bool:
        """Whether a batch of so many (edges, atoms, structures) can be padded to it."""
        edges, atoms, structures = real
        return edges <= self.edges and atoms < self.atoms and structures < self.structures


class Padded(dict[str, Tensor]):
    """A batch with the sizes of a shape.

    Attributes:
        shape: of which it is.
        real: its edges, atoms and structures that are no padding: the first ones.
        stays: whether the tensors stay where they are, and the next batch comes to the same place.
    """

    def __init__(
        self, data: Data, shape: Shape, real: tuple[int, int, int], *, stays: bool = False
    ) -> None:
        super().__init__(data)
        self.shape, self.real, self.stays = shape, real, stays

    def unpadded(self) -> Data:
        """The batch itself, without what it was filled up with."""
        edges, atoms, structures = self.real
        found = {}
        for key, value in self.items():
            if key in PER_EDGE:
                found[key] = value[..., :edges] if key == "edge_index" else value[:edges]
            elif key in PER_ATOM:
                found[key] = value[:atoms]
            elif key == "ptr":
                found[key] = value[: structures + 1]
            else:  # a cell has three rows
                rows = value.shape[0] // self.shape.structures
                found[key] = value[: structures * rows]
        return found


def _round_up(edges: int) -> int:
    """To a multiple of 1/32 of the next power of two: at most 6 % more, and vectors stay whole."""
    step = max(8, 1 << max(0, edges.bit_length() - 5))
    return -(-edges // step) * step


def sizes(data: Data) -> tuple[int, int, int]:
    """(edges, atoms, structures) of a batch."""
    return data["edge_index"].shape[1], data["positions"].shape[0], data["ptr"].shape[0] - 1


def plan(batches: Iterable[tuple[int, int, int]]) -> tuple[list[Shape], float]:
    """Shapes for batches of the given (edges, atoms, structures), and the share of wasted edges.

    Every batch has a shape that holds it. Shapes are added, up to MOST_SHAPES, while they waste
    more than WASTE of the edges.
    """
    found = sorted(batches)
    edges, shapes, waste = sum(b[0] for b in found), [], 0.0
    for count in range(1, MOST_SHAPES + 1):
        ends = _best_ends([_round_up(b[0]) for b in found], count)
        shapes = [_around_all(found[:end]) for end in ends]
        padded = sum(
            shape.edges * (end - start)
            for shape, start, end in zip(shapes, [0, *ends], ends, strict=False)
        )
        waste = 1 - edges / max(1, padded)
        if waste <= WASTE:
            break
    return shapes, waste


def _best_ends(sizes: list[int], count: int) -> list[int]:
    """Where to cut sorted sizes into at most `count` groups, so that least is wasted.

    Every member of a group is padded to its last one. Dynamic programming over the groups.
    """
    n = len(sizes)
    # cost and cuts of the first j sizes
    best: list[tuple[int, list[int]]] = [
        (j * sizes[j - 1], [j]) if j else (0, []) for j in range(n + 1)
    ]
    for _ in range(count - 1):
        best = [
            min((best[i][0] + (j - i) * sizes[j - 1], [*best[i][1], j]) for i in range(j))
            if j
            else (0, [])
            for j in range(n + 1)
        ]
    return best[n][1]


def _around_all(batches: Sequence[tuple[int, int, int]]) -> Shape:
    return Shape.around(*(max(b[i] for b in batches) for i in range(3)))


def pad(data: Data, shape: Shape, r_max: float) -> Padded:
    """The batch `data` with exactly the sizes of `shape`; only what is in KEYS.

    Args:
        data: a batch as mace-torch's `Batch.to_dict` gives it.
        shape: one that holds it.
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
    filled = {k: torch.cat([data[k], fake[k]], dim=1 if k == "edge_index" else 0) for k in KEYS}
    return Padded(filled, shape, (edges, atoms, structures))
