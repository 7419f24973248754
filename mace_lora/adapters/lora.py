"""LoRA for equivariant layers: y = W x + (alpha / r) B(A(x)), irrep by irrep.

Hu et al. 2021, arXiv 2106.09685, section 4.1. The hidden space between A and B holds r copies of
every irrep that input and output share, so A and B mix copies and never components: O(3)
equivariance holds by construction. In weight space, with A: (rows, r) and B: (r, cols) per irrep,

    W_eff = W + (alpha / r) n A B,      n = 1 / sqrt(r_used) in equivariant linear layers, else 1,

where n is the normalisation that an `o3.Linear` B would carry, so that the numbers agree with
mace-torch's own `--lora` for equal factors.
"""

from __future__ import annotations

import torch

from mace_lora.adapters.layout import WeightLayout
from mace_lora.adapters.low_rank import LowRank, group_parts
from mace_lora.adapters.options import LoraOptions


class Lora(LowRank[LoraOptions]):
    """A and B per irrep of one weight."""

    def __init__(self, layout: WeightLayout, options: LoraOptions) -> None:
        super().__init__(layout, options, group_parts(layout, options))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.layout.join(self.layout.blocks_of_groups(self.updates()))

    def fit(self, update: torch.Tensor) -> None:
        self.fit_parts(self.layout.groups_of_blocks(self.layout.split(update)))
