"""ELoRA's update: factors for every path of a layer, added before the layer's normalisation."""

from __future__ import annotations

import torch

from mace_lora.adapters.layout import WeightLayout
from mace_lora.adapters.low_rank import L, LowRank, MatrixPart


class PathUpdate(LowRank[L]):
    """W + (alpha / r) A B for every path of a layer.

    Args:
        cap: no rank higher than a path can use.
        simplify: neighbouring inputs of one irrep make one path. They did in the layers of MACE
            when the method was published; today mace-torch lists them one by one, in the same
            order.
    """

    def __init__(
        self, layout: WeightLayout, options: L, cap: bool = True, simplify: bool = True
    ) -> None:
        if simplify:
            layout = layout.simplified()
        parts = [
            MatrixPart(layout.groups[b.group].label, b.rows, b.cols, options.scaling)
            for b in layout.blocks
        ]
        super().__init__(layout, options, parts, cap)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.layout.join(self.updates())

    def fit(self, update: torch.Tensor) -> None:
        self.fit_parts(self.layout.split(update))
