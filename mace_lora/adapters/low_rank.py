"""Low-rank updates of a weight, W + scale A B: what LoRA, ELoRA and DoRA have in common.

A method says which matrices get factors of their own (`parts`); everything else is here: drawing
the factors, capping the rank at what a matrix can use, and the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mace_lora.adapters.base import Adapter
from mace_lora.adapters.layout import Site, WeightLayout
from mace_lora.adapters.options import AdapterOptions, LowRankOptions


@dataclass(frozen=True)
class Part:
    """A (rows, cols) matrix with factors of its own, and the factor of its update."""

    label: str
    rows: int
    cols: int
    scale: float


class LowRank(Adapter):
    """A: (rows, rank) and B: (rank, cols) per part; `update` gives the matrices A B, scaled."""

    def __init__(
        self, layout: WeightLayout, options: LowRankOptions, parts: Sequence[Part], cap: bool = True
    ) -> None:
        super().__init__(layout, options)
        self.parts = tuple(parts)
        self.A = torch.nn.ParameterList()
        self.B = torch.nn.ParameterList()
        for part in self.parts:
            rank = used_rank(options.rank, part.rows, part.cols) if cap else options.rank
            self.A.append(torch.nn.Parameter(torch.empty(part.rows, rank)))
            self.B.append(torch.nn.Parameter(torch.zeros(rank, part.cols)))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw A by `options.init` and set B to zero."""
        kind, unit = self.layout.kind, self.layout.unit
        for a, b in zip(self.A, self.B, strict=True):
            b.zero_()
            if self.options.init == "small":
                a.normal_(std=1e-3)
            elif self.options.init == "upstream":
                a.normal_(std=1.0 if kind == "linear" else 1e-3)
            elif self.options.init == "kaiming":
                a.uniform_(-(a.shape[0] ** -0.5), a.shape[0] ** -0.5)
            elif self.options.init == "orthogonal":
                torch.nn.init.orthogonal_(a, gain=unit * a.shape[0] ** 0.5)
            else:
                a.normal_(std=unit)

    def updates(self) -> list[torch.Tensor]:
        """The update of each part: (rows, cols)."""
        return [
            (self._dropped(a) @ b) * part.scale
            for a, b, part in zip(self.A, self.B, self.parts, strict=True)
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
        return {f"B.{i}": ratio for i in range(len(self.B))} if ratio != 1 else {}

    @torch.no_grad()
    def fit_parts(self, matrices: Sequence[torch.Tensor]) -> None:
        """The best factors for an update given as a (rows, cols) matrix per part, by SVD."""
        for a, b, part, matrix in zip(self.A, self.B, self.parts, matrices, strict=True):
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
            for part, a in zip(self.parts, self.A, strict=True)
            if a.shape[1] < self.options.rank
        ]
        return "; ".join(capped)


def used_rank(rank: int, rows: int, cols: int) -> int:
    """The rank that a (rows, cols) matrix can use."""
    return min(rank, rows, cols)


def group_parts(layout: WeightLayout, options: LowRankOptions) -> list[Part]:
    """One part per irrep, all its inputs and outputs together.

    In equivariant linear layers the update carries 1 / sqrt(rank used), the normalisation that an
    `o3.Linear` B has.
    """
    parts = []
    for group in layout.groups:
        rank = used_rank(options.rank, group.rows, group.cols)
        norm = rank**-0.5 if layout.kind == "linear" and rank else 1.0
        parts.append(Part(group.label, group.rows, group.cols, options.scaling * norm))
    return parts


def block_parts(layout: WeightLayout, options: LowRankOptions) -> list[Part]:
    """One part per path of the layer, scaled by alpha / rank."""
    scale = options.scaling
    return [Part(layout.groups[b.group].label, b.rows, b.cols, scale) for b in layout.blocks]


def blocks_of_groups(layout: WeightLayout, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Cut the matrices of the groups into those of the blocks."""
    return [
        matrices[b.group][b.row : b.row + b.rows, b.col : b.col + b.cols] for b in layout.blocks
    ]


def groups_of_blocks(layout: WeightLayout, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inverse of `blocks_of_groups`; zero where a group has no path."""
    found = [matrices[0].new_zeros(group.rows, group.cols) for group in layout.groups]
    for b, matrix in zip(layout.blocks, matrices, strict=True):
        found[b.group][b.row : b.row + b.rows, b.col : b.col + b.cols] = matrix
    return found


class PathUpdate(LowRank):
    """ELoRA's update: A and B for every path of a layer, added before its normalisation.

    `simplify`: neighbouring inputs of one irrep make one path. They did in the layers of MACE when
    the method was published; today mace-torch lists them one by one, in the same order.
    """

    def __init__(
        self,
        layout: WeightLayout,
        options: LowRankOptions,
        cap: bool = True,
        simplify: bool = True,
    ) -> None:
        if simplify and layout.kind == "linear":
            layout = layout.simplified()
        super().__init__(layout, options, block_parts(layout, options), cap=cap)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.layout.join(self.updates())

    def fit(self, update: torch.Tensor) -> None:
        self.fit_parts(self.layout.split(update))


def path_update(
    site: Site, options: LowRankOptions, cap: bool = True, simplify: bool = True
) -> Adapter:
    """ELoRA's adapter of one site: per path, or in full for the small weights."""
    lower_order = site.layout.kind == "contraction" and site.tensor != "weights_max"
    if lower_order or site.layout.kind == "basis":
        return FullUpdate(site.layout, options)
    return PathUpdate(site.layout, options, cap, simplify)


class FullUpdate(Adapter):
    """W + D with D of the shape of W, zero at first: a small weight trained in full.

    Trained as a difference, it merges and is saved as any other adapter, and weight decay pulls it
    towards the foundation model instead of towards zero.
    """

    def __init__(self, layout: WeightLayout, options: AdapterOptions) -> None:
        super().__init__(layout, options)
        # a tensor of its own is kept flat: its shape differs between kernels, its order doesn't
        size = math.prod(layout.shape)
        self.D = torch.nn.Parameter(torch.zeros((size,) if layout.kind == "full" else layout.shape))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.D.view(weight.shape)

    @torch.no_grad()
    def fit(self, update: torch.Tensor) -> None:
        self.D.copy_(update.reshape(self.D.shape))

    def notes(self) -> str:
        return "trained in full"
