"""mace-torch's calculator for ASE, with what it computes at each step of a dynamics made faster."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import ase
import numpy as np
import torch
from ase.calculators.calculator import all_changes

from mace_lora.upstream import library
from mace_lora.upstream.graphs import sees_cells
from mace_lora.upstream.neighbours import Neighbours
from mace_lora.upstream.predicting import computing
from mace_lora.upstream.types import Batch

if TYPE_CHECKING:
    from mace_lora.upstream.library import MACECalculator

SKIN = 0.5  # A


def calculator(
    models: Sequence[torch.nn.Module], skin: float = SKIN, **settings: object
) -> MACECalculator:
    """A MACECalculator with the results of mace-torch's, computed by the backend that suits.

    Models that see a cell otherwise than through neighbours get mace-torch's graphs; where the
    models are compiled or padded, all is mace-torch's.

    Args:
        models: one, or a committee. They ask for no gradients of their parameters afterwards.
        skin: A, by which the list of neighbours reaches beyond the cutoff.
        settings: of MACECalculator.
    """
    made = library.calculator(models, **settings)
    if made.use_compile or made.pad_num_atoms or made.pad_num_edges:
        return made
    faster = _Faster(made, skin)
    made.calculate = faster.calculate  # type: ignore[method-assign]
    if not any(map(sees_cells, made.models)):
        made._atoms_to_batch = faster.batch  # type: ignore[method-assign]
    return made


class _Faster:
    """What one MACECalculator does in our way."""

    def __init__(self, made: MACECalculator, skin: float) -> None:
        self._made = made
        self._neighbours = Neighbours(made.r_max, skin)
        self._kept: tuple[Hashable, Batch] | None = None

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Called by ASE."""
        with contextlib.ExitStack() as stack:
            for model in self._made.models:
                stack.enter_context(computing(model))
            type(self._made).calculate(self._made, atoms, properties, system_changes)

    def batch(self, atoms: ase.Atoms) -> Batch:
        """The graph of these atoms; of the last one only what a step changes is made anew."""
        if self._kept is None or self._kept[0] != self._system(atoms):
            made = type(self._made)._atoms_to_batch(self._made, atoms)  # which may add keys
            self._kept = self._system(atoms), made
        batch, pairs = copy.copy(self._kept[1]), self._neighbours.of(atoms)
        like = batch.positions
        batch["edge_index"] = torch.as_tensor(pairs.edges, device=like.device)
        for name, value in (
            ("positions", atoms.get_positions()),
            ("cell", pairs.cell),
            ("shifts", pairs.shifts),
            ("unit_shifts", pairs.unit_shifts),
        ):
            batch[name] = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        return batch

    def _system(self, atoms: ase.Atoms) -> Hashable:
        """All that a graph depends on beside positions and cell."""
        made = self._made
        read = {f"info {key}": atoms.info.get(key) for key in made.info_keys.values()}
        keys = {*made.arrays_keys.values(), made.charges_key, "charges"}
        read |= {f"arrays {key}": atoms.arrays.get(key) for key in keys}
        tables = [sorted(table.items()) for table in (made.info_keys, made.arrays_keys)]
        values = [(name, _bytes(value)) for name, value in sorted(read.items())]
        return atoms.numbers.tobytes(), atoms.pbc.tobytes(), str((made.head, tables)), *values


def _bytes(value: object) -> bytes:
    array = np.asarray(value)
    if array.dtype.hasobject:
        return repr(value).encode()
    return str((array.dtype, array.shape)).encode() + array.tobytes()
