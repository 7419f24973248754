"""Weights of a convolution by distance, computed when they are used.

MACE computes them for each edge, by a small network, which is most of the arithmetic of a step.
Here it is done once for i -> j and j -> i. And MACE does it for all edges at once: of a frame of
2,000 atoms in water hundreds of MB, and as much for each derivative. Of few edges this is the
fastest way, and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from mace_lora import _compat  # noqa: F401  (before e3nn)

from e3nn import nn  # isort: skip
from e3nn.math import normalize2mom  # isort: skip

from mace_lora.backends.activations import silu
from mace_lora.backends.blocks import in_blocks
from mace_lora.backends.pairs import there_and_back

# Numbers of one batch, edges or pairs times what the network makes for each, from which on they go
# in blocks: 96 MB in float64
MANY = 3 * 2**22
# Numbers of one block: some times as many are in memory at a time
BLOCK = 2**21


class RadialNetwork:
    """Stands in for e3nn's network `conv_tp_weights` of an interaction block.

    Args:
        network: whose weights are read at each use, so that adapters of them act as ever.
    """

    def __init__(self, network: nn.FullyConnectedNet) -> None:
        self._layers = list(network.children())
        self.per_edge = sum(network.hs[1:])

    def forward(self, features: Tensor) -> RadialWeights:
        """features: (edges, basis functions) -> weights (edges, paths x channels), later."""
        return RadialWeights(self, features, [layer.weight for layer in self._layers])

    def block(self, n: int) -> int:
        """How many of `n` edges, or pairs, are computed at a time."""
        return max(1, BLOCK // self.per_edge) if n * self.per_edge >= MANY else n

    def weights_of(self, features: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """As e3nn's layers compute them, with factors moved from edges to the next weight."""
        x, factor = features, 1.0
        for layer, weight in zip(self._layers, weights, strict=True):
            x = x @ (weight * (factor / (layer.h_in * layer.var_in) ** 0.5))
            factor = layer.var_out**0.5
            if _is_silu(layer.act):
                x, factor = silu(x), factor * (1.0 if layer.act._is_id else layer.act.cst)
            elif layer.act is not None:
                x = layer.act(x)
        return x if factor == 1 else x * factor

    @staticmethod
    def fits(network: object) -> TypeGuard[nn.FullyConnectedNet]:
        """Whether `network` is one that this class stands in for."""
        return (
            isinstance(network, nn.FullyConnectedNet)
            and all(hasattr(layer, "weight") for layer in network.children())  # mace-torch's LoRA
            and not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        )


def _is_silu(act: object) -> bool:
    """Whether an activation is e3nn's normalised SiLU, a factor times it."""
    return isinstance(act, normalize2mom) and act.f is functional.silu


@dataclass(frozen=True)
class RadialWeights:
    """Weights that are computed with the message that they are for.

    Attributes:
        network: that computes them.
        features: (edges, basis functions).
        weights: of the network's layers.
        factors: (edges, 1) each, by which they are multiplied.
    """

    network: RadialNetwork
    features: Tensor
    weights: Sequence[Tensor]
    factors: tuple[Tensor, ...] = field(default=())

    def __mul__(self, factor: Tensor) -> RadialWeights:
        """mace-torch multiplies them by the cutoff in some models."""
        return replace(self, factors=(*self.factors, factor))

    def message(
        self, convolution: Callable[..., Tensor], x: Tensor, y: Tensor, edge_index: Tensor
    ) -> Tensor:
        """What `convolution` gives with these weights: (nodes, ...)."""
        distances = [self.features, *self.factors]
        pairs = there_and_back(edge_index, y, self.features)
        harmonics = [y] if pairs is None else [y[half] for half in pairs]
        if pairs is not None:
            edge_index = edge_index[:, pairs[0]]
            distances = [t[pairs[0]] for t in distances]

        def of_block(
            nodes: Tensor, edges: Sequence[Tensor], index: Tensor, weights: Sequence[Tensor]
        ) -> Tensor:
            harmonics, (features, *factors) = edges[:-n], edges[-n:]
            w = self.network.weights_of(features, weights)
            for factor in factors:
                w = w * factor
            if pairs is not None:
                index = torch.cat([index, index.flip(0)], dim=1)
            return convolution(nodes, torch.cat([*harmonics]), w, index)

        n, total = len(distances), edge_index.shape[1]
        edges, size = (*harmonics, *distances), self.network.block(total)
        if size == total:
            return of_block(x, edges, edge_index, self.weights)
        return in_blocks(of_block, size, x, edges, edge_index, self.weights)
