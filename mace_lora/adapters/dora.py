"""DoRA for equivariant layers: a magnitude for every output copy of an irrep, over a direction.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, eq. 5:

    W_eff = m * V / ||V||,      V = W + (alpha / r) n A B,

with the norm over all inputs of one output copy (a column, here, since rows are inputs). An output
copy is one of the mul_out copies of an irrep, so one number scales all its 2l + 1 components and
O(3) equivariance holds. This is MMEA's idea of a magnitude per irrep order and multiplicity without
its dependence on the input: everything is in weight space and merges exactly.

m is kept as m = ||W|| (1 + g), so that g = 0 is the foundation model and weight decay pulls towards
it. `rank=0` leaves the direction alone: W_eff = (1 + g) W, the smallest adapter of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mace_lora.adapters.layout import WeightLayout
from mace_lora.adapters.low_rank import LowRank, group_parts
from mace_lora.adapters.options import DoraOptions


class Dora(LowRank[DoraOptions]):
    """A gain per output copy of every irrep, over LoRA's direction."""

    def __init__(self, layout: WeightLayout, options: DoraOptions) -> None:
        super().__init__(layout, options, group_parts(layout, options) if options.rank else [])
        self.lora_gain = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(group.cols)) for group in layout.groups
        )

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        base = self.layout.split(weight)
        if not self.parts:
            gains = self._per_block(list(self.lora_gain))
            return self.layout.join([w * (1 + g) for w, g in zip(base, gains, strict=True)])
        updates = self.layout.blocks_of_groups(self.updates())
        moved = [w + u for w, u in zip(base, updates, strict=True)]
        # The paper detaches the norm from the graph to save memory (section 4.3). On weights, not
        # activations, its gradient costs next to nothing: ours is the exact one.
        ratios = [
            (1 + gain) * old / new
            for gain, old, new in zip(
                self.lora_gain, self._norms(base), self._norms(moved), strict=True
            )
        ]
        return self.layout.join(
            [m * r for m, r in zip(moved, self._per_block(ratios), strict=True)]
        )

    def _norms(self, matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Per group, the norm of each column over all blocks that feed it."""
        squares = [matrices[0].new_zeros(group.cols) for group in self.layout.groups]
        for block, matrix in zip(self.layout.blocks, matrices, strict=True):
            left, right = block.col, self.layout.groups[block.group].cols - block.col - block.cols
            squares[block.group] = squares[block.group] + torch.nn.functional.pad(
                matrix.square().sum(dim=0), (left, right)
            )
        # a column of zeros has no direction: keep its square root differentiable
        return [s.clamp_min(torch.finfo(s.dtype).tiny).sqrt() for s in squares]

    def _per_block(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A group's values per column, cut into those of its blocks."""
        return [values[b.group][b.col : b.col + b.cols] for b in self.layout.blocks]
