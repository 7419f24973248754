"""ELoRA: a low-rank update for every path of a layer, W -> W + (alpha / r) A B.

Wang et al., "ELoRA: Low-Rank Adaptation for Equivariant GNNs", ICML 2025. Each path (input irrep to
output irrep) of a linear layer or a tensor product has its own A: (mul_in, r) and B: (r, mul_out);
radial networks have one pair per layer, symmetric contractions one per output irrep for the weight
of the highest order. The update is added before the layer's own normalisation.

As in the published implementation, the lower-order contraction weights and the Bessel frequencies
are trained in full. There the frequencies are in no optimiser group and never move; here they do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mace_lora.adapters.base import option
from mace_lora.adapters.low_rank import FullUpdate, LowRank, LowRankOptions, block_parts
from mace_lora.blocks import Site, WeightLayout


@dataclass(frozen=True)
class EloraOptions(LowRankOptions):
    """Options of `--adapter=elora`; the published code has rank and alpha fixed at 16."""

    rank: int = option(16, "rank of each path's update; capped at what the path can use")
    alpha: float = option(16.0, "the update is scaled by alpha / rank")
    cap: bool = option(True, "cap the rank at what a path can use (the published code: False)")


class Elora(LowRank):
    """A and B per path of one weight."""

    Options = EloraOptions
    kinds = ("linear", "dense", "radial", "skip", "contraction", "basis")
    default_kinds = kinds

    def __init__(self, layout: WeightLayout, options: EloraOptions) -> None:
        super().__init__(layout, options, block_parts(layout, options), cap=options.cap)

    @classmethod
    def make(cls, site: Site, options: EloraOptions) -> LowRank | FullUpdate:
        lower_order = site.layout.kind == "contraction" and site.tensor != "weights_max"
        if lower_order or site.layout.kind == "basis":
            return FullUpdate(site.layout, options)
        return cls(site.layout, options)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.layout.join(self.updates())
