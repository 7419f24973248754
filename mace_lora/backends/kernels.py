"""The two products of MACE as operators of torch, with all derivatives that training needs.

`conv`, the messages of neighbours: with x: (nodes, irreps of x), y: (edges, irreps of y), one
channel each, w: (edges, paths x channels) and Clebsch-Gordan coefficients C,

    M[r, u, k] = sum over edges e = s -> r, paths p, components i, j of
                 C[p, i, j, k] x[s, u, i] y[e, j] w[e, p, u].

Q = <g, M> is a form, linear in each of x, y, w and g. M is its derivative by g, the gradients are
its derivatives by x, y and w, and their derivatives are derivatives of Q again, with one argument
exchanged. So one operator, told by which argument to differentiate, is closed under autograd.

`contract`, the symmetric contraction: a polynomial of third order in x: (atoms, channels, n_x),
with coefficients p: (elements, terms, channels). Training on forces needs its first two
derivatives.

The C++ behind them is `csrc/products.cpp`. Layouts of features are e3nn's throughout.
"""

from __future__ import annotations

import ctypes
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.library import custom_op

from mace_lora.backends.library import load

_Given: TypeAlias = Tensor | None
_SUFFIX = {torch.float64: "f64", torch.float32: "f32"}


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None) -> None:
    """Call a function of the library; every tensor must be contiguous and stay alive meanwhile."""
    values = [
        ctypes.c_int64(a)
        if isinstance(a, int)
        else ctypes.c_void_p(None if a is None else a.data_ptr())
        for a in arguments
    ]
    function = getattr(load(), f"{name}_{_SUFFIX[dtype]}")
    function(*values, ctypes.c_int(torch.get_num_threads()))


# ------------------------------------------------------------------------------ convolution

# tables: paths (n, 8), entries (m, 3), values (m,), blocks of x (k, 2), blocks of M (k, 2)
# sizes: channels, components of x, of y, of M


# Schemas are written out, since older versions of torch can't read them off these annotations.
@custom_op(
    "mace_lora::conv",
    mutates_args=(),
    schema="(str by, Tensor? x, Tensor? y, Tensor? w, Tensor? g, Tensor senders, "
    "Tensor receivers, Tensor[] tables, int[] sizes) -> Tensor",
)
def conv(
    by: str,
    x: Tensor | None,
    y: Tensor | None,
    w: Tensor | None,
    g: Tensor | None,
    senders: Tensor,
    receivers: Tensor,
    tables: list[Tensor],
    sizes: list[int],
) -> Tensor:
    """The derivative of Q by the argument `by` ("x", "y", "w" or "g"), which isn't needed itself.

    Args:
        by: the argument; "g" gives the message.
        x: (nodes, channels x components of x).
        y: (edges, components of y).
        w: (edges, paths x channels).
        g: (nodes, channels x components of M).
        senders, receivers: (edges,) of int64.
        tables, sizes: of a `products.Convolution`.
    """
    x, y, w, g = (t if t is None else t.contiguous() for t in (x, y, w, g))
    senders, receivers = senders.contiguous(), receivers.contiguous()
    out: Tensor = _empty(by, x, y, w, g, senders, receivers, tables, sizes)
    node = _given(x, g)
    paths, entries, values, x_blocks, out_blocks = tables
    values = values.to(out.dtype)
    counts = (node.shape[0], senders.shape[0], *sizes)
    shared: list[Tensor | int] = [*counts, paths, paths.shape[0], entries, values]
    shared += [x_blocks, x_blocks.shape[0], out_blocks, out_blocks.shape[0]]
    edges = (senders, receivers)
    if by == "g":
        _call("conv_by_g", out.dtype, x, y, w, *edges, out, *shared)
    elif by == "x":
        _call("conv_by_x", out.dtype, g, y, w, *edges, out, *shared)
    elif by == "w":
        _call("conv_by_edge", out.dtype, x, y, None, g, *edges, out, None, *shared)
    else:
        _call("conv_by_edge", out.dtype, x, None, w, g, *edges, None, out, *shared)
    return out


def _given(x: Tensor | None, g: Tensor | None) -> Tensor:
    """One of the two per node: at most one argument of Q is left out."""
    node = x if x is not None else g
    assert node is not None
    return node


@conv.register_fake
def _empty(
    by: str,
    x: Tensor | None,
    y: Tensor | None,
    w: Tensor | None,
    g: Tensor | None,
    senders: Tensor,
    receivers: Tensor,
    tables: list[Tensor],
    sizes: list[int],
) -> Tensor:
    channels, x_dim, y_dim, out_dim = sizes
    node = _given(x, g)
    shape = {
        "x": (node.shape[0], channels * x_dim),
        "y": (senders.shape[0], y_dim),
        "w": (senders.shape[0], tables[0].shape[0] * channels),
        "g": (node.shape[0], channels * out_dim),
    }[by]
    return node.new_empty(shape)


class Context(Protocol):
    """torch's, of one call of an operator."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    by: str  # of `conv` alone, as `sizes`
    sizes: list[int]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def _keep(
    ctx: Context,
    inputs: tuple[str, _Given, _Given, _Given, _Given, Tensor, Tensor, list[Tensor], list[int]],
    output: Tensor,
) -> None:
    by, x, y, w, g, senders, receivers, tables, sizes = inputs
    ctx.save_for_backward(x, y, w, g, senders, receivers, *tables)
    ctx.by, ctx.sizes = by, sizes


def _differentiate(ctx: Context, cotangent: Tensor) -> tuple[object, ...]:
    arguments: list[_Given] = list(ctx.saved_tensors[:4])
    senders, receivers, *tables = ctx.saved_tensors[4:]
    mine = "xywg".index(ctx.by)
    arguments[mine] = cotangent
    gradients: list[Tensor | None] = [None] * 4
    for i, name in enumerate("xywg"):
        if i != mine and ctx.needs_input_grad[1 + i]:
            others = [None if j == i else a for j, a in enumerate(arguments)]
            gradients[i] = conv(name, *others, senders, receivers, tables, ctx.sizes)
    return (None, *gradients, None, None, [None] * 5, None)


conv.register_autograd(_differentiate, setup_context=_keep)


# ------------------------------------------------------------------------------ contraction

# terms: (n, 4) of component k of f, and i, j, l of x, where n_x stands for the constant 1


@custom_op(
    "mace_lora::contract",
    mutates_args=(),
    schema="(Tensor x, Tensor p, Tensor element, Tensor terms, int n_k) -> Tensor",
)
def contract(x: Tensor, p: Tensor, element: Tensor, terms: Tensor, n_k: int) -> Tensor:
    """f[b, c, k] = sum over terms t of k: p[element[b], t, c] x[b, c, i] x[b, c, j] x[b, c, l].

    Args:
        x: (atoms, channels, n_x).
        p: (elements, terms, channels).
        element: (atoms,) of int64.
        terms: (terms, 4) of int64.
        n_k: number of components.
    """
    x, p, element = x.contiguous(), p.contiguous(), element.contiguous()
    f = x.new_empty(*x.shape[:2], n_k)
    none = (None, None)
    _call(
        "contract", x.dtype, 0, x, p, element, *none, f, None, *x.shape, n_k, terms, terms.shape[0]
    )
    return f


@custom_op(
    "mace_lora::contract_by_x",
    mutates_args=(),
    schema="(Tensor x, Tensor p, Tensor element, Tensor g, Tensor terms) -> Tensor",
)
def contract_by_x(x: Tensor, p: Tensor, element: Tensor, g: Tensor, terms: Tensor) -> Tensor:
    """The derivative of <g, f> by x: (atoms, channels, n_x)."""
    x, p, element, g = (t.contiguous() for t in (x, p, element, g))
    out = torch.empty_like(x)
    sizes = (*x.shape, g.shape[2], terms, terms.shape[0])
    _call("contract", x.dtype, 1, x, p, element, g, None, None, out, *sizes)
    return out


@custom_op(
    "mace_lora::contract_twice",
    mutates_args=(),
    schema="(Tensor x, Tensor p, Tensor element, Tensor g, Tensor a, Tensor terms) "
    "-> (Tensor, Tensor)",
)
def contract_twice(
    x: Tensor, p: Tensor, element: Tensor, g: Tensor, a: Tensor, terms: Tensor
) -> tuple[Tensor, Tensor]:
    """The derivatives of <a, contract_by_x> by g and by x."""
    x, p, element, g, a = (t.contiguous() for t in (x, p, element, g, a))
    by_g, by_x = torch.empty_like(g), torch.empty_like(x)
    sizes = (*x.shape, g.shape[2], terms, terms.shape[0])
    _call("contract", x.dtype, 2, x, p, element, g, a, by_g, by_x, *sizes)
    return by_g, by_x


@custom_op(
    "mace_lora::contract_by_p",
    mutates_args=(),
    schema="(Tensor x, Tensor element, Tensor g, Tensor? a, Tensor terms, int n_elements) "
    "-> Tensor",
)
def contract_by_p(
    x: Tensor, element: Tensor, g: Tensor, a: Tensor | None, terms: Tensor, n_elements: int
) -> Tensor:
    """The derivative of <g, f> by p, or with `a` that of <a, contract_by_x>."""
    x, element, g = x.contiguous(), element.contiguous(), g.contiguous()
    a = None if a is None else a.contiguous()
    out = x.new_empty(n_elements, terms.shape[0], x.shape[1])
    sizes = (n_elements, *x.shape, g.shape[2], terms, terms.shape[0])
    _call("contract_weights", x.dtype, x, element, g, a, out, *sizes)
    return out


@contract.register_fake
def _(x: Tensor, p: Tensor, element: Tensor, terms: Tensor, n_k: int) -> Tensor:
    return x.new_empty(*x.shape[:2], n_k)


@contract_by_x.register_fake
def _(x: Tensor, p: Tensor, element: Tensor, g: Tensor, terms: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@contract_twice.register_fake
def _(
    x: Tensor, p: Tensor, element: Tensor, g: Tensor, a: Tensor, terms: Tensor
) -> tuple[Tensor, Tensor]:
    return g.new_empty(g.shape), x.new_empty(x.shape)


@contract_by_p.register_fake
def _(
    x: Tensor, element: Tensor, g: Tensor, a: Tensor | None, terms: Tensor, n_elements: int
) -> Tensor:
    return x.new_empty(n_elements, terms.shape[0], x.shape[1])


def _keep_contract(
    ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate_contract(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
    x, p, element, terms = ctx.saved_tensors
    by_x = contract_by_x(x, p, element, g, terms) if ctx.needs_input_grad[0] else None
    by_p = None
    if ctx.needs_input_grad[1]:
        by_p = contract_by_p(x, element, g, None, terms, p.shape[0])
    return by_x, by_p, None, None, None


def _keep_by_x(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_by_x(ctx: Context, a: Tensor) -> tuple[Tensor | None, ...]:
    x, p, element, g, terms = ctx.saved_tensors
    by_g, by_x = contract_twice(x, p, element, g, a, terms)
    by_p = None
    if ctx.needs_input_grad[1]:
        by_p = contract_by_p(x, element, g, a, terms, p.shape[0])
    return by_x, by_p, None, by_g, None


contract.register_autograd(_differentiate_contract, setup_context=_keep_contract)
contract_by_x.register_autograd(_differentiate_by_x, setup_context=_keep_by_x)
