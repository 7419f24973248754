"""MMEA: gates on the output of every equivariant linear layer, ELoRA on the other layers.

Jin, Yuan, Tao, AAAI 2026, arXiv 2511.06696. With x the scalars of the layer's input and y its
output, base bias included,

    h = silu(H x + b_h),        s = S h + b_s,        c = C h + b_c,
    scalar copies:          y_w  <-  y_w + s_w
    copies with l > 0:      y_w  <-  g(c_w) y_w,      g(c) = exp(c) or 1 + c

with one gate per copy of an irrep, shared by its 2l + 1 components, so that O(3) equivariance
holds. The gates depend on the input and don't merge into weights: a saved model keeps them.

Departures from the published code, which `reference=True` takes back: a fresh adapter is the
identity; pseudo-scalars (0o) are gated and neither shifted nor read, which would break parity;
every block of scalars is read and has shifts of its own; exp gates are bounded and can't overflow;
ranks are capped at what a layer can use. Bessel frequencies are trained, while the published code
counts them and never moves them: `targets` without `basis` leaves them alone. Neither has scale
rows that nothing uses.
"""

from __future__ import annotations

import torch

from mace_lora.adapters.base import AnyAdapter, OutputAdapter
from mace_lora.adapters.full_update import FullUpdate
from mace_lora.adapters.layout import IrrepBlock, Site, WeightLayout
from mace_lora.adapters.low_rank import PathUpdate
from mace_lora.adapters.options import MMEA_STD, LowRankOptions, MmeaOptions

# |c| stays below this before exp: gates lie between 1/148 and 148
BOUND = 5.0


class Mmea(OutputAdapter[MmeaOptions]):
    """The gates of one equivariant linear layer.

    Its parameters: hidden_weight (rank, scalars in) and hidden_bias, H and b_h; shift_weight
    (scalars out, rank) and shift_bias, S and b_s; scale_weight (other copies out, rank) and
    scale_bias, C and b_c. Where there is nothing to shift or to scale, those two are None.
    """

    kinds = ("linear", "dense", "radial", "skip", "contraction", "basis")
    default_kinds = kinds

    def __init__(self, layout: WeightLayout, options: MmeaOptions) -> None:
        super().__init__(layout, options)
        self.exponential = options.gate == "exp"
        self.bound = 0.0 if options.reference else BOUND
        self.component_major = layout.component_major
        self.sources = [(b.start, b.mul) for b in scalars_read(layout, options)]
        # (first component, copies, components of a copy, shifted, first row of S or C) per block
        self.pieces, n_shifts, n_scales = _pieces(layout, options)
        rank, n_in = options.rank, sum(mul for _, mul in self.sources)
        self.hidden_weight = torch.nn.Parameter(torch.empty(rank, n_in))
        self.hidden_bias = torch.nn.Parameter(torch.zeros(rank))
        self.shift_weight = _zeros(n_shifts, rank)
        self.shift_bias = _zeros(n_shifts)
        self.scale_weight = _zeros(n_scales, rank)
        self.scale_bias = _zeros(n_scales)
        self.initialise()

    @classmethod
    def make(cls, site: Site, options: MmeaOptions) -> AnyAdapter:
        """Gates for a linear layer that reads scalars, ELoRA's update for any other weight."""
        layout = site.layout
        if scalars_read(layout, options):
            return cls(layout, options)
        low_rank = LowRankOptions(rank=options.lora_rank, alpha=options.lora_alpha)
        if layout.small:
            return FullUpdate(layout, low_rank)
        return PathUpdate(layout, low_rank, cap=not options.reference)

    @classmethod
    def banner(cls, options: MmeaOptions) -> str:
        return f"MMEA_RANK:  {options.rank}"

    @torch.no_grad()
    def initialise(self) -> None:
        """H uniform as in torch.nn.Linear; C and all biases zero; S by `options.init`."""
        rank, n_in = self.hidden_weight.shape
        self.hidden_weight.uniform_(-(n_in**-0.5), n_in**-0.5)
        if self.shift_weight is not None:
            if self.options.start == "normal":
                self.shift_weight.normal_(std=self.options.std or MMEA_STD)
            elif self.options.start == "uniform":
                self.shift_weight.uniform_(-(rank**-0.5), rank**-0.5)

    def forward(self, features: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: (..., irreps_in.dim), what the layer reads.
            output: (..., irreps_out.dim), what it makes of it.
        """
        scalars = torch.cat([features.narrow(-1, start, n) for start, n in self.sources], dim=-1)
        hidden = torch.nn.functional.silu(
            torch.nn.functional.linear(scalars, self.hidden_weight, self.hidden_bias)
        )
        shifts, scales = output, output  # TorchScript wants them defined
        if self.shift_weight is not None:
            shifts = torch.nn.functional.linear(hidden, self.shift_weight, self.shift_bias)
        if self.scale_weight is not None:
            scales = torch.nn.functional.linear(hidden, self.scale_weight, self.scale_bias)
            if not self.exponential:
                scales = 1 + scales
            elif self.bound > 0:
                scales = torch.exp(self.bound * torch.tanh(scales / self.bound))
            else:
                scales = torch.exp(scales)
        adapted = []
        for start, mul, dim, shifted, row in self.pieces:
            block = output.narrow(-1, start, mul * dim)
            if row < 0:
                adapted.append(block)
            elif shifted:
                adapted.append(block + shifts.narrow(-1, row, mul))
            else:
                gate = scales.narrow(-1, row, mul)
                if self.component_major:
                    block = torch.unflatten(block, -1, [dim, mul]) * gate.unsqueeze(-2)
                else:
                    block = torch.unflatten(block, -1, [mul, dim]) * gate.unsqueeze(-1)
                adapted.append(block.flatten(-2))
        return torch.cat(adapted, dim=-1)


def _zeros(rows: int, *columns: int) -> torch.nn.Parameter | None:
    return torch.nn.Parameter(torch.zeros(rows, *columns)) if rows else None


def scalars_read(layout: WeightLayout, options: MmeaOptions) -> list[IrrepBlock]:
    """The input blocks that feed the hidden layer: scalars; in the reference, the first ones.

    None where the layer is no equivariant linear layer.
    """
    if not options.reference or not layout.inputs:
        return [b for b in layout.inputs if b.scalar]
    first = layout.inputs[0]
    alike = [(b.dim, b.even) == (first.dim, first.even) for b in layout.inputs]
    n = alike.index(False) if False in alike else len(alike)
    return list(layout.inputs[:n]) if first.dim == 1 else []


def _pieces(
    layout: WeightLayout, options: MmeaOptions
) -> tuple[list[tuple[int, int, int, bool, int]], int, int]:
    """What happens to each output block, and the numbers of shifts and of gates."""
    pieces, n_shifts, n_scales = [], 0, 0
    for b in layout.outputs:
        row = -1  # no path leads there: it stays zero
        shifted = b.scalar or (options.reference and b.dim == 1)
        if b.reached and shifted and options.reference:  # all blocks share the shifts of the first
            row, n_shifts = 0, max(n_shifts, b.mul)
        elif b.reached and shifted:
            row, n_shifts = n_shifts, n_shifts + b.mul
        elif b.reached:
            row, n_scales = n_scales, n_scales + b.mul
        pieces.append((b.start, b.mul, b.dim, shifted, row))
    return pieces, n_shifts, n_scales
