"""A weight as adapters see it: matrices, one per path of a layer, inside one tensor.

Adapters see matrices and never ask what layer they came from. What they need to know of it are
fields of `WeightLayout`, which `model.layers` fills in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Group:
    """The blocks of one irrep, seen as one (rows, cols) matrix from all inputs to all outputs."""

    label: str
    rows: int
    cols: int


@dataclass(frozen=True)
class Block:
    """One path of a layer: a (rows, cols) matrix, row-major from `start` in the flat weight.

    `row` and `col` say where the matrix stands inside the matrix of its `group`.
    """

    start: int
    rows: int
    cols: int
    group: int
    row: int = 0
    col: int = 0

    @property
    def size(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class IrrepBlock:
    """`mul` copies of an irrep among the features of a layer, from component `start` on.

    `reached`: some path of the layer leads from or to it.
    """

    start: int
    mul: int
    dim: int
    even: bool
    reached: bool = True

    @property
    def scalar(self) -> bool:
        """Whether its components are invariant under rotations and inversion (0e)."""
        return self.dim == 1 and self.even


@dataclass(frozen=True)
class WeightLayout:
    """A weight tensor as matrices that act from the input (rows) to the output (cols).

    Attributes:
        kind: what the layer is called in targets and reports; nothing is to be computed from it.
        shape: of the tensor, or the flat one where its shape depends on the kernels in use.
        groups: the matrices of whole irreps.
        blocks: the matrices of single paths, in storage order.
        unit: the standard deviation that a random matrix needs, in the layer's own normalisation,
            to turn inputs of unit variance into outputs of unit variance.
        transposed: the tensor is (cols, rows), as in torch.nn.Linear.
        inputs, outputs: the features of an equivariant linear layer; empty for other layers.
        component_major: inside a block of these features the component is the slow index and the
            copy the fast one (cuequivariance's ir_mul).
        normalised: a further layer of this kind, put behind it, would divide by the square root of
            the number of copies that it reads.
        upstream_std: the standard deviation with which mace-torch's `--lora` draws A.
        small: too few numbers for factors to pay.
    """

    kind: str
    shape: tuple[int, ...]
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    unit: float = 1.0
    transposed: bool = False
    inputs: tuple[IrrepBlock, ...] = ()
    outputs: tuple[IrrepBlock, ...] = ()
    component_major: bool = False
    normalised: bool = False
    upstream_std: float = 1e-3
    small: bool = False

    def simplified(self) -> WeightLayout:
        """Neighbouring inputs of one irrep as one block: 4x0e + 3x0e becomes 7x0e.

        Only in equivariant linear layers, and where their matrices lie one below the other in
        storage already.
        """
        if not self.inputs:
            return self
        merged: list[Block] = []
        for block in self.blocks:
            last = merged[-1] if merged else None
            if (
                last is not None
                and (last.group, last.col, last.cols) == (block.group, block.col, block.cols)
                and last.start + last.size == block.start
                and last.row + last.rows == block.row
            ):
                merged[-1] = replace(last, rows=last.rows + block.rows)
            else:
                merged.append(block)
        return replace(self, blocks=tuple(merged))

    def split(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The matrices of `weight`, in the order of `blocks`, as views."""
        if self.transposed:
            return [weight.t()]
        flat = weight.reshape(-1)
        return [flat[b.start : b.start + b.size].view(b.rows, b.cols) for b in self.blocks]

    def join(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`: one tensor of `shape` from a matrix per block."""
        if self.transposed:
            return matrices[0].t()
        if len(matrices) == 1:
            return matrices[0].reshape(self.shape)
        return torch.cat([m.reshape(-1) for m in matrices]).view(self.shape)

    def blocks_of_groups(self, matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Cut the matrices of the groups into those of the blocks."""
        return [
            matrices[b.group][b.row : b.row + b.rows, b.col : b.col + b.cols] for b in self.blocks
        ]

    def groups_of_blocks(self, matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inverse of `blocks_of_groups`; zero where a group has no path."""
        found = [matrices[0].new_zeros(group.rows, group.cols) for group in self.groups]
        for b, matrix in zip(self.blocks, matrices, strict=True):
            found[b.group][b.row : b.row + b.rows, b.col : b.col + b.cols] = matrix
        return found


@dataclass(frozen=True)
class Site:
    """A weight that can be adapted: tensor `tensor` of `module`, called `name` in the model."""

    name: str
    module: torch.nn.Module
    tensor: str
    layout: WeightLayout

    @property
    def weight(self) -> torch.Tensor:
        """The weight in use: the effective one where an adapter is attached."""
        weight: torch.Tensor = getattr(self.module, self.tensor)
        return weight


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not adapted, and why."""

    name: str
    numel: int
    reason: str
