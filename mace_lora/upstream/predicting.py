"""Frames as mace-torch's batches, and what a model predicts for them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import ase
import numpy as np
import torch
from torch.nn.utils import parametrize

from mace_lora.backends.choice import serving
from mace_lora.errors import MergeMismatch
from mace_lora.model.description import atomic_numbers
from mace_lora.model.description import heads as heads_of
from mace_lora.upstream import library
from mace_lora.upstream import names as upstream
from mace_lora.upstream.graphs import Configuration, Graphs
from mace_lora.upstream.inputs import inputs_of
from mace_lora.upstream.precision import default_dtype
from mace_lora.upstream.types import Batch, Dataset, Graph

T = TypeVar("T")
# Atoms that are predicted at once, so that large frames go one by one
MOST_ATOMS = 2000
# Outputs that are compared when a merge is proved; a model gives some of them
OUTPUTS = ("energy", "forces", "stress", "dipole", "polarizability")
# Largest relative difference between adapted and merged model that is rounding
MERGE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@contextlib.contextmanager
def computing(model: torch.nn.Module) -> Iterator[None]:
    """`model` predicts for the length of a block, by the backend that suits it: all predictions of
    the package pass here.

    Its weights must not change meanwhile, and forces have a graph to positions, not to parameters.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    backend = serving(model)
    cached = parametrize.cached() if backend.caches_weights else contextlib.nullcontext()
    try:
        for parameter in trainable:
            parameter.requires_grad = False
        with backend.active(model), cached:
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad = True


def predict(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    device: str | torch.device | None = None,
    compute_stress: bool = False,
    forces: bool = True,
) -> dict[str, torch.Tensor]:
    """Energies (eV), forces (eV/A) and whatever else of OUTPUTS the model gives, over `batches`."""
    extra = {"compute_stress": True} if compute_stress else {}
    extra |= {} if forces else {"compute_force": False}
    device = device or next(model.parameters()).device
    results: dict[str, list[torch.Tensor]] = {}
    with computing(model), torch.set_grad_enabled(forces or compute_stress):
        for batch in batches:
            output = model(batch.to(device).to_dict(), training=False, **extra)
            for key in OUTPUTS:
                if output.get(key) is not None:
                    results.setdefault(key, []).append(output[key].detach())
    return {key: torch.cat(values) for key, values in results.items()}


def largest_difference(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """Per output of both: the largest difference, absolute and relative to the largest value."""
    found = {}
    for key in (k for k in one if k in other):
        difference = (one[key] - other[key]).abs().max().item() if one[key].numel() else 0.0
        size = one[key].abs().max().item() if one[key].numel() else 1.0
        found[key] = (difference, difference / max(size, torch.finfo(one[key].dtype).tiny))
    return found


def prove_merge(
    before: dict[str, torch.Tensor],
    merged: torch.nn.Module,
    batches: Iterable[Batch],
    otherwise: str,
) -> dict[str, tuple[float, float]]:
    """That a merged model predicts for `batches` what the adapted one did.

    Args:
        before: what the adapted model predicted for them.
        merged: the same model with its adapters merged.
        batches: frames of mace-torch.
        otherwise: what an error says of the files that are not written then.

    Returns:
        The largest differences, as in `largest_difference`.

    Raises:
        MergeMismatch: they are more than rounding.
    """
    found = largest_difference(before, predict(merged, batches))
    tolerance = MERGE_TOLERANCE[next(merged.parameters()).dtype]
    if any(not relative <= tolerance for _, relative in found.values()):
        raise MergeMismatch(
            f"the merged model differs from the adapted one by {differences_text(found)}, more "
            f"than the relative {tolerance:.0e} allowed; {otherwise}"
        )
    return found


def differences_text(found: dict[str, tuple[float, float]]) -> str:
    """`energy 1.2e-12 (relative 3.4e-15), forces ...` of what `largest_difference` found."""
    return ", ".join(f"{k} {a:.1e} (relative {r:.1e})" for k, (a, r) in found.items())


def in_parts(
    frames: Iterable[T],
    n_atoms: Callable[[T], int],
    most_atoms: float,
    most_frames: float = math.inf,
) -> Iterator[list[T]]:
    """`frames` in their order, so many at once; a single one may have more atoms."""
    part: list[T] = []
    atoms = 0
    for frame in frames:
        size = n_atoms(frame)
        if part and (atoms + size > most_atoms or len(part) == most_frames):
            yield part
            part, atoms = [], 0
        part.append(frame)
        atoms += size
    yield part


def batch_of(dataset: Dataset, n_frames: int, most_atoms: float = math.inf) -> list[Batch]:
    """The first frames of a data set as one batch (a list of one), or an empty list.

    Args:
        dataset: of mace-torch.
        n_frames: so many, or fewer where there are fewer.
        most_atoms: in the batch; the first frame may have more.
    """
    graphs = first_of(dataset, n_frames)
    frames = next(in_parts(graphs, lambda graph: len(graph.positions), most_atoms))
    return [library.batch(frames)] if frames else []


def first_of(dataset: Dataset, n_frames: int, label: str | None = None) -> list[Graph]:
    """The first frames of a data set, or fewer where there are fewer; those that have a label,
    looked for among the first hundred times as many.
    """
    items = (dataset[i] for i in range(min(100 * n_frames, len(dataset))))
    chosen = (graph for graph in items if label is None or has(graph, label))
    return list(itertools.islice(chosen, n_frames))


def has(graph: Graph, label: str) -> bool:
    """Whether a graph has a label that weighs anything."""
    if getattr(graph, label, None) is None:
        return False
    weight: torch.Tensor = getattr(graph, f"{label}_weight")
    return bool((weight > 0).any())


def atoms_of(dataset: Dataset, model: torch.nn.Module, n_frames: int) -> list[ase.Atoms]:
    """The first frames of a data set of mace-torch as `ase.Atoms`, labelled by the default keys."""
    numbers = np.array(atomic_numbers(model))
    inputs = inputs_of(model).values()
    found = []
    for i in range(min(n_frames, len(dataset))):
        data = dataset[i]
        atoms = ase.Atoms(
            numbers[data.node_attrs.argmax(dim=1).numpy()],
            data.positions.numpy(),
            cell=None if data.cell is None else data.cell.reshape(3, 3).numpy(),
            pbc=None if data.pbc is None else data.pbc.reshape(3).numpy(),
        )
        for name, place in (("energy", atoms.info), ("forces", atoms.arrays)):
            if has(data, name):
                place[f"REF_{name}"] = getattr(data, name).numpy()
        if data.stress is not None and has(data, "stress"):
            atoms.info["REF_stress"] = data.stress.reshape(3, 3).numpy()
        for item in inputs:
            place = atoms.arrays if item.per_atom else atoms.info
            place[item.key] = getattr(data, item.name).numpy()
        found.append(atoms)
    return found


def frames_to_batch(
    frames: Iterable[ase.Atoms], model: torch.nn.Module, head: str | None = None
) -> Batch:
    """ASE frames as one batch for `model`, in its precision, on its device.

    Args:
        frames: with labels under mace-torch's default keys (REF_energy, REF_forces).
        model: gives elements, cutoff and heads.
        head: of the model, the last one if None.
    """
    return _batch(frames_to_data(frames, model, head), model)


def frames_to_data(
    frames: Iterable[ase.Atoms], model: torch.nn.Module, head: str | None = None
) -> list[Graph]:
    """ASE frames as a data set of mace-torch; the arguments are those of `frames_to_batch`."""
    specification = upstream.original("update_keys")(
        upstream.original("keys")(), upstream.original("default_keys")()
    )
    read = upstream.original("configuration")
    head = head or heads_of(model)[-1]
    return graphs_of(
        [read(atoms, key_specification=specification, head_name=head) for atoms in frames], model
    )


def configurations_to_batch(frames: Iterable[Configuration], model: torch.nn.Module) -> Batch:
    """Frames as one batch for `model`, in its precision, on its device."""
    return _batch(graphs_of(frames, model), model)


def graphs_of(frames: Iterable[Configuration], model: torch.nn.Module) -> list[Graph]:
    """Frames as a data set of mace-torch for `model`, in its precision."""
    settings = {
        "z_table": library.elements(atomic_numbers(model)),
        "cutoff": float(model.get_buffer("r_max")),
        "heads": heads_of(model),
    }
    make = Graphs.of(model)
    with default_dtype(next(model.parameters()).dtype):
        return [make.from_config(frame, **settings) for frame in frames]


def _batch(graphs: list[Graph], model: torch.nn.Module) -> Batch:
    parameter = next(model.parameters())
    return batch_on(graphs, parameter.device, parameter.dtype)


def batch_on(graphs: list[Graph], device: torch.device, dtype: torch.dtype) -> Batch:
    """Graphs of this precision as one batch, on a device."""
    with default_dtype(dtype):
        return library.batch(graphs).to(device)
