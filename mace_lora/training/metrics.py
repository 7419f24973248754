"""Errors over labelled frames alone, in one process or several.

mace-torch leaves frames without a label out of some errors, and counts them with a label of 0 in
others: energies per atom, relative errors of forces, virials, dipoles and polarisabilities per
atom.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mace_lora.upstream import names as upstream
from mace_lora.upstream.types import Batch

# quantity -> mace-torch's counter of batches that have it, and its lists: labels where relative
# errors are taken, differences, differences per atom
_STATES = {
    "energy": ("E_computed", None, "delta_es", "delta_es_per_atom"),
    "forces": ("Fs_computed", "fs", "delta_fs", None),
    "stress": ("stress_computed", None, "delta_stress", None),
    "virials": ("virials_computed", None, "delta_virials", "delta_virials_per_atom"),
    "dipole": ("Mus_computed", "mus", "delta_mus", "delta_mus_per_atom"),
    "polarizability": (
        "polarizability_computed",
        None,
        "delta_polarizability",
        "delta_polarizability_per_atom",
    ),
}


class Metrics(Protocol):
    """mace-torch's `MACELoss`, as far as it is used here; the lists of `_STATES` beside it."""

    loss_fn: Callable[..., Tensor]
    total_loss: Tensor
    num_data: Tensor
    forward: Callable[[Batch, dict[str, Tensor | None]], tuple[None, None]]

    def update(self, batch: Batch, output: dict[str, Tensor | None]) -> None: ...


class _OfThisProcess(torch.nn.Module):
    """A loss over the frames at hand, without asking the other processes for theirs."""

    def __init__(self, loss_fn: torch.nn.Module) -> None:
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, ref: Batch, pred: Mapping[str, Tensor | None]) -> Tensor:
        loss: Tensor = self.loss_fn(ref=ref, pred=pred, ddp=False)
        return loss


def metrics(loss_fn: torch.nn.Module) -> Metrics:
    """mace-torch's `MACELoss`, over labelled frames, whose sums are over all processes anyway.

    mace-torch's losses add up over processes by themselves, batch by batch: right in training, but
    in a validation the loss comes out as many times too large as there are processes, and the run
    hangs where one of them has a batch more than another. It also sums up each batch by itself,
    for numbers that nobody reads; here batches are only added.
    """
    several = dist.is_available() and dist.is_initialized()
    kind = type("Metrics", (upstream.original("metrics"),), {"update": _update})
    found: Metrics = kind(_OfThisProcess(loss_fn) if several else loss_fn)

    def forward(batch: Batch, output: dict[str, Tensor | None]) -> tuple[None, None]:
        found.update(batch, output)
        return None, None

    found.forward = forward
    return found


def _update(metrics: Metrics, batch: Batch, output: dict[str, Tensor | None]) -> None:
    """In the place of `MACELoss.update`."""
    metrics.total_loss += metrics.loss_fn(pred=output, ref=batch)
    metrics.num_data += batch.num_graphs
    for quantity, (computed, labels, differences, per_atom) in _STATES.items():
        prediction: Tensor | None = output.get(quantity)
        label: Tensor | None = batch[quantity]
        if prediction is None or label is None:
            continue
        weighted, of_frames = labelled(batch, quantity, label)
        difference = label - prediction
        # also where nothing is labelled: all processes must have something to put together
        getattr(metrics, differences).append(difference[weighted])
        if labels is not None:
            getattr(metrics, labels).append(label[weighted])
        if per_atom is not None:
            counts = (batch.ptr[1:] - batch.ptr[:-1]).view(-1, *[1] * (label.dim() - 1))
            getattr(metrics, per_atom).append((difference / counts)[weighted])
        setattr(metrics, computed, getattr(metrics, computed) + of_frames.any())


def labelled(batch: Batch, quantity: str, label: Tensor) -> tuple[Tensor, Tensor]:
    """Which numbers of `label` weigh anything, and which frames.

    Returns:
        Masks of label's shape, and of shape (n_frames,).
    """
    weight = batch[f"{quantity}_weight"]  # of a dipole and a polarisability by component
    weight = weight * batch.weight.view(-1, *[1] * (weight.dim() - 1)) > 0
    of_frames = weight.flatten(1).any(dim=1) if weight.dim() > 1 else weight
    if len(label) != len(weight):
        weight = torch.repeat_interleave(weight, batch.ptr[1:] - batch.ptr[:-1])
    weight = weight.view(*weight.shape, *[1] * (label.dim() - weight.dim()))
    return weight.expand(label.shape), of_frames
