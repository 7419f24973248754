"""SiLU with its first two derivatives in one pass each.

Training on forces differentiates the radial networks twice, for which torch makes some twenty
passes over a tensor of edges x channels. s, the sigmoid, is torch's; the rest is `csrc/silu.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from mace_lora.backends.kernels import Context, Last, apply, call


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), of any shape."""
    found: Tensor = apply(_Silu, x)
    return found


class _Silu(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        found: Tensor = apply(_ByX, x, s, g)
        return found


class _ByX(Function):
    """g silu'(x), as a function of x and g; s follows from x."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, s: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, s, g)
        x, s, g = x.contiguous(), s.contiguous(), g.contiguous()
        out = torch.empty_like(x)
        call("silu_by_x", x.dtype, x, s, g, out, x.numel())
        return out

    @staticmethod
    def backward(ctx: Context, a: Tensor) -> tuple[Tensor | None, ...]:
        by_g, by_x = apply(_Twice, *ctx.saved_tensors, a)
        return by_x, None, by_g


class _Twice(Last):
    """The derivatives of a g silu'(x) by g and x."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, s: Tensor, g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        x, s, g, a = (t.contiguous() for t in (x, s, g, a))
        by_g, by_x = torch.empty_like(x), torch.empty_like(x)
        call("silu_twice", x.dtype, x, s, g, a, by_g, by_x, x.numel())
        return by_g, by_x
