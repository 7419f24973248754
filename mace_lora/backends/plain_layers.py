"""e3nn's layers as a few matrix products of torch, instead of generated TorchScript.

TorchScript compiles itself during the first steps of every run, for as long as twenty steps take,
and can't be traced into a graph. The functions here give the same numbers from the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mace_lora import _compat  # noqa: F401  (before e3nn)

from e3nn import o3  # isort: skip
from e3nn.o3 import _spherical_harmonics as harmonics  # isort: skip

Forward = Callable[..., Tensor]


def plain_forward(module: torch.nn.Module) -> Forward | None:
    """What computes `module` without TorchScript; None where it must compute by itself."""
    if isinstance(module, o3.Linear) and _is_plain_linear(module):
        return _linear(module)
    if isinstance(module, o3.TensorProduct) and _is_selector(module):
        return _selector(module)
    if isinstance(module, o3.SphericalHarmonics):
        return _spherical_harmonics(module)
    return None


def _slices(irreps: o3.Irreps) -> list[tuple[slice, int, int]]:
    """(columns, multiplicity, components) of each irrep."""
    return [(s, mul, ir.dim) for s, (mul, ir) in zip(irreps.slices(), irreps, strict=True)]


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


def _linear(module: o3.Linear) -> Forward:
    inputs, outputs = _slices(module.irreps_in), _slices(module.irreps_out)
    sizes = [mul * dim for _, mul, dim in outputs]

    def forward(features: Tensor) -> Tensor:
        shape = features.shape[:-1]
        x = features.reshape(-1, features.shape[-1])
        weight, start, bias_start = module.weight.reshape(-1), 0, 0
        parts: list[list[Tensor]] = [[] for _ in outputs]
        for ins in module.instructions:
            if ins.i_in == -1:
                n = ins.path_shape[0]
                parts[ins.i_out].append(module.bias[bias_start : bias_start + n] * ins.path_weight)
                bias_start += n
                continue
            rows, cols = ins.path_shape
            if rows * cols == 0:
                continue
            matrix = weight[start : start + rows * cols].view(rows, cols) * ins.path_weight
            start += rows * cols
            columns, _, dim = inputs[ins.i_in]
            parts[ins.i_out].append(_mix(x[:, columns], matrix, dim))
        return _join(parts, sizes, x).reshape(*shape, -1)

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
    inputs, outputs = _slices(module.irreps_in1), _slices(module.irreps_out)
    scalars = _slices(module.irreps_in2)
    sizes = [mul * dim for _, mul, dim in outputs]

    def forward(x: Tensor, y: Tensor) -> Tensor:
        weight, start = module.weight.reshape(-1), 0
        parts: list[list[Tensor]] = [[] for _ in outputs]
        for ins in module.instructions:
            rows, n, cols = ins.path_shape
            if rows * n * cols == 0:
                continue
            columns, _, dim = inputs[ins.i_in1]
            scale = ins.path_weight / dim**0.5  # the Clebsch-Gordan coefficient with a scalar
            matrix = weight[start : start + rows * n * cols].view(rows, n, cols) * scale
            start += rows * n * cols
            chosen = y[:, scalars[ins.i_in2][0]]
            pairs = x[:, columns].reshape(-1, 1, rows * dim) * chosen.unsqueeze(2)
            pairs = pairs.reshape(-1, n * rows * dim)
            by_scalar = matrix.transpose(0, 1).reshape(n * rows, cols)
            parts[ins.i_out].append(_mix(pairs, by_scalar, dim))
        return _join(parts, sizes, x)

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
