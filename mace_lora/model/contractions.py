"""Weights of symmetric contractions as e3nn's model has them, under a kernel with others.

cuequivariance keeps one weight per product: those of all contractions and orders side by side, in
another basis of the paths. It is a fixed linear function of theirs. So a product of that kind gets
the parameters of e3nn's, with their names, shapes and values, and computes its own weight from
them: adapters are the same for either kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils import parametrize


class ContractionWeights(torch.nn.Module):
    """The weights of one of MACE's `Contraction`s under their names, and which of them are zero."""

    def __init__(self, contraction: torch.nn.Module) -> None:
        super().__init__()
        self.weights_max = _copy(contraction.get_parameter("weights_max"))
        lower_orders = contraction.get_submodule("weights").parameters()
        self.weights = torch.nn.ParameterList(map(_copy, lower_orders))
        for name, buffer in contraction.named_buffers(recurse=False):
            if name.endswith("_zeroed"):
                self.register_buffer(name, buffer.clone())

    def in_order(self) -> list[torch.Tensor]:
        """The effective weights, the highest order first: (elements, paths, channels) each."""
        return [self.weights_max, *self.weights]


class Projected(torch.nn.Module):
    """The weight of a product, computed from those of its contractions; no parameters of its own.

    matrix: (paths of the product, paths of all contractions).
    """

    def __init__(self, parts: Sequence[ContractionWeights], matrix: torch.Tensor) -> None:
        super().__init__()
        self.parts = list(parts)  # modules of the product: no entry in our state
        self.matrix: torch.Tensor
        self.register_buffer("matrix", matrix)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """(elements, paths of the product, channels), whatever `weight` was before."""
        del weight
        joined = torch.cat([w for part in self.parts for w in part.in_order()], dim=1)
        return torch.matmul(self.matrix, joined)


def project(
    product: torch.nn.Module, contractions: Sequence[torch.nn.Module], matrix: torch.Tensor
) -> None:
    """Give `product` the weights of `contractions` as parameters, in place of its own.

    Its own weight stays where it is, as a buffer that follows them.
    """
    parts = [ContractionWeights(contraction) for contraction in contractions]
    product.contractions = torch.nn.ModuleList(parts)
    weight = product.get_parameter("weight").detach()
    del product.weight
    product.register_buffer("weight", weight)
    parametrize.register_parametrization(product, "weight", Projected(parts, matrix.to(weight)))


def _copy(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
