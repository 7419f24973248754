"""Low-rank updates of a weight, W + scale A B: what LoRA, ELoRA and DoRA have in common.

A method says which matrices get factors of their own (`parts`); everything else is here: drawing
the factors, capping the rank at what a matrix can use, and the products. As in PEFT and mace-torch
the factors are called `lora_A` and `lora_B` in the names of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from mace_lora.adapters.base import WeightAdapter
from mace_lora.adapters.layout import WeightLayout
from mace_lora.adapters.options import LowRankOptions


@dataclass(frozen=True)
class MatrixPart:
    """A (rows, cols) matrix with factors of its own; their product is multiplied by `scale`."""

    label: str
    rows: int
    cols: int
    scale: float


L = TypeVar("L", bound=LowRankOptions)


class LowRank(WeightAdapter[L]):
    """lora_A: (rows, rank) and lora_B: (rank, cols) for each of `parts`.

    Args:
        cap: no rank higher than a matrix can use.
    """

    def __init__(
        self, layout: WeightLayout, options: L, parts: Sequence[MatrixPart], cap: bool = True
    ) -> None:
        super().__init__(layout, options)
        self.parts = tuple(parts)
        self.lora_A = torch.nn.ParameterList()
        self.lora_B = torch.nn.ParameterList()
        for part in self.parts:
            rank = min(options.rank, part.rows, part.cols) if cap else options.rank
            self.lora_A.append(torch.nn.Parameter(torch.empty(part.rows, rank)))
            self.lora_B.append(torch.nn.Parameter(torch.zeros(rank, part.cols)))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw A by `options.init` and set B to zero."""
        unit = self.layout.unit
        for a, b in zip(self.lora_A, self.lora_B, strict=True):
            b.zero_()
            if self.options.init == "small":
                a.normal_(std=1e-3)
            elif self.options.init == "upstream":
                a.normal_(std=self.layout.upstream_std)
            elif self.options.init == "kaiming":
                a.uniform_(-(a.shape[0] ** -0.5), a.shape[0] ** -0.5)
            elif self.options.init == "orthogonal":
                torch.nn.init.orthogonal_(a, gain=unit * a.shape[0] ** 0.5)
            else:
                a.normal_(std=unit)

    def updates(self) -> list[torch.Tensor]:
        """The update of each part: (rows, cols), scaled."""
        return [
            (self._dropped(a) @ b) * part.scale
            for a, b, part in zip(self.lora_A, self.lora_B, self.parts, strict=True)
        ]

    def _dropped(self, a: torch.Tensor) -> torch.Tensor:
        """A without some of its rows, in training: these copies of the input don't count."""
        if not (self.training and self.options.dropout):
            return a
        keep = 1 - self.options.dropout
        return a * (torch.rand_like(a[:, :1]) < keep) / keep

    @property
    def draws(self) -> bool:
        return self.options.dropout > 0

    def lr_factors(self) -> dict[str, float]:
        ratio = self.options.lr_ratio
        return {f"lora_B.{i}": ratio for i in range(len(self.lora_B))} if ratio != 1 else {}

    @torch.no_grad()
    def fit_parts(self, matrices: Sequence[torch.Tensor]) -> None:
        """The best factors for an update given as a (rows, cols) matrix per part, by SVD."""
        for a, b, part, matrix in zip(self.lora_A, self.lora_B, self.parts, matrices, strict=True):
            rank = min(a.shape[1], *matrix.shape)
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            root = s[:rank].sqrt()
            a.zero_()
            b.zero_()
            a[:, :rank] = u[:, :rank] * root
            b[:rank] = root[:, None] * v[:rank] / part.scale

    def notes(self) -> str:
        capped = [
            f"{part.label}: {part.rows} -> {part.cols} uses rank {a.shape[1]}"
            for part, a in zip(self.parts, self.lora_A, strict=True)
            if a.shape[1] < self.options.rank
        ]
        return "; ".join(capped)


def group_parts(layout: WeightLayout, options: LowRankOptions) -> list[MatrixPart]:
    """One part per irrep, all its inputs and outputs together.

    In normalised layers the update carries 1 / sqrt(rank used), as if B were such a layer itself.
    """
    parts = []
    for group in layout.groups:
        rank = min(options.rank, group.rows, group.cols)
        norm = rank**-0.5 if layout.normalised and rank else 1.0
        parts.append(MatrixPart(group.label, group.rows, group.cols, options.scaling * norm))
    return parts


class PathUpdate(LowRank[L]):
    """W + (alpha / r) A B for every path of a layer, before the layer's normalisation.

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
