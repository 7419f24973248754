"""Sums over edges in blocks of edges, each computed again where it is needed: memory for time.

What a sum keeps for its derivatives, several numbers for each edge and channel, is most of the
memory of a large frame. Here nothing is kept but the arguments, and the derivatives of a block are
made and used up before the next. Training on forces needs two: both are written down, by torch's
own derivatives of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mace_lora.backends.kernels import apply

# nodes: (nodes, ...), one block's edges: (edges, ...) each, their index (2, edges), weights -> a
# sum over the edges, (nodes, ...)
SumOverEdges = Callable[[Tensor, Sequence[Tensor], Tensor, Sequence[Tensor]], Tensor]
_Grads = list[Tensor | None]


def in_blocks(
    function: SumOverEdges,
    size: int,
    nodes: Tensor,
    edges: Sequence[Tensor],
    edge_index: Tensor,
    weights: Sequence[Tensor],
) -> Tensor:
    """`function` of all edges, which has first and second derivatives by nodes, edges and weights.

    Args:
        function: is linear in nothing, but a sum over edges.
        size: edges of a block.
        nodes: (nodes, ...).
        edges: tensors of (edges, ...).
        edge_index: (2, edges), sender and receiver.
        weights: of any shapes; whatever else has a gradient must be among the arguments.
    """
    work = _Work(function, size, len(edges))
    found: Tensor = apply(_Sum, work, edge_index, nodes, *edges, *weights)
    return found


class _Work:
    """The function, and how its tensors (nodes, edges, weights) are cut to blocks."""

    def __init__(self, function: SumOverEdges, size: int, n_edges: int) -> None:
        self._function, self._size, self._n = function, size, n_edges

    def blocks(self, index: Tensor) -> Iterator[slice]:
        n = index.shape[1]
        return (slice(i, min(i + self._size, n)) for i in range(0, n, self._size))

    def of(self, tensors: Sequence[Tensor], index: Tensor, block: slice) -> Tensor:
        """The sum over a block; `tensors` are its own."""
        nodes, *others = tensors
        return self._function(nodes, others[: self._n], index[:, block], others[self._n :])

    def cut(self, tensors: Sequence[Tensor | None], block: slice) -> _Grads:
        """Those of a block: its part of edges, all of the others."""
        return [
            t[block] if t is not None and self._is_of_edges(i) else t for i, t in enumerate(tensors)
        ]

    def leaves(
        self, tensors: Sequence[Tensor], block: slice, wanted: Sequence[bool]
    ) -> list[Tensor]:
        """Those of a block, of which some have gradients."""
        cut = (t for t in self.cut(tensors, block) if t is not None)
        return [t.detach().requires_grad_(w) for t, w in zip(cut, wanted, strict=True)]

    def add(self, sums: _Grads, found: Sequence[Tensor | None], block: slice) -> None:
        """Gradients of one block to those of all."""
        for i, gradient in enumerate(found):
            total = sums[i]
            if gradient is not None and total is not None:
                (total[block] if self._is_of_edges(i) else total).add_(gradient)

    def _is_of_edges(self, i: int) -> bool:
        return 1 <= i <= self._n


def _zeros(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> _Grads:
    return [torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]


def _picked(values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    return [v for v, w in zip(values, wanted, strict=True) if w]


def _spread(found: Sequence[Tensor | None], wanted: Sequence[bool]) -> _Grads:
    values = iter(found)
    return [next(values) if w else None for w in wanted]


class _Sum(Function):
    """The sum itself."""

    @staticmethod
    def forward(ctx: Any, work: _Work, index: Tensor, *tensors: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(index, *tensors)
        nothing = [False] * len(tensors)
        total: Tensor | None = None
        for block in work.blocks(index):
            part = work.of(work.leaves(tensors, block, nothing), index, block)
            total = part if total is None else total.add_(part)
        assert total is not None  # there are edges: otherwise no blocks are needed
        return total

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        index, *tensors = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[2:])
        found = apply(_Gradients, ctx.work, wanted, index, cotangents[0], *tensors)
        return (None, None, *_spread(found, wanted))


class _Gradients(Function):
    """Its gradients by those of its tensors that are `wanted`."""

    @staticmethod
    def forward(
        ctx: Any,
        work: _Work,
        wanted: tuple[bool, ...],
        index: Tensor,
        cotangent: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.work, ctx.wanted = work, wanted
        ctx.save_for_backward(index, cotangent, *tensors)
        ctx.set_materialize_grads(False)
        sums = _zeros(tensors, wanted)
        for block in work.blocks(index):
            with torch.enable_grad():
                leaves = work.leaves(tensors, block, wanted)
                part = work.of(leaves, index, block)
            found = torch.autograd.grad(part, _picked(leaves, wanted), cotangent, allow_unused=True)
            work.add(sums, _spread(found, wanted), block)
        return tuple(_picked(sums, wanted))

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the sum of <gradient, along>, by the cotangent and the tensors."""
        index, cotangent, *tensors = ctx.saved_tensors
        work, wanted = ctx.work, ctx.wanted
        by_cotangent, *by_tensors = ctx.needs_input_grad[3:]
        spread = _spread(along, wanted)
        has_gradient = [a or b for a, b in zip(wanted, by_tensors, strict=True)]
        sums = _zeros(tensors, by_tensors)
        total = torch.zeros_like(cotangent) if by_cotangent else None
        for block in work.blocks(index):
            with torch.enable_grad():
                leaves = work.leaves(tensors, block, has_gradient)
                given = cotangent.detach().requires_grad_(by_cotangent)
                part = work.of(leaves, index, block)
                inner = torch.autograd.grad(
                    part, _picked(leaves, wanted), given, create_graph=True, allow_unused=True
                )
            pairs = [
                (g, a)
                for g, a in zip(inner, _picked(work.cut(spread, block), wanted), strict=True)
                if g is not None and a is not None and g.requires_grad
            ]
            if not pairs:
                continue
            asked = [given] * by_cotangent + _picked(leaves, by_tensors)
            found = list(
                torch.autograd.grad(
                    [g for g, _ in pairs], asked, [a for _, a in pairs], allow_unused=True
                )
            )
            if total is not None and (first := found.pop(0)) is not None:
                total.add_(first)
            work.add(sums, _spread(found, by_tensors), block)
        return (None, None, None, total, *sums)
