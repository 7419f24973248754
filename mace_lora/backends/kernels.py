"""The two products of MACE as functions of torch, with all derivatives that training needs.

`conv`, the messages of neighbours: with x: (nodes, irreps of x), y: (edges, irreps of y), one
channel each, w: (rows, paths x channels), of which an edge has one, and Clebsch-Gordan
coefficients C,

    M[r, u, k] = sum over edges e = s -> r, paths p, components i, j of
                 C[p, i, j, k] x[s, u, i] y[e, j] w[row(e), p, u].

Q = <g, M> is a form, linear in each of x, y, w and g. M is its derivative by g, the gradients are
its derivatives by x, y and w, and their derivatives are derivatives of Q again, with one argument
exchanged. So one function, told by which argument to differentiate, is closed under autograd.

`contract`, the symmetric contraction: a polynomial of third order in x: (atoms, channels, n_x),
with coefficients p: (elements, terms, channels). Training on forces needs its first two
derivatives.

The C++ behind them is in `csrc/`. Layouts of features are e3nn's throughout.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node

from mace_lora.backends.library import load

_SUFFIX = {torch.float64: "f64", torch.float32: "f32"}


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None) -> None:
    """Call a function of the library; every tensor must be contiguous and stay alive meanwhile."""
    values = [
        ctypes.c_int64(a)
        if isinstance(a, int)
        else ctypes.c_void_p(None if a is None else a.data_ptr())
        for a in arguments
    ]
    function = getattr(load(), f"{name}_{_SUFFIX[dtype]}")
    function(*values, ctypes.c_int(torch.get_num_threads()))


def apply(function: type[Function], *arguments: Any) -> Any:
    """`function` of `arguments`, as a part of torch's graph."""
    method: Callable[..., Any] = function.apply
    return method(*arguments)


class Context(Protocol):
    """torch's, of one call of a function."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    next_functions: tuple[tuple[Node | None, int], ...]
    by: str  # of `conv` alone, as those below
    index: Tensor
    rows: int
    tables: Sequence[Tensor]
    sizes: Sequence[int]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def wanted(ctx: Context) -> list[bool]:
    """Which gradients somebody waits for, in a backward pass.

    `needs_input_grad` says which could be asked for. Forces need none of weights, and weights none
    of positions.
    """
    nodes = (node for node, _ in ctx.next_functions if node is not None)
    return [needed and _is_executed(next(nodes)) for needed in ctx.needs_input_grad]


def _is_executed(node: Node) -> bool:
    """Whether this backward pass goes on to `node`; if torch can't tell, it might.

    The function is torch's, which `register_multi_grad_hook` is made of, but not public.
    """
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except (AttributeError, RuntimeError):  # another torch; leaves whose gradients are asked for
        return True


class Last(Function):
    """A derivative that has none of its own: training on forces needs two."""

    @staticmethod
    def backward(ctx: Context, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the fused kernels have no third derivatives: compute without fast_steps"
        )


# ------------------------------------------------------------------------------ convolution

# tables: paths (n, 8), entries (m, 3), values (m,), blocks of x (k, 2), blocks of M (k, 2)
# sizes: channels, components of x, of y, of M


def conv(
    by: str,
    x: Tensor | None,
    y: Tensor | None,
    w: Tensor | None,
    g: Tensor | None,
    index: Tensor,
    rows: int,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    """The derivative of Q by the argument `by` ("x", "y", "w" or "g"), which isn't needed itself.

    Args:
        by: the argument; "g" gives the message.
        x: (nodes, channels x components of x).
        y: (edges, components of y).
        w: (rows, paths x channels).
        g: (nodes, channels x components of M).
        index: (2, edges) of int64, senders and receivers.
        rows: of w: as many as edges, or half as many; then edges have row 0, 1, ..., 0, 1, ...
        tables, sizes: of a `products.Convolution`.
    """
    found: Tensor = apply(_Conv, by, index, rows, tables, sizes, x, y, w, g)
    return found


class _Conv(Function):
    """`conv`, of x, y, w and g in this order."""

    @staticmethod
    def forward(
        ctx: Context,
        by: str,
        index: Tensor,
        rows: int,
        tables: Sequence[Tensor],
        sizes: Sequence[int],
        *given: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*given)  # as given: copies have no history
        ctx.by, ctx.index, ctx.rows, ctx.tables, ctx.sizes = by, index, rows, tables, sizes
        x, _, _, g = given
        node = x if x is not None else g  # at most one argument of Q is left out
        assert node is not None
        paths, entries, values, x_blocks, out_blocks = tables
        channels, x_dim, y_dim, out_dim = sizes
        n_nodes, n_edges = node.shape[0], index.shape[1]
        senders, receivers = index.contiguous()
        shapes = {
            "x": (n_nodes, channels * x_dim),
            "y": (n_edges, y_dim),
            "w": (rows, paths.shape[0] * channels),
            "g": (n_nodes, channels * out_dim),
        }
        out = node.new_empty(shapes[by])
        read = [t.contiguous() for t in given if t is not None]
        shared: list[Tensor | int] = [senders, receivers, n_nodes, n_edges, rows, *sizes]
        shared += [paths, paths.shape[0], entries, values.to(out.dtype)]
        shared += [x_blocks, x_blocks.shape[0], out_blocks, out_blocks.shape[0]]
        call(f"conv_by_{by}", out.dtype, *read, out, *shared)
        return out

    @staticmethod
    def backward(ctx: Context, cotangent: Tensor) -> tuple[object, ...]:
        arguments: list[Tensor | None] = [*ctx.saved_tensors]
        mine = "xywg".index(ctx.by)
        arguments[mine] = cotangent
        gradients: list[Tensor | None] = [None] * 4
        for i, (name, needed) in enumerate(zip("xywg", wanted(ctx)[5:], strict=True)):
            if i != mine and needed:
                x, y, w, g = (None if j == i else a for j, a in enumerate(arguments))
                gradients[i] = conv(name, x, y, w, g, ctx.index, ctx.rows, ctx.tables, ctx.sizes)
        return (None, None, None, None, None, *gradients)


# ------------------------------------------------------------------------------ contraction

# terms: (n, 4) of component k of f, and i, j, l of x, where n_x stands for the constant 1


def contract(x: Tensor, p: Tensor, element: Tensor, terms: Tensor, n_k: int) -> Tensor:
    """f[b, c, k] = sum over terms t of k: p[element[b], t, c] x[b, c, i] x[b, c, j] x[b, c, l].

    Args:
        x: (atoms, channels, n_x).
        p: (elements, terms, channels).
        element: (atoms,) of int64.
        terms: (terms, 4) of int64.
        n_k: number of components.
    """
    found: Tensor = apply(_Contract, x, p, element, terms, n_k)
    return found


class _Contract(Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, p: Tensor, element: Tensor, terms: Tensor, n_k: int
    ) -> Tensor:
        ctx.save_for_backward(x, p, element, terms)
        x, p, element = x.contiguous(), p.contiguous(), element.contiguous()
        f = x.new_empty(*x.shape[:2], n_k)
        sizes = (*x.shape, n_k, terms, terms.shape[0])
        call("contract", x.dtype, 0, x, p, element, None, None, f, None, *sizes)
        return f

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        x, p, element, terms = ctx.saved_tensors
        by_x, by_p = None, None
        needs_x, needs_p, *_ = wanted(ctx)
        if needs_x:
            by_x = apply(_ContractByX, x, p, element, g, terms)
        if needs_p:
            by_p = apply(_ContractByP, x, p, element, g, None, terms)
        return by_x, by_p, None, None, None


class _ContractByX(Function):
    """The derivative of <g, f> by x: (atoms, channels, n_x)."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, p: Tensor, element: Tensor, g: Tensor, terms: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, p, element, g, terms)
        x, p, element, g = (t.contiguous() for t in (x, p, element, g))
        out = torch.empty_like(x)
        sizes = (*x.shape, g.shape[2], terms, terms.shape[0])
        call("contract", x.dtype, 1, x, p, element, g, None, None, out, *sizes)
        return out

    @staticmethod
    def backward(ctx: Context, a: Tensor) -> tuple[Tensor | None, ...]:
        x, p, element, g, terms = ctx.saved_tensors
        by_g, by_x = apply(_ContractTwice, x, p, element, g, a, terms)
        by_p = None
        if wanted(ctx)[1]:
            by_p = apply(_ContractByP, x, p, element, g, a, terms)
        return by_x, by_p, None, by_g, None


class _ContractTwice(Last):
    """The derivatives of <a, contraction by x> by g and by x."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, p: Tensor, element: Tensor, g: Tensor, a: Tensor, terms: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, p, element, g, a = (t.contiguous() for t in (x, p, element, g, a))
        by_g, by_x = torch.empty_like(g), torch.empty_like(x)
        sizes = (*x.shape, g.shape[2], terms, terms.shape[0])
        call("contract", x.dtype, 2, x, p, element, g, a, by_g, by_x, *sizes)
        return by_g, by_x


class _ContractByP(Last):
    """The derivative of <g, f> by p, or with `a` that of <a, contraction by x>."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        p: Tensor,
        element: Tensor,
        g: Tensor,
        a: Tensor | None,
        terms: Tensor,
    ) -> Tensor:
        x, p, element, g = (t.contiguous() for t in (x, p, element, g))
        a = None if a is None else a.contiguous()
        out = torch.empty_like(p)
        sizes = (p.shape[0], *x.shape, g.shape[2], terms, terms.shape[0])
        call("contract_weights", x.dtype, x, element, g, a, out, *sizes)
        return out
