"""What the products of a model are, as tables for the kernels.

Reads e3nn's tensor products and MACE's symmetric contractions by their public attributes. A product
of another shape than the kernels know is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from mace_lora import _compat  # noqa: F401  (before e3nn)

from e3nn import o3  # isort: skip

from mace_lora.backends.kernels import contract, conv
from mace_lora.backends.radial import RadialWeights


class Convolution(torch.nn.Module):
    """A tensor product along the edges and the sum over each atom's neighbours, in one operator.

    Stands in for `conv_tp` of an interaction block, with the arguments of mace-torch's own fused
    convolutions (its attribute `conv_fusion`).
    """

    paths: Tensor
    entries: Tensor
    values: Tensor
    x_blocks: Tensor
    out_blocks: Tensor

    def __init__(self, product: o3.TensorProduct) -> None:
        super().__init__()
        paths: list[list[int]] = []
        entries: list[list[int]] = []
        values: list[float] = []
        irreps = (product.irreps_in1, product.irreps_in2, product.irreps_out)
        for ins in product.instructions:
            chosen = list(zip(irreps, (ins.i_in1, ins.i_in2, ins.i_out), strict=True))
            degrees = [factors[i].ir.l for factors, i in chosen]
            coefficients = ins.path_weight * o3.wigner_3j(*degrees, dtype=torch.float64)
            found = coefficients.nonzero()
            places = [n for f, i in chosen for n in (_components(f[:i]), f[i].ir.dim)]
            paths.append([*places, len(entries), len(entries) + len(found)])
            entries += found.tolist()
            values += coefficients[tuple(found.T)].tolist()
        self.register_buffer("paths", torch.tensor(paths))
        self.register_buffer("entries", torch.tensor(entries))
        self.register_buffer("values", torch.tensor(values, dtype=torch.float64))
        self.register_buffer("x_blocks", _blocks(product.irreps_in1))
        self.register_buffer("out_blocks", _blocks(product.irreps_out))
        self.sizes = [product.irreps_in1[0].mul, *(_components(f) for f in irreps)]

    def forward(
        self, x: Tensor, y: Tensor, w: Tensor | RadialWeights, edge_index: Tensor
    ) -> Tensor:
        """x: (nodes, ...), y: (edges, ...), w: (rows, ...), see `conv` -> messages (nodes, ...)."""
        if isinstance(w, RadialWeights):
            return w.message(self.forward, x, y, edge_index)
        tables = [self.paths, self.entries, self.values, self.x_blocks, self.out_blocks]
        return conv("g", x, y, w, None, edge_index, len(w), tables, self.sizes)

    @staticmethod
    def fits(product: object) -> TypeGuard[o3.TensorProduct]:
        """Whether `product` is one that this class stands in for."""
        if not isinstance(product, o3.TensorProduct) or product.internal_weights:
            return False
        if product.shared_weights or not product.instructions:
            return False
        channels = {mul for mul, _ in [*product.irreps_in1, *product.irreps_out]}
        return (
            len(channels) == 1
            and all(mul == 1 for mul, _ in product.irreps_in2)
            and all(i.connection_mode == "uvu" and i.has_weight for i in product.instructions)
        )


def _components(irreps: o3.Irreps) -> int:
    """Components of one channel."""
    return sum(ir.dim for _, ir in irreps)


def _blocks(irreps: o3.Irreps) -> Tensor:
    """(first component, components) of each irrep."""
    dims = [ir.dim for _, ir in irreps]
    return torch.tensor([[sum(dims[:i]), d] for i, d in enumerate(dims)])


class Part(Protocol):
    """What MACE contracts to one irrep, with the weights of each order."""

    correlation: int
    U_matrix_1: Tensor
    weights_max: Tensor
    weights: Sequence[Tensor]

    def get_buffer(self, target: str) -> Tensor: ...


class SymmetricContraction(Protocol):
    """MACE's."""

    contractions: Sequence[Part]


class Contraction(torch.nn.Module):
    """A symmetric contraction as a polynomial, its equal terms collected, its zeros left out.

    Stands in for MACE's `SymmetricContraction` and reads the weights from it, so that adapters of
    those weights act as ever.
    """

    terms: Tensor

    def __init__(self, product: SymmetricContraction) -> None:
        super().__init__()
        self.parts = list(product.contractions)  # not ours: no entry in our state
        self.orders: list[list[int]] = []
        self.n_k, terms = 0, []
        n_x = self.parts[0].U_matrix_1.shape[-2]
        self.components = []
        for c, part in enumerate(self.parts):
            orders = []
            for order in range(part.correlation, 0, -1):
                matrix = part.get_buffer(f"U_matrix_{order}").to(torch.float64)
                found, coefficients = _terms(matrix, order, n_x, self.n_k)
                if not found:
                    continue
                orders.append(order)
                terms += found
                self.register_buffer(
                    f"u_{c}_{order}", torch.stack(coefficients).to(part.U_matrix_1.dtype)
                )
            self.orders.append(orders)
            size = matrix.shape[0] if matrix.dim() == 3 else 1
            self.components.append(size)
            self.n_k += size
        self.register_buffer("terms", torch.tensor(terms))

    def coefficients(self) -> Tensor:
        """p: (elements, terms, channels), from the weights in use."""
        parts = []
        for c, part in enumerate(self.parts):
            for order in self.orders[c]:
                first = order == part.correlation
                weight = part.weights_max if first else part.weights[part.correlation - order - 1]
                parts.append(torch.matmul(getattr(self, f"u_{c}_{order}"), weight))
        return torch.cat(parts, dim=1)

    def forward(self, x: Tensor, attributes: Tensor) -> Tensor:
        """x: (atoms, channels, n_x), attributes: (atoms, elements), one-hot -> (atoms, ...)."""
        element = attributes.argmax(dim=1)
        f = contract(x, self.coefficients(), element, self.terms, self.n_k)
        return torch.cat(
            [part.flatten(1) for part in torch.split(f, self.components, dim=2)], dim=1
        )

    @staticmethod
    def fits(product: object) -> TypeGuard[SymmetricContraction]:
        """Whether `product` is one that this class stands in for."""
        parts = getattr(product, "contractions", None)
        return parts is not None and all(
            hasattr(p, "U_matrix_1")
            and p.correlation <= 3
            and p.U_matrix_1.shape[-2] <= 128
            and hasattr(p, "weights_max")
            for p in parts
        )


def _terms(
    matrix: Tensor, order: int, n_x: int, first_k: int
) -> tuple[list[list[int]], list[Tensor]]:
    """The different monomials of one order, as (k, i, j, l), and the row of each: (paths,).

    `matrix` is MACE's U: ([components,] n_x, ..., n_x, paths), not symmetric in its x axes.
    """
    if matrix.dim() == order + 1:
        matrix = matrix.unsqueeze(0)
    rows: dict[tuple[int, ...], Tensor] = {}
    for index in (matrix != 0).any(dim=-1).nonzero().tolist():
        k, *xs = index
        key = (first_k + k, *sorted(xs), *[n_x] * (3 - order))
        value = matrix[tuple(index)]
        rows[key] = rows[key] + value if key in rows else value
    rows = {key: row for key, row in sorted(rows.items()) if (row != 0).any()}
    return [list(key) for key in rows], list(rows.values())
