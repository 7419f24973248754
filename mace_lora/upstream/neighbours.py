"""The pairs of atoms that a model sees, from a list that is kept while the atoms move a little."""

from __future__ import annotations

from dataclasses import dataclass

import ase
import numpy as np
import numpy.typing as npt

from mace_lora.upstream import names as upstream

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """Edges of a graph, each from both ends.

    Attributes:
        edges: (2, n_edges), sender and receiver.
        unit_shifts: (n_edges, 3), lattice vectors from the receiver to its image.
        cell: (3, 3), rows in A; in directions that are not periodic mace-torch's long ones.
    """

    edges: Whole
    unit_shifts: Whole
    cell: Floats

    @property
    def shifts(self) -> Floats:
        """(n_edges, 3), A."""
        return np.asarray(self.unit_shifts @ self.cell)


@dataclass(frozen=True)
class _List:
    """All pairs within cutoff and skin, and what they were found for."""

    pairs: Pairs
    positions: Floats
    cell: Floats
    pbc: tuple[bool, ...]


class Neighbours:
    """Pairs closer than `cutoff` (A), those of mace-torch in another order.

    A list of pairs within cutoff + skin holds all of them until an atom has moved by half of the
    skin; then, or in another cell, it is made anew.

    Args:
        cutoff: of the model, A.
        skin: A; 0 makes a list for every new geometry.

    Attributes:
        made: lists so far.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        self.cutoff, self.skin = cutoff, skin
        self.made = 0
        self._list: _List | None = None

    def of(self, atoms: ase.Atoms) -> Pairs:
        """The pairs of these atoms."""
        positions, cell = atoms.get_positions(), np.array(atoms.get_cell())
        pbc = tuple(atoms.get_pbc().tolist())
        if self._list is None or not self._holds(self._list, positions, cell, pbc):
            self._list = self._found(positions, cell, pbc)
        near = self._list.pairs
        vectors = positions[near.edges[1]] - positions[near.edges[0]] + near.shifts
        inside = np.einsum("ij,ij->i", vectors, vectors) < self.cutoff**2
        edges = np.compress(inside, near.edges, axis=1)
        return Pairs(edges, near.unit_shifts[inside], self._padded(near.cell, pbc, positions))

    def _holds(self, known: _List, positions: Floats, cell: Floats, pbc: tuple[bool, ...]) -> bool:
        if known.pbc != pbc or known.positions.shape != positions.shape:
            return False
        moved = ((positions - known.positions) ** 2).sum(axis=1).max(initial=0.0)
        # Not a number holds nothing
        return bool(np.array_equal(known.cell, cell) and moved <= (self.skin / 2) ** 2)

    def _found(self, positions: Floats, cell: Floats, pbc: tuple[bool, ...]) -> _List:
        self.made += 1
        edges, _, unit_shifts, padded = upstream.original("neighbours")(
            positions=positions, cutoff=self.cutoff + self.skin, pbc=pbc, cell=cell.copy()
        )
        pairs = Pairs(edges.astype(np.int64), unit_shifts.astype(np.int64), padded)
        return _List(pairs, positions, cell, pbc)

    def _padded(self, cell: Floats, pbc: tuple[bool, ...], positions: Floats) -> Floats:
        """What mace-torch makes of a cell: a stress is divided by its volume."""
        long = 5.0 * self.cutoff * (np.abs(positions).max() + 1.0)
        return np.where(np.array(pbc)[:, None], cell, long * np.eye(3))
