"""Weights of a convolution by distance, which of many edges are not computed before they are used.

MACE computes them for all edges at once, by a small network: of a frame of 2,000 atoms in water
hundreds of MB, and as much for each derivative. Of few edges this is the fastest way, and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from torch import Tensor
from torch.nn import functional

from mace_lora import _compat  # noqa: F401  (before e3nn)

from e3nn import nn  # isort: skip
from e3nn.math import normalize2mom  # isort: skip

from mace_lora.backends.activations import silu
from mace_lora.backends.blocks import in_blocks

# Numbers of one batch, edges times what the network makes for each, from which on the edges go in
# blocks: 128 MB in float64
MANY = 2**24
# Numbers of one block: some times as many are in memory at a time
BLOCK = 2**21


class RadialNetwork:
    """Stands in for e3nn's network `conv_tp_weights` of an interaction block.

    Args:
        network: whose weights are read at each use, so that adapters of them act as ever.
    """

    def __init__(self, network: nn.FullyConnectedNet) -> None:
        self._layers = list(network.children())
        self._per_edge = sum(network.hs[1:])

    def forward(self, features: Tensor) -> Tensor | RadialWeights:
        """features: (edges, basis functions) -> weights (edges, paths x channels), now or later."""
        weights = [layer.weight for layer in self._layers]
        if len(features) * self._per_edge < MANY:
            return self.weights_of(features, weights)
        return RadialWeights(self, max(1, BLOCK // self._per_edge), features, weights)

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
    """Weights that are computed block by block, with the message that they are for.

    Attributes:
        network: that computes them.
        size: edges of a block.
        features: (edges, basis functions).
        weights: of the network's layers.
        factors: (edges, 1) each, by which they are multiplied.
    """

    network: RadialNetwork
    size: int
    features: Tensor
    weights: Sequence[Tensor]
    factors: tuple[Tensor, ...] = field(default=())

    def __mul__(self, factor: Tensor) -> RadialWeights:
        """mace-torch multiplies them by the cutoff in some models."""
        return RadialWeights(
            self.network, self.size, self.features, self.weights, (*self.factors, factor)
        )

    def message(
        self, convolution: Callable[..., Tensor], x: Tensor, y: Tensor, edge_index: Tensor
    ) -> Tensor:
        """What `convolution` gives with these weights: (nodes, ...)."""

        def of_block(
            nodes: Tensor, edges: Sequence[Tensor], index: Tensor, weights: Sequence[Tensor]
        ) -> Tensor:
            harmonics, features, *factors = edges
            w = self.network.weights_of(features, weights)
            for factor in factors:
                w = w * factor
            return convolution(nodes, harmonics, w, index)

        edges = (y, self.features, *self.factors)
        return in_blocks(of_block, self.size, x, edges, edge_index, self.weights)
