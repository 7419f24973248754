"""E0s solved again while a model learns.

Training on forces moves the mean of the energies, and E0s that were estimated before the first step
then stand wrong. The part of the energy error that is linear in the composition has a closed form.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from ase.data import chemical_symbols

from mace_lora.model.description import Description, atomic_numbers
from mace_lora.training.epochs import processes
from mace_lora.training.epochs.computing import Computing
from mace_lora.training.record import Run
from mace_lora.upstream import library
from mace_lora.upstream.predicting import has
from mace_lora.upstream.types import Dataset, Graph

MOST_FRAMES = 256  # on which they are solved
# Directions of composition that differ less than this, relative to the one that differs most, are
# left as they are: what they would give is noise
RCOND = 1e-2

Array = npt.NDArray[np.float64]


def of_model(model: torch.nn.Module) -> torch.Tensor | None:
    """The E0s as they stand, a copy: (heads, elements) or (elements,), eV; None where there are
    none, or where they are trained themselves.
    """
    block = getattr(model, "atomic_energies_fn", None)
    buffers = {} if block is None else dict(block.named_buffers(recurse=False))
    found = buffers.get("atomic_energies")
    return None if found is None else found.detach().cpu().clone()


@torch.no_grad()
def put(model: torch.nn.Module, energies: torch.Tensor | None) -> None:
    """Give a model the E0s that `of_model` has returned."""
    if energies is not None:
        model.get_submodule("atomic_energies_fn").get_buffer("atomic_energies").copy_(energies)


def described(run: Run, model: torch.nn.Module) -> Description:
    """The model that a run started from, with the E0s that `model` has by now."""
    now = of_model(model)
    if now is None:
        return run.started.start
    return {**run.started.start, "atomic_energies": now.view(-1, now.shape[-1]).tolist()}


def smallest_change(compositions: Array, errors: Array) -> Array:
    """The change of E0s that leaves the least energy error per atom, the smallest of its kind.

    Args:
        compositions: how many atoms of each element, (frames, elements).
        errors: label minus prediction, eV, (frames,).

    Returns:
        eV, (elements,); 0 along what the compositions don't determine.
    """
    atoms = compositions.sum(axis=1, keepdims=True)
    found: Array = np.linalg.lstsq(compositions / atoms, errors / atoms[:, 0], rcond=RCOND)[0]
    return found


class Solver:
    """Solves the E0s of a run again, on its training frames.

    Args:
        model: with its adapters; not the copy for several processes.
        dataset: the training frames.
        heads: whose E0s may move: those that were estimated, and not given.
        computing: where the run computes.
        parts: cuts frames to those that are predicted at once.
        seed: chooses MOST_FRAMES where there are more.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dataset: Dataset,
        heads: set[int],
        computing: Computing,
        parts: Callable[[list[Graph]], list[list[Graph]]],
        seed: int,
    ) -> None:
        self._model, self._computing = model, computing
        self._start = of_model(model)
        order = np.random.default_rng(seed).permutation(len(dataset))
        found = (dataset[int(i)] for i in order)
        usable = (g for g in found if has(g, "energy") and int(g["head"]) in heads)
        graphs = list(itertools.islice(usable, MOST_FRAMES))
        self._active = self._start is not None and bool(graphs)
        self._heads = np.array([int(graph["head"]) for graph in graphs])
        counts = [graph.node_attrs.sum(dim=0).double().numpy() for graph in graphs]
        self._compositions = np.array(counts)
        self._batches = [library.batch(part) for part in parts(graphs)]

    @torch.no_grad()
    def solve(self, distributed: bool = False) -> None:
        """Move the model's E0s to where the energies of the frames are, at its present weights."""
        if not self._active:
            return
        errors = self._errors()
        moved = of_model(self._model)
        assert moved is not None
        rows = moved.view(-1, moved.shape[-1])
        for head in np.unique(self._heads):
            own = self._heads == head
            change = smallest_change(self._compositions[own], errors[own])
            rows[min(int(head), len(rows) - 1)] += torch.from_numpy(change).to(rows)
        device = next(self._model.parameters()).device
        put(self._model, processes.of_the_first(moved, device, distributed))

    def tell(self) -> None:
        """Log by how much the E0s have moved since the start."""
        now = of_model(self._model)
        if not self._active or now is None or self._start is None:
            return
        change = 1e3 * (now - self._start).view(-1, now.shape[-1])
        elements = [chemical_symbols[z] for z in atomic_numbers(self._model)]
        texts = [
            ", ".join(f"{e} {c:+.1f}" for e, c in zip(elements, row.tolist(), strict=True) if c)
            for row in change
        ]
        logging.info(
            f"E0s were solved again at each validation, on {len(self._heads)} training frames; "
            f"they moved by (meV): {'; '.join(text or 'nothing' for text in texts)}"
        )

    def _errors(self) -> Array:
        """Label minus prediction of the frames, eV."""
        device = next(self._model.parameters()).device
        errors = []
        with self._computing.active(self._model):
            for batch in self._batches:
                inputs = batch.to(device).to_dict()
                output = self._model(inputs, training=False, compute_force=False)
                errors.append((batch.energy.double() - output["energy"].double()).cpu().numpy())
        return np.concatenate(errors)
