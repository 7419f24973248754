"""LoRA for equivariant layers: y = W x + (alpha / r) B(A(x)), irrep by irrep.

Hu et al. 2021, arXiv 2106.09685, section 4.1. The hidden space between A and B holds r copies of
every irrep that input and output share, so A and B mix copies and never components: O(3)
equivariance holds by construction. In weight space, with A: (rows, r) and B: (r, cols) per irrep,

    W_eff = W + (alpha / r) n A B,      n = 1 / sqrt(r_used) in equivariant linear layers, else 1,

where n is the normalisation that an `o3.Linear` B would carry, so that the numbers agree with
mace-torch's own `--lora` for equal factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mace_lora.adapters.base import Adapter, AdapterOptions, option
from mace_lora.blocks import WeightLayout
from mace_lora.errors import ConfigError

INITS: dict[str, str] = {
    "normal": "A normal, unit variance in each layer's own normalisation",
    "small": "A normal with std 1e-3 everywhere (what mace-torch documents)",
    "upstream": "std 1 in equivariant layers, 1e-3 in dense ones (what mace-torch 0.3.16 does)",
    "kaiming": "A uniform with bound sqrt(1 / fan-in) (what PEFT does)",
    "orthogonal": "A with orthogonal columns of the length that 'normal' gives them on average",
}


@dataclass(frozen=True)
class LoraOptions(AdapterOptions):
    """Options of `--adapter=lora`; the first two are mace-torch's own flags."""

    rank: int = option(4, "rank of the update; capped per irrep at what a layer can use")
    alpha: float = option(1.0, "the update is scaled by alpha / rank")
    init: str = option(
        "normal",
        "how A starts (B is zero): " + "; ".join(f"{k}: {v}" for k, v in INITS.items()),
        choices=tuple(INITS),
    )

    def check(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"the LoRA rank must be a whole number of 1 or more, got {self.rank}")
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not number or not math.isfinite(self.alpha) or self.alpha == 0:
            raise ConfigError(
                f"the LoRA alpha must be a finite number other than 0, got {self.alpha}: "
                "the update is scaled by alpha / rank"
            )
        if self.init not in INITS:
            raise ConfigError(f"unknown LoRA init {self.init!r}; known: {', '.join(INITS)}")


class Lora(Adapter):
    """A and B per irrep of one weight; `forward` gives W + (alpha / r) n A B."""

    Options = LoraOptions

    def __init__(self, layout: WeightLayout, options: LoraOptions) -> None:
        super().__init__(layout, options)
        self.ranks = [min(options.rank, g.rows, g.cols) for g in layout.groups]
        self.scales = [
            options.alpha / options.rank * (r**-0.5 if layout.kind == "linear" else 1.0)
            for r in self.ranks
        ]
        self.A = torch.nn.ParameterList()
        self.B = torch.nn.ParameterList()
        for group, rank in zip(layout.groups, self.ranks, strict=True):
            self.A.append(torch.nn.Parameter(torch.empty(group.rows, rank)))
            self.B.append(torch.nn.Parameter(torch.zeros(rank, group.cols)))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw A by `options.init` and set B to zero."""
        unit = self.layout.unit
        for a, b in zip(self.A, self.B, strict=True):
            b.zero_()
            if self.options.init == "small":
                a.normal_(std=1e-3)
            elif self.options.init == "upstream":
                a.normal_(std=1.0 if self.layout.kind == "linear" else 1e-3)
            elif self.options.init == "kaiming":
                a.uniform_(-(a.shape[0] ** -0.5), a.shape[0] ** -0.5)
            elif self.options.init == "orthogonal":
                torch.nn.init.orthogonal_(a, gain=unit * a.shape[0] ** 0.5)
            else:
                a.normal_(std=unit)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        updates = [(a @ b) * scale for a, b, scale in zip(self.A, self.B, self.scales, strict=True)]
        matrices = [
            updates[k.group][k.row : k.row + k.rows, k.col : k.col + k.cols]
            for k in self.layout.blocks
        ]
        return weight + self.layout.join(matrices)

    def notes(self) -> str:
        capped = [
            f"{g.label}: {g.rows} -> {g.cols} uses rank {r}"
            for g, r in zip(self.layout.groups, self.ranks, strict=True)
            if r < self.options.rank
        ]
        return "; ".join(capped)
