"""Adapters combined so that each keeps what it does on frames of its own.

For a linear layer, y = x W, the weight that is nearest to all of several W_i in what they give on
inputs X_i of their own has a closed form, per irrep (RegMean: Jin et al., ICLR 2023, eq. 2):

    W = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i,      G_i = X_i^T X_i,

with the off-diagonal of each G_i shrunk by a factor, as there. Components of an irrep count as
inputs of their own, so that W mixes copies alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from mace_lora.adapters.layout import IrrepBlock, Site, WeightLayout
from mace_lora.model.layers import find_sites
from mace_lora.upstream.types import Batch

SHRUNK = 0.9  # what is left of the off-diagonal, in the paper the best of all that were tried
RIDGE = 1e-6  # of the mean second moment: directions without inputs get the mean of the updates
# Kinds of layers whose input is one tensor of features
_LINEAR = ("linear", "dense", "radial")

# By name of a weight, the second moments of its inputs: (rows, rows) for each group
Moments = dict[str, list[torch.Tensor]]


@torch.no_grad()
def solved(
    updates: Sequence[torch.Tensor],
    moments: Sequence[Sequence[torch.Tensor]],
    weights: Sequence[float],
    layout: WeightLayout,
) -> torch.Tensor:
    """One update of a weight out of several.

    Args:
        updates: W_i - W of each adapter, of the shape of the weight.
        moments: G_i of each, a (rows, rows) matrix per group.
        weights: w_i.
        layout: of the weight.
    """
    groups = [layout.groups_of_blocks(layout.split(u)) for u in updates]
    found = []
    for g in range(len(layout.groups)):
        of_adapters = [_shrunk(m[g]) * w for m, w in zip(moments, weights, strict=True)]
        total = torch.stack(of_adapters).sum(0)
        mean = sum(w * u[g] for w, u in zip(weights, groups, strict=True)) / sum(weights)
        ridge = RIDGE * total.diagonal().mean().clamp_min(torch.finfo(total.dtype).tiny)
        wanted = sum(m @ u[g] for m, u in zip(of_adapters, groups, strict=True)) + ridge * mean
        found.append(torch.linalg.solve(total + ridge * torch.eye(len(total)).to(total), wanted))
    return layout.join(layout.blocks_of_groups(found)).reshape(updates[0].shape)


def _shrunk(moment: torch.Tensor) -> torch.Tensor:
    return SHRUNK * moment + (1 - SHRUNK) * torch.diag(moment.diagonal())


def moments(model: torch.nn.Module, batches: Sequence[Batch]) -> Moments:
    """Second moments of what reaches the linear layers of `model` on these frames."""
    found: Moments = {}
    with _watched(model, found):
        for batch in batches:
            model(batch.to_dict(), training=False)
    return found


@contextmanager
def _watched(model: torch.nn.Module, found: Moments) -> Iterator[None]:
    handles = []
    for site in find_sites(model)[0]:
        parts = _inputs(site)
        if parts is not None:
            hook = partial(_add, found, site.name, parts)
            handles.append(site.module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(site: Site) -> list[list[IrrepBlock]] | None:
    """For each group the features that it reads; None where the input isn't one tensor of them."""
    layout = site.layout
    if layout.kind not in _LINEAR or layout.component_major:
        return None
    if not layout.inputs:
        (group,) = layout.groups
        return [[IrrepBlock(0, group.rows, 1, True)]]
    parts = [
        [b for b in layout.inputs if b.reached and _label(b) == g.label] for g in layout.groups
    ]
    fits = all(_rows(p) == g.rows for p, g in zip(parts, layout.groups, strict=True))
    return parts if fits else None


def _label(block: IrrepBlock) -> str:
    return f"{(block.dim - 1) // 2}{'e' if block.even else 'o'}"


def _rows(part: Sequence[IrrepBlock]) -> int:
    return sum(block.mul for block in part)


@torch.no_grad()
def _add(
    found: Moments,
    name: str,
    parts: list[list[IrrepBlock]],
    module: torch.nn.Module,
    inputs: tuple[Any, ...],
) -> None:
    del module
    features = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
    made = []
    for part in parts:
        copies = [
            features[:, b.start : b.start + b.mul * b.dim].reshape(-1, b.mul, b.dim) for b in part
        ]
        x = torch.cat(copies, dim=1).transpose(1, 2).reshape(-1, _rows(part))
        made.append(x.T @ x / max(len(features), 1))
    before = found.get(name)
    found[name] = made if before is None else [a + b for a, b in zip(before, made, strict=True)]
