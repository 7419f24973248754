"""The way "compile": forward and backward as two graphs, compiled by inductor for a few shapes."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from mace_lora.step import library
from mace_lora.step.base import CannotServe, Way, modules_of
from mace_lora.step.fusing import Fused
from mace_lora.step.padding import KEYS, Data, Shape, pad
from mace_lora.step.tracing import PER_ATOM, Flags, Inputs, trace

Runner = Callable[[list[Tensor]], Sequence[Tensor]]
# Arguments of MACE's forward that the graphs don't know
_OTHERS = (
    *("compute_displacement", "compute_hessian", "compute_edge_forces"),
    *("compute_atomic_stresses", "lammps_mliap"),
)


class Graphs:
    """The compiled graphs of one model: one pair per shape and kind of call."""

    def __init__(self, model: torch.nn.Module, inputs: Inputs) -> None:
        self.r_max = float(model.r_max)
        self.inputs = inputs
        self._graphs: dict[tuple[Shape, Flags, bool], _Graph] = {}

    def run(self, data: Data, shape: Shape, flags: Flags, training: bool) -> dict[str, Tensor]:
        """Energies, forces and so on of the real structures in `data`."""
        padded = pad(data, shape, self.r_max)
        key = (shape, flags, training)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self.inputs, padded, flags, training, shape)
        graph = self._graphs[key]
        fixed = [t.detach() for t in self.inputs.fixed.values()]
        given = [padded[k] for k in KEYS]
        trained = list(self.inputs.trained.values())
        values = _Run.apply(graph, [*fixed, *given], *trained)
        atoms, structures = data["positions"].shape[0], data["ptr"].shape[0] - 1
        return {
            name: value[: atoms if name in PER_ATOM else structures]
            for name, value in zip(graph.names, values, strict=True)
        }


class _Graph:
    """One shape: `forward` gives results and what `backward` needs."""

    def __init__(
        self, inputs: Inputs, data: Data, flags: Flags, training: bool, shape: Shape
    ) -> None:
        start = time.perf_counter()
        what = "the training step" if training else "the evaluation"
        logging.info(
            f"Compiling {what} for {shape.structures - 1} structures, {shape.atoms - 1} atoms, "
            f"{shape.edges} edges ..."
        )
        _keep_inductors_cache()
        joint, example, self.names = trace(inputs, data, flags, training=training)
        traced = time.perf_counter() - start
        self.forward: Runner
        self.backward: Runner | None = None
        self.n_saved = 0
        if training:
            self._compile_pair(joint, example, len(inputs.trained))
        else:
            self.forward = _compile(joint, example)
        total = time.perf_counter() - start
        logging.info(f"Compiled in {total:.0f} s, of which {traced:.0f} s to trace the model")

    def _compile_pair(
        self, joint: torch.fx.GraphModule, example: list[Tensor], n_trained: int
    ) -> None:
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        n_results = len(self.names)
        n_primals = len(example) - n_results
        for i, node in enumerate(joint.graph.find_nodes(op="placeholder")):
            # the partitioner knows inputs and cotangents by these names
            kind, number = ("primals", i) if i < n_primals else ("tangents", i - n_primals)
            node.name = node.target = f"{kind}_{number + 1}"
        joint.recompile()
        forward, backward = min_cut_rematerialization_partition(
            joint, example, num_fwd_outputs=n_results
        )
        saved = _returned(forward)[n_results:]
        places = {n.name: i for i, n in enumerate(forward.graph.find_nodes(op="placeholder"))}
        self.forward = _compile(forward, example[:n_primals])
        with torch.no_grad():
            found = self.forward(list(example[:n_primals]))
        self.n_saved = len(saved)
        del places
        wanted = [*found[n_results:], *example[n_primals:]]
        self.backward = _compile(backward, wanted, backward=True)
        del n_trained


def _returned(graph: torch.fx.GraphModule) -> list[Any]:
    return list(graph.graph.find_nodes(op="output")[0].args[0])


def _compile(graph: torch.fx.GraphModule, example: list[Tensor], backward: bool = False) -> Runner:
    from torch._inductor.compile_fx import compile_fx_inner

    with torch.no_grad():
        return compile_fx_inner(graph, example, is_backward=backward)
