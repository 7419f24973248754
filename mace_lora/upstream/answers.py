"""What an untouched model predicts, each frame once, whoever asks for it.

Before training labels are compared with the foundation model, E0s are estimated, the energy offset
is measured, and the start's errors are wanted: of the same frames, with other E0s at most.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from mace_lora.model.description import atomic_numbers, e0s, heads
from mace_lora.upstream import library
from mace_lora.upstream.graphs import Configuration, periodic_in
from mace_lora.upstream.inputs import inputs_of
from mace_lora.upstream.predicting import MERGE_TOLERANCE, batch_on, graphs_of, in_parts, predict
from mace_lora.upstream.types import Graph, Tensors

Floats: TypeAlias = npt.NDArray[np.float64]

MOST_FRAMES = 500  # of one set that are predicted with forces, and remembered
ATOMS, BATCH = 400, 16  # predicted at once


@dataclass(frozen=True)
class _Frame:
    """One frame.

    Attributes:
        numbers: (n_atoms,), atomic numbers.
        key: the same for the same atoms, positions and periodic lattice vectors in one precision.
        graph: makes a graph of it for a model; None where there is only a batch.
        portable: whether it does so for models of other elements, too.
    """

    numbers: npt.NDArray[np.int64]
    key: bytes
    graph: Callable[[torch.nn.Module], Graph] | None = None
    portable: bool = False


@dataclass(frozen=True)
class _Answer:
    """Of one frame: energy without E0s, eV; forces, eV/A, (n_atoms, 3); stress, eV/A^3, (3, 3)."""

    interaction: float
    forces: Floats
    stress: Floats | None


class Answers:
    """Predictions of one model, and of others that turn out to predict the same but for E0s.

    Models with several heads, or that read more of a frame than atoms and cell, are asked anew.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, _Answer] = {}
        self._smallest: _Frame | None = None  # of those known, for a comparison of models
        self._models: WeakSet[torch.nn.Module] = WeakSet()

    def predict(
        self,
        model: torch.nn.Module,
        sources: Sequence[Configuration | Graph],
        compute_stress: bool = False,
    ) -> dict[str, Floats]:
        """What `model` predicts, as `predicting.predict` gives it, on the CPU and in float64.

        Args:
            model: predicts.
            sources: frames; graphs must be of its elements.
            compute_stress: whether a stress is wanted.
        """
        frames = [_frame(source, model) for source in sources]
        known = self._known if self._serves(model) else {}
        missing = [f for f in frames if not _answered(known.get(f.key), compute_stress)]
        found = _predicted(model, missing, compute_stress)
        if missing and known is self._known and {"energy", "forces"} <= found.keys():
            self._remember(model, missing, found)
        if len(missing) == len(frames):
            return found
        answers = [self._known[frame.key] for frame in frames]
        values = {
            "energy": np.array([a.interaction for a in answers]) + _e0s(model, frames),
            "forces": np.concatenate([a.forces for a in answers]),
        }
        stresses = [a.stress for a in answers if a.stress is not None]
        return {**values, "stress": np.array(stresses)} if compute_stress else values

    def energies(self, model: torch.nn.Module, frames: Sequence[Configuration]) -> Floats:
        """Energies, eV, of all `frames`; forces on the first MOST_FRAMES are remembered."""
        if not frames:
            return np.zeros(0)
        found = self.predict(model, frames[:MOST_FRAMES])["energy"]
        others = [_frame(frame, model) for frame in frames[MOST_FRAMES:]]
        more = [_predicted(model, others, forces=False)["energy"]] if others else []
        return np.concatenate([found, *more])

    def forces(self, model: torch.nn.Module, graphs: Sequence[Graph]) -> Floats | None:
        """Forces, eV/A, on all atoms of `graphs`, where those are known of this very model."""
        keys = [_frame(graph, model).key for graph in graphs]
        if model not in self._models or not set(keys) <= self._known.keys():
            return None
        return np.concatenate([self._known[key].forces for key in keys])

    def copied(self, model: torch.nn.Module, copy: torch.nn.Module) -> None:
        """`copy` stays as `model` is, which changes from here on."""
        if model in self._models:
            self._models.add(copy)
            self._models.discard(model)

    def begin(self, model: torch.nn.Module) -> None:
        """All is forgotten; what is remembered from here on is of `model`."""
        self._known, self._smallest, self._models = {}, None, WeakSet([model])

    @contextlib.contextmanager
    def listening(self, model: torch.nn.Module) -> Iterator[None]:
        """What `model` predicts in the block for others is remembered, of MOST_FRAMES frames; it
        predicts as the model with which all began, in other words as an adapted and a merged one.
        """
        if not _is_simple(model):
            yield
            return
        most = len(self._known) + MOST_FRAMES

        def hook(_: object, inputs: tuple[Tensors, ...], output: Mapping[str, Any]) -> None:
            given = {k: output.get(k) for k in ("energy", "forces", "stress")}
            values = {k: _numpy(v) for k, v in given.items() if v is not None}
            if len(self._known) < most and {"energy", "forces"} <= values.keys():
                self._remember(model, _frames_of_batch(inputs[0], model), values)

        handle = model.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _remember(
        self, model: torch.nn.Module, frames: Sequence[_Frame], found: Mapping[str, Floats]
    ) -> None:
        interactions = found["energy"] - _e0s(model, frames)
        ends = np.cumsum([len(frame.numbers) for frame in frames])[:-1]
        forces = np.split(found["forces"], ends)
        stresses: Sequence[Floats | None] = list(found.get("stress", [None] * len(frames)))
        for frame, energy, of_atoms, stress in zip(
            frames, interactions, forces, stresses, strict=True
        ):
            self._known[frame.key] = _Answer(float(energy), of_atoms, stress)
            if frame.portable and len(frame.numbers) < self._atoms_of_smallest():
                self._smallest = frame

    def _atoms_of_smallest(self) -> float:
        return math.inf if self._smallest is None else len(self._smallest.numbers)

    def _serves(self, model: torch.nn.Module) -> bool:
        """Whether `model` predicts what is remembered; with one that doesn't all begins anew."""
        if not _is_simple(model):
            return False
        if model not in self._models:
            if not self._agrees(model):
                self.begin(model)
            self._models.add(model)
        return True

    def _agrees(self, model: torch.nn.Module) -> bool:
        """On the smallest frame, within rounding."""
        if self._smallest is None:
            return False
        frame, known = self._smallest, self._known[self._smallest.key]
        if not set(frame.numbers.tolist()) <= set(atomic_numbers(model)):
            return False
        found = _predicted(model, [frame])
        if not {"energy", "forces"} <= found.keys():
            return False
        tolerance = 10 * MERGE_TOLERANCE[next(model.parameters()).dtype]
        interaction = found["energy"] - _e0s(model, [frame])
        return np.allclose(
            interaction, known.interaction, rtol=0, atol=tolerance * abs(found["energy"][0])
        ) and np.allclose(
            found["forces"], known.forces, rtol=0, atol=tolerance * np.abs(known.forces).max()
        )


def _is_simple(model: torch.nn.Module) -> bool:
    """Whether its answers depend on nothing but atoms and cell."""
    return len(heads(model)) == 1 and not inputs_of(model)


def _answered(answer: _Answer | None, compute_stress: bool) -> bool:
    return answer is not None and not (compute_stress and answer.stress is None)


def _predicted(
    model: torch.nn.Module,
    frames: Sequence[_Frame],
    compute_stress: bool = False,
    forces: bool = True,
) -> dict[str, Floats]:
    if not frames:
        return {}
    parameter = next(model.parameters())
    parts = in_parts(frames, lambda frame: len(frame.numbers), ATOMS, BATCH)
    batches = (
        batch_on([f.graph(model) for f in part if f.graph], parameter.device, parameter.dtype)
        for part in parts
    )
    found = predict(model, batches, compute_stress=compute_stress, forces=forces)
    return {name: _numpy(value) for name, value in found.items()}


def _numpy(value: torch.Tensor) -> Floats:
    found: Floats = value.detach().cpu().double().numpy()
    return found


def _e0s(model: torch.nn.Module, frames: Iterable[_Frame]) -> Floats:
    """The part of each energy that E0s are, eV, (n,)."""
    table = e0s(model)
    return np.array([sum(table.get(z, 0.0) for z in f.numbers.tolist()) for f in frames])


def _frame(source: Configuration | Graph, model: torch.nn.Module) -> _Frame:
    """A frame as `model` sees it: a graph has the columns of its elements."""
    if hasattr(source, "node_attrs"):
        graph = cast("Graph", source)
        (frame,) = _frames_of_batch(library.batch([graph]).to_dict(), model)
        return replace(frame, graph=lambda _: graph)
    numbers = np.asarray(source.atomic_numbers, dtype=np.int64)
    dtype = np.dtype(str(next(model.parameters()).dtype).removeprefix("torch."))
    cell = np.zeros((3, 3)) if source.cell is None else np.asarray(source.cell)
    positions = np.asarray(source.positions).astype(dtype)
    key = _key(numbers, positions, cell.astype(dtype), np.array(list(periodic_in(source))))
    return _Frame(numbers, key, lambda other: graphs_of([source], other)[0], portable=True)


def _frames_of_batch(batch: Tensors, model: torch.nn.Module) -> list[_Frame]:
    """The frames of a batch of mace-torch's, as a dictionary."""
    columns = batch["node_attrs"].argmax(dim=1).cpu().numpy()
    numbers = np.array(atomic_numbers(model), dtype=np.int64)[columns]
    positions = batch["positions"].detach().cpu().numpy()
    ends = batch["ptr"][1:-1].tolist()
    n = len(ends) + 1
    given = (batch.get("cell"), batch.get("pbc"))
    cells, periodic = (np.zeros((n, 9)) if v is None else v.detach().cpu().numpy() for v in given)
    per_frame = zip(
        np.split(numbers, ends),
        np.split(positions, ends),
        cells.reshape(n, 3, 3),
        periodic.reshape(n, -1)[:, :3].astype(bool),
        strict=True,
    )
    return [_Frame(parts[0], _key(*parts)) for parts in per_frame]


def _key(
    numbers: npt.NDArray[np.int64],
    positions: npt.NDArray[np.floating],
    cell: npt.NDArray[np.floating],
    periodic: npt.NDArray[np.bool_],
) -> bytes:
    repeated = np.where(periodic[:, None], cell, 0).astype(positions.dtype)
    parts = (numbers, positions, repeated, periodic)
    return hashlib.sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in parts)).digest()
