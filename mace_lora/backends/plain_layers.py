"""e3nn's layers, and MACE's around them, as a few matrix products of torch, not TorchScript.

TorchScript compiles itself during the first steps of every run, for as long as twenty steps take,
and can't be traced into a graph. The functions here give the same numbers from the same weights.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from mace_lora import _compat  # noqa: F401  (before e3nn)

from e3nn import o3  # isort: skip
from e3nn.o3 import _spherical_harmonics as harmonics  # isort: skip

Forward = Callable[..., Tensor]
FEW = 8  # elements, up to which one product with all of them is faster than one for each


def plain_forward(module: torch.nn.Module) -> Forward | None:
    """What computes `module` without TorchScript; None where it must compute by itself."""
    if isinstance(module, o3.Linear) and _is_plain_linear(module):
        return _linear(module)
    if isinstance(module, o3.TensorProduct) and _is_selector(module):
        return _selector(module)
    if isinstance(module, o3.SphericalHarmonics):
        return _spherical_harmonics(module)
    if _is_reshape(module):
        return _reshape(module)
    return None


def _sizes(irreps: o3.Irreps) -> list[int]:
    """Columns of each irrep, to split tensors by: a slice has a gradient as large as the whole."""
    return [mul * ir.dim for mul, ir in irreps]


def _join(parts: list[list[Tensor]], sizes: list[int], like: Tensor) -> Tensor:
    """The sum of each irrep's contributions, (n, columns), side by side; zeros where none is."""
    n = like.shape[0]
    blocks = [
        functools.reduce(torch.add, contributions) if contributions else like.new_zeros(n, size)
        for contributions, size in zip(parts, sizes, strict=True)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _is_plain_linear(module: o3.Linear) -> bool:
    n_paths = sum(i.path_shape[0] * i.path_shape[1] for i in module.instructions if i.i_in != -1)
    return bool(module.internal_weights and module.weight.numel() == n_paths > 0)


@dataclass(frozen=True)
class _Path:
    """One product of a linear layer: irreps side by side, of one kind, to another one.

    e3nn makes a path of each pair of irreps. Those of a message, one for each path of the
    convolution, are taken together where nothing else reads them.
    """

    inputs: tuple[int, ...]
    output: int
    rows: int
    cols: int
    dim: int
    factor: float

    def continued(self, other: _Path) -> bool:
        """Whether `other` reads the next irrep for the same output."""
        ours = (self.output, self.cols, self.dim, self.factor)
        theirs = (other.output, other.cols, other.dim, other.factor)
        return ours == theirs and other.inputs[0] == self.inputs[-1] + 1


def _paths(module: o3.Linear) -> list[_Path]:
    """In the order of their weights."""
    used = [ins for ins in module.instructions if ins.i_in != -1 and 0 not in ins.path_shape]
    readers = Counter(ins.i_in for ins in used)
    paths: list[_Path] = []
    for ins in used:
        dim = module.irreps_in[ins.i_in].ir.dim
        rows, cols = ins.path_shape
        new = _Path((ins.i_in,), ins.i_out, rows, cols, dim, ins.path_weight)
        last = paths[-1] if paths else None
        alone = all(readers[i] == 1 for p in (last, new) if p for i in p.inputs)
        if last and alone and last.continued(new):
            paths[-1] = replace(last, inputs=last.inputs + new.inputs, rows=last.rows + new.rows)
        else:
            paths.append(new)
    return paths


def _linear(module: o3.Linear) -> Forward:
    inputs, outputs = _sizes(module.irreps_in), _sizes(module.irreps_out)
    paths = _paths(module)
    read = {i for path in paths for i in path.inputs}
    blocks = sorted({p.inputs for p in paths} | {(i,) for i in range(len(inputs)) if i not in read})
    columns = [sum(inputs[i] for i in block) for block in blocks]
    weights = [path.rows * path.cols for path in paths]
    biases = [ins for ins in module.instructions if ins.i_in == -1]

    def forward(features: Tensor) -> Tensor:
        shape = features.shape[:-1]
        x = features.reshape(-1, features.shape[-1])
        parts: list[list[Tensor]] = [[] for _ in outputs]
        of_block = dict(zip(blocks, torch.split(x, columns, dim=1), strict=True))
        for path, weight in zip(
            paths, torch.split(module.weight.reshape(-1), weights), strict=True
        ):
            matrix = weight.view(path.rows, path.cols) * path.factor
            parts[path.output].append(_mix(of_block[path.inputs], matrix, path.dim))
        if biases:
            sizes = [ins.path_shape[0] for ins in biases]
            for ins, bias in zip(biases, torch.split(module.bias, sizes), strict=True):
                parts[ins.i_out].append(bias * ins.path_weight)
        return _join(parts, outputs, x).reshape(*shape, -1)

    return forward


def _mix(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """The copies of an irrep mixed: (n, rows x dim) to (n, cols x dim)."""
    if dim == 1:
        return x @ matrix
    rows, cols = matrix.shape
    by_component = x.view(-1, rows, dim).transpose(1, 2).reshape(-1, rows)
    return (by_component @ matrix).view(-1, dim, cols).transpose(1, 2).reshape(-1, cols * dim)


def _is_selector(module: o3.TensorProduct) -> bool:
    """A fully connected product with scalars: MACE's skip connections, by chemical element."""
    return bool(
        module.internal_weights
        and module.shared_weights
        and module.weight.numel() > 0
        and all(ir.l == 0 for _, ir in module.irreps_in2)
        and all(i.connection_mode == "uvw" and i.has_weight for i in module.instructions)
    )


def _selector(module: o3.TensorProduct) -> Forward:
    inputs, outputs = _sizes(module.irreps_in1), _sizes(module.irreps_out)
    scalars = _sizes(module.irreps_in2)
    used = [ins for ins in module.instructions if 0 not in ins.path_shape]
    shapes = [ins.path_shape for ins in used]
    sizes = [rows * n * cols for rows, n, cols in shapes]

    def forward(x: Tensor, y: Tensor) -> Tensor:
        parts: list[list[Tensor]] = [[] for _ in outputs]
        weights = torch.split(module.weight.reshape(-1), sizes)
        columns, chosen = torch.split(x, inputs, dim=1), torch.split(y, scalars, dim=1)
        kinds = _Kinds.of(y) if len(scalars) == 1 and y.shape[1] > FEW else None
        for ins, (rows, n, cols), weight in zip(used, shapes, weights, strict=True):
            dim = module.irreps_in1[ins.i_in1].ir.dim
            scale = ins.path_weight / dim**0.5  # the Clebsch-Gordan coefficient with a scalar
            by_scalar = weight.view(rows, n, cols).transpose(0, 1) * scale
            features = columns[ins.i_in1]
            if kinds is not None:
                found = kinds.mix(features, by_scalar, dim)
            else:
                pairs = features.reshape(-1, 1, rows * dim) * chosen[ins.i_in2].unsqueeze(2)
                pairs = pairs.reshape(-1, n * rows * dim)
                found = _mix(pairs, by_scalar.reshape(n * rows, cols), dim)
            parts[ins.i_out].append(found)
        return _join(parts, outputs, x)

    return forward


@dataclass(frozen=True)
class _Kinds:
    """Rows that have one of many scalars each, as atoms have one of a foundation model's elements:
    only the matrices of those that occur are used.

    Attributes:
        rows: by scalar, of those that occur.
        back: (rows,), each one's place in `rows` side by side.
    """

    rows: dict[int, Tensor]
    back: Tensor

    @classmethod
    def of(cls, y: Tensor) -> _Kinds | None:
        """None where `y`, (n, scalars), isn't one-hot."""
        largest, kind = y.max(dim=1)
        if not ((largest == 1).all() and int(y.count_nonzero()) == len(y)):
            return None
        rows = {z: (kind == z).nonzero().squeeze(1) for z in torch.unique(kind).tolist()}
        return cls(rows, torch.cat(list(rows.values())).argsort()) if rows else None

    def mix(self, x: Tensor, matrices: Tensor, dim: int) -> Tensor:
        """(n, rows x dim) with (scalars, rows, cols) to (n, cols x dim)."""
        by_kind = matrices.unbind()
        return torch.cat([_mix(x[i], by_kind[z], dim) for z, i in self.rows.items()])[self.back]


class _Reshape(Protocol):
    """mace-torch's, of messages: channels apart from components."""

    muls: list[int]
    dims: list[int]


def _is_reshape(module: object) -> TypeGuard[_Reshape]:
    known = type(module).__name__ == "reshape_irreps" and hasattr(module, "muls")
    return known and getattr(module, "cueq_config", None) is None


def _reshape(module: _Reshape) -> Forward:
    shapes = list(zip(module.muls, module.dims, strict=True))

    def forward(tensor: Tensor) -> Tensor:
        parts = torch.split(tensor, [mul * dim for mul, dim in shapes], dim=1)
        fields = [p.reshape(-1, *shape) for p, shape in zip(parts, shapes, strict=True)]
        return torch.cat(fields, dim=2)

    return forward


def _spherical_harmonics(module: o3.SphericalHarmonics) -> Forward | None:
    # what torch.jit.script was given; torch keeps it for its own compiler
    polynomials: Callable[..., Tensor] | None = getattr(
        harmonics._spherical_harmonics, "_torchdynamo_inline", None
    )
    if polynomials is None or not module._is_range_lmax or module.normalization != "component":
        return None
    degrees = range(module._lmax + 1)

    def forward(x: Tensor) -> Tensor:
        if module.normalize:
            x = torch.nn.functional.normalize(x, dim=-1)
        values = polynomials(module._lmax, x[..., 0], x[..., 1], x[..., 2])
        return torch.cat(
            [values[..., l * l : (l + 1) ** 2] * (2 * l + 1) ** 0.5 for l in degrees], dim=-1
        )

    return forward
