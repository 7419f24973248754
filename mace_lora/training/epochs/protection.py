"""`--protect`: the start's behaviour is kept where the training frames say nothing.

The start is its own teacher, since an adapter can be switched off. Anchors (`frames/anchors.py`)
are labelled once with its forces, and at every few steps the gradient of a penalty on some of them
joins that of the loss. It is clipped by itself: together with the loss's it would take over.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import ase
import numpy as np
import numpy.typing as npt
import torch

from mace_lora.frames import anchors
from mace_lora.model.description import atomic_numbers
from mace_lora.model.injection import adapter_parameters, disable_adapter
from mace_lora.training.epochs.computing import Computing
from mace_lora.training.epochs.steps import Gradients
from mace_lora.upstream import library
from mace_lora.upstream.inputs import inputs_of
from mace_lora.upstream.predicting import frames_to_data, in_parts, predict
from mace_lora.upstream.types import Dataset, Graph

SOURCES = 100  # training frames that distorted ones are made of
DISTORTED = 200
ATOMS = 10_000  # in all of either
# Of each kind at a step: pairs of the elements in the frames, other pairs, distorted frames; beside
# them every second pair of one wall
PER_STEP = (8, 8, 1)
FREE, RELATIVE = 0.3, 0.1  # errors that cost nothing: eV/A, and a part of the start's force
REPELS = 1.0  # eV/A: from this mean force on, a step of a wall must rise
SPAN = 2  # pairs of half a wall, 0.1 A
HELD = 0.5  # so much of the start's force along its direction is left, or it costs more
WEIGHT = 0.3  # of it, beside the loss's
# What mace-torch gives every frame, and no model reads
LABELS = ("energy", "forces", "stress", "virials", "dipole", "polarizability")
AT_ONCE, ATOMS_AT_ONCE = 16, 400  # anchors and their atoms that are labelled in one batch

# Of some graphs: forces on all their atoms, eV/A, or None
Known = Callable[[Sequence[Graph]], npt.NDArray[np.float64] | None]


@dataclass(frozen=True)
class Anchor:
    """A frame, the start's energy (eV) of it and forces on it (eV/A, (n_atoms, 3)), and the atoms
    that have a say.
    """

    graph: Graph
    energy: torch.Tensor
    forces: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Wall:
    """Anchors of two elements close to each other, by distance (A, (n,)), and the start's energies
    (eV, (n,)).
    """

    anchors: list[Anchor]
    distances: torch.Tensor
    energies: torch.Tensor

    def every_second(self, first: int) -> Wall:
        return Wall(self.anchors[first::2], self.distances[first::2], self.energies[first::2])


class Protection:
    """The anchors of one run, and the gradient of the penalty on them.

    Args:
        model: with its adapters, of the elements and heads of the run; not the copy for several
            processes.
        dataset: the training frames.
        computing: where the run's steps are computed.
        seed: of the run. The anchors of a step follow from it and from the number of the step, so
            that a continued run uses the same.
        frames_per_step: of all processes.
        clip: largest norm of the penalty's gradient, that of the loss's in this run.
        known: gives the start's forces on all atoms of training frames, where those are known.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dataset: Dataset,
        computing: Computing,
        seed: int,
        frames_per_step: float,
        clip: float | None = None,
        known: Known = lambda _: None,
    ) -> None:
        self._clip = math.inf if clip is None else clip
        self._model, self._computing, self._seed = model, computing, seed
        self._parameters = list(adapter_parameters(model).values())
        # of one frame a distorted one costs as much as the step itself
        self._every = 2 if frames_per_step > 1 else 4
        self._device = next(model.parameters()).device
        sources = _sources(dataset, seed)
        with disable_adapter(model):
            self._pairs = _pairs(model, sources, seed)
            self._walls = _walls(self._pairs[0])
            self._distorted = _Distorted(model, sources, seed, known)
        logging.info(
            "Protected: the start's forces on {} pairs of the elements in the frames, {} other "
            "pairs and {} distorted training frames are kept up to {} eV/A and {:.0%}".format(
                *map(len, self._pairs), len(self._distorted), FREE, RELATIVE
            )
        )

    def gradients(self, step: int) -> Gradients:
        """What joins the loss's gradient at the optimiser step of this number, from 0 on. Several
        processes compute the same, so that nothing need be shared.
        """
        if step % self._every:
            return {}
        rng = np.random.default_rng((self._seed, step))
        wall = self._walls[int(rng.integers(len(self._walls)))].every_second(int(rng.integers(2)))
        chosen = [
            kind[i]
            for kind, n in zip(self._pairs, PER_STEP, strict=False)
            for i in rng.choice(len(kind), min(n, len(kind)), replace=False)
        ]
        distorted = self._distorted.some(PER_STEP[-1], rng)
        chosen = [*wall.anchors, *chosen, *distorted]
        batch = library.batch([anchor.graph for anchor in chosen]).to(self._device).to_dict()
        wanted = torch.cat([anchor.forces for anchor in chosen])
        counts = torch.cat([anchor.counts for anchor in chosen])
        with self._computing.active(self._model):
            found = self._model(batch, training=True, compute_force=True)
            energies = found["energy"][: len(wall.anchors)]
            penalty = cost(found["forces"], wanted, counts)
            penalty = penalty + fallen(energies, wall.energies, wall.distances)
            raw = torch.autograd.grad(penalty, self._parameters, allow_unused=True)
        gradients = {p: g for p, g in zip(self._parameters, raw, strict=True) if g is not None}
        return _clipped(gradients, self._clip)


def cost(found: torch.Tensor, wanted: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The penalty: the mean over atoms of log(1 + e^2), e the error beyond what is free, divided by
    that. A change of theory moves forces by tenths of an eV/A and costs nothing; errors count
    relative to the forces, and however large one is, the others still count beside it.

    The exception is a force that is lost or turned round, where a wall has a hole: what lacks of
    HELD is added, in the same unit, so that the deepest hole is drawn at as much as any.

    Args:
        found, wanted: forces, eV/A, (n_atoms, 3).
        counts: which atoms have a say, (n_atoms,).
    """
    error = ((found - wanted).square().sum(-1) + 1e-12).sqrt()
    size = wanted.norm(dim=-1)
    free = FREE + RELATIVE * size
    along = (found * wanted).sum(-1) / (size + 1e-12)
    lost = torch.relu(HELD * size - along - FREE) / free
    beyond = torch.relu(error - free) / free
    penalty: torch.Tensor = (counts * (torch.log1p(beyond.square()) + lost)).mean()
    return penalty


def fallen(found: torch.Tensor, wanted: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """What a wall lacks in height: `cost`'s part for lost forces, of the mean force between each
    two of its pairs about 0.1 A apart. A hole of the energy may be made of forces that are all but
    those of the start.

    Args:
        found, wanted: energies of a wall's pairs, eV, (n,).
        distances: theirs, A, (n,), the shortest first.
    """
    if len(distances) <= SPAN:
        return 0 * found.sum()
    lengths = distances[SPAN:] - distances[:-SPAN]
    mine, start = ((e[:-SPAN] - e[SPAN:]) / lengths for e in (found, wanted))
    lost = torch.relu(HELD * start - mine) / (FREE + RELATIVE * start.abs())
    return ((start > REPELS) * lost).mean()


def _clipped(gradients: Gradients, clip: float) -> Gradients:
    norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
    factor = WEIGHT * min(1.0, clip / (norm + 1e-6))
    return {p: factor * g for p, g in gradients.items()}


def _answers(
    model: torch.nn.Module, graphs: Sequence[Graph]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What `model` says of each: energy, eV, and forces, eV/A, (n_atoms, 3)."""
    if not graphs:
        return []
    found = predict(model, map(library.batch, _parts(graphs)))
    forces = torch.split(found["forces"], [len(graph.positions) for graph in graphs])
    return list(zip(found["energy"], forces, strict=True))


def _parts(graphs: Sequence[Graph]) -> Iterator[list[Graph]]:
    return in_parts(graphs, lambda graph: len(graph.positions), ATOMS_AT_ONCE, AT_ONCE)


def _sources(dataset: Dataset, seed: int) -> list[Graph]:
    """The training frames that distorted ones are made of."""
    order = np.random.default_rng(seed).permutation(len(dataset))[:SOURCES]
    frames = (dataset[int(i)] for i in order)
    return next(in_parts(frames, lambda graph: len(graph.positions), ATOMS))


def _pairs(model: torch.nn.Module, sources: Sequence[Graph], seed: int) -> list[list[Anchor]]:
    """Pairs of atoms: of the elements in `sources`, and others."""
    known = atomic_numbers(model)
    present = {known[i] for graph in sources for i in graph.node_attrs.argmax(dim=1).tolist()}
    heads = itertools.cycle(sources)  # all those that are trained
    scans = (anchors.pairs(present), anchors.pairs(known, without=present, seed=seed))
    kinds = [
        [_completed(graph, next(heads), model) for graph in frames_to_data(scan, model)]
        for scan in scans
    ]
    return [
        [
            Anchor(graph, energy, forces, torch.ones_like(forces[:, 0], dtype=torch.bool))
            for graph, (energy, forces) in zip(kind, _answers(model, kind), strict=True)
        ]
        for kind in kinds
    ]


class _Distorted:
    """Distorted frames in which some force is larger than in all frames that they are made of. What
    happens at smaller forces is not kept: there the new theory holds, which unseen molecules would
    be held back from.

    They are labelled when a step asks for the first of a batch: of large frames a run sees few.

    Args:
        model: as `Protection` has it, without its adapter.
        sources: what they are made of.
        seed, known: of the run.
    """

    def __init__(
        self, model: torch.nn.Module, sources: Sequence[Graph], seed: int, known: Known
    ) -> None:
        self._model = model
        forces = known(sources)
        if forces is None:
            forces = torch.cat([f for _, f in _answers(model, sources)]).cpu().numpy()
        self._largest = float(np.linalg.norm(forces, axis=-1).max())
        elements = atomic_numbers(model)
        frames = [_frame(graph, elements) for graph in sources]
        mean = sum(min(len(frame), anchors.PIECE) for frame in frames) / len(frames)
        made, origins = anchors.distorted(frames, min(DISTORTED, int(ATOMS / mean)), seed)
        graphs = (
            _completed(graph, sources[i], model)
            for graph, i in zip(frames_to_data(made, model), origins, strict=True)
        )
        self._batches = list(_parts(list(graphs)))
        self._places = [(i, j) for i, part in enumerate(self._batches) for j in range(len(part))]
        self._labelled: dict[int, list[Anchor]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def some(self, n: int, rng: np.random.Generator) -> list[Anchor]:
        """`n` at random, or as many as there are."""
        shuffled = (self._places[i] for i in rng.permutation(len(self._places)))
        anchors_of = (self._of_batch(i)[j] for i, j in shuffled)
        return list(itertools.islice((a for a in anchors_of if a.counts.any()), n))

    def _of_batch(self, i: int) -> list[Anchor]:
        if i not in self._labelled:
            graphs = self._batches[i]
            with disable_adapter(self._model):
                answers = _answers(self._model, graphs)
            self._labelled[i] = [
                Anchor(graph, energy, forces, forces.norm(dim=-1) > self._largest)
                for graph, (energy, forces) in zip(graphs, answers, strict=True)
            ]
        return self._labelled[i]


def _walls(pairs: Sequence[Anchor]) -> list[Wall]:
    """Of each two elements the pairs among `pairs` that are closer than bonds."""
    groups: dict[tuple[int, ...], list[tuple[float, Anchor]]] = {}
    for anchor in pairs:
        distance = float((anchor.graph.positions[1] - anchor.graph.positions[0]).norm())
        if distance <= anchors.WALL[-1] + 1e-6:
            kind = tuple(anchor.graph.node_attrs.argmax(dim=1).tolist())
            groups.setdefault(kind, []).append((distance, anchor))
    walls = []
    for group in groups.values():
        distances, members = zip(*sorted(group, key=lambda one: one[0]), strict=True)
        energies = torch.stack([member.energy for member in members])
        walls.append(Wall(list(members), energies.new_tensor(distances), energies))
    return walls


def _frame(graph: Graph, known: Sequence[int]) -> ase.Atoms:
    numbers = [known[i] for i in graph.node_attrs.argmax(dim=1).tolist()]
    periodic = graph.pbc is not None and bool(graph.pbc.any())
    return ase.Atoms(
        numbers,
        graph.positions.numpy(),
        cell=graph.cell.reshape(3, 3).numpy() if periodic and graph.cell is not None else None,
        pbc=graph.pbc.flatten().tolist() if periodic and graph.pbc is not None else False,
    )


def _completed(graph: Graph, source: Graph, model: torch.nn.Module) -> Graph:
    """`graph` with the head of `source`, and its charge, spin, ... where the model reads them.

    Labels go: an anchor has its own, and a batch is made the faster the less there is.
    """
    for name in (*LABELS, "weight", *(f"{label}_weight" for label in (*LABELS, "charges"))):
        graph[name] = None
    names = ["head"]
    for name, wanted in inputs_of(model).items():
        same_atoms = len(graph.positions) == len(source.positions)
        if same_atoms if wanted.per_atom else (same_atoms or wanted.default is None):
            names.append(name)
    for name in names:
        graph[name] = source[name]
    return graph
