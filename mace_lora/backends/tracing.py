"""A model at one shape as a graph of plain operations: outputs, and gradients of its parameters.

Everything that can differ between two runs of one architecture is an input of the graph: weights,
adapter factors, buffers and data. So a compiled graph is found again by the next run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from mace_lora.backends.fusing import Fusion
from mace_lora.backends.padding import KEYS, Data

# Results that losses and metrics of mace-torch read; the first rows belong to real structures
PER_STRUCTURE = ("energy", "stress", "virials")
PER_ATOM = ("forces",)
Flags = tuple[bool, bool, bool]  # forces, virials, stress


class _Whole(torch.nn.Module):
    """The model and its fused products under one name space."""

    def __init__(self, model: torch.nn.Module, fusion: Fusion) -> None:
        super().__init__()
        self.model, self.products = model, fusion.products

    def forward(self, data: Data, training: bool, flags: Flags) -> dict[str, Tensor]:
        force, virials, stress = flags
        # the class's own: in a way, `forward` of the model itself is what calls here
        found = type(self.model).forward(
            self.model,
            data,
            training=training,
            compute_force=force,
            compute_virials=virials,
            compute_stress=stress,
        )
        keys = (*PER_STRUCTURE, *PER_ATOM)
        return {k: found[k] for k in keys if found.get(k) is not None}


@dataclass
class Inputs:
    """The tensors of a model that a graph takes as inputs, in a fixed order.

    Attributes:
        trained: what gradients are wanted for.
        fixed: all other parameters and buffers.
    """

    whole: _Whole
    trained: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: torch.nn.Module, fusion: Fusion) -> Inputs:
        inputs = cls(_Whole(model, fusion))
        for name, parameter in inputs.whole.named_parameters():
            (inputs.trained if parameter.requires_grad else inputs.fixed)[name] = parameter
        inputs.fixed.update(inputs.whole.named_buffers())
        return inputs

    def call(
        self, trained: Sequence[Tensor], fixed: Sequence[Tensor], data: Data, training: bool,
        flags: Flags,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The model with these tensors in place of its own."""
        state = dict(zip(self.trained, trained, strict=True))
        state |= dict(zip(self.fixed, fixed, strict=True))
        with parametrize.cached():
            return torch.func.functional_call(
                self.whole, state, (dict(data), training, flags), tie_weights=False
            )


def trace(
    inputs: Inputs, data: Data, flags: Flags, *, training: bool
) -> tuple[torch.fx.GraphModule, list[Tensor], list[str]]:
    """One graph for a padded batch.

    Its inputs, flat: trained parameters, fixed tensors, data in the order of KEYS and, with
    `training`, a cotangent for every output; its outputs: the results and, with `training`, the
    gradients of the trained parameters.

    Returns:
        The graph, an example of its inputs, and the names of the results.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    trained = [t.detach() for t in inputs.trained.values()]
    fixed = [t.detach() for t in inputs.fixed.values()]
    given = [data[k].detach() for k in KEYS]
    outputs = _results(inputs, trained, fixed, data, flags)
    names = list(outputs)
    cotangents = [torch.zeros_like(o) for o in outputs.values()] if training else []
    n_trained, n_fixed, n_given = len(trained), len(fixed), len(given)

    def function(*flat: Tensor) -> list[Tensor]:
        rest = list(flat)
        mine = [t.detach().requires_grad_(training) for t in rest[:n_trained]]
        others = rest[n_trained : n_trained + n_fixed]
        batch = dict(zip(KEYS, rest[n_trained + n_fixed :][:n_given], strict=True))
        along = rest[n_trained + n_fixed + n_given :]
        found = [*inputs.call(mine, others, batch, training, flags).values()]
        results = [f.detach() for f in found]
        if not training:
            return results
        reached = [(f, a) for f, a in zip(found, along, strict=True) if f.requires_grad]
        gradients = torch.autograd.grad(
            [f for f, _ in reached], mine, [a for _, a in reached], allow_unused=True
        )
        return [*results, *zeros_for_none(gradients, mine)]

    example = [*trained, *fixed, *given, *cotangents]
    recorded = make_fx(function)(*example)
    with torch.no_grad():  # the gradients are in the graph; operations in place are still to go
        graph = make_fx(
            torch.func.functionalize(recorded, remove="mutations"),
            decomposition_table=select_decomp_table(),
        )(*example)
    graph.graph.eliminate_dead_code()
    return graph, example, names


def _results(inputs, trained, fixed, data: Data, flags: Flags) -> dict[str, Tensor]:
    found = inputs.call(trained, fixed, data, False, flags)
    return {k: v.detach() for k, v in found.items()}


def zeros_for_none(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of parameters, some of which nothing depends on."""
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, like, strict=True)]
