"""Losses that count a label as much as its weights say, so that one that is missing counts nothing.

Those of mace-torch that are about squares of energies, forces, stresses and virials do so. The
others take weights for some labels, or for none: `huber` and `universal` take a type's and a
frame's weight for 1, `huber` each label's as well, `l1l2energyforces` those of forces, and the
losses of dipoles and polarisabilities all of them. With all weights 1 the losses here are
mace-torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from mace_lora.upstream import names as upstream
from mace_lora.upstream.types import Batch, StageTwo

Predictions: TypeAlias = Mapping[str, Tensor]
# (loss of mace-torch, batch, predictions) -> error of each number, with the label's weight
Term: TypeAlias = Callable[[torch.nn.Module, Batch, Predictions], Tensor]

# Forces larger than these, eV/A, count less in `universal`
_LARGE = ((100.0, 0.7), (200.0, 0.4), (300.0, 0.1))
_DIPOLE_SCALE = 100.0  # mace-torch's


class WeightedLoss(torch.nn.Module):
    """A loss of mace-torch, computed from terms that heed all weights.

    Args:
        loss: mace-torch's, which has the weights of the terms and is told in logs.
        terms: by the name of such a weight.
    """

    def __init__(self, loss: torch.nn.Module, terms: Mapping[str, Term]) -> None:
        super().__init__()
        self.loss = loss
        self._terms = dict(terms)

    def forward(self, ref: Batch, pred: Predictions, ddp: bool | None = None) -> Tensor:
        """
        Args:
            ref: a batch with labels.
            pred: outputs of a model.
            ddp: whether to average over all processes; None where there are several.
        """
        total = torch.zeros((), dtype=ref.positions.dtype, device=ref.positions.device)
        for name, term in self._terms.items():
            error = term(self.loss, ref, pred)
            weighted = _like(error, ref.weight, ref) * error
            mean = upstream.original("reduce_loss")(weighted, ddp)
            total = total + getattr(self.loss, f"{name}_weight") * mean
        return total

    def __repr__(self) -> str:
        return repr(self.loss)


def heeding_weights(loss: torch.nn.Module) -> torch.nn.Module:
    """`loss`, of mace-torch, or one in its place that heeds all weights of frames and labels."""
    terms = _TERMS.get(type(loss).__name__)
    return loss if terms is None else WeightedLoss(loss, terms)


def of_run(*positional: object, **keywords: object) -> torch.nn.Module:
    """mace-torch's `get_loss_fn`."""
    return heeding_weights(upstream.original("loss")(*positional, **keywords))


def of_stage_two(*positional: object, **keywords: object) -> tuple[StageTwo, list[bool]]:
    """mace-torch's `get_swa`, whose stage two has a loss of its own."""
    stage, stages = upstream.original("stage_two")(*positional, **keywords)
    return replace(stage, loss_fn=heeding_weights(stage.loss_fn)), stages


# ------------------------------------------------------------------ terms


def _atoms(ref: Batch) -> Tensor:
    """Of each frame, how many: (n_frames,)."""
    counts: Tensor = ref.ptr[1:] - ref.ptr[:-1]
    return counts


def _like(error: Tensor, weight: Tensor, ref: Batch) -> Tensor:
    """A weight of each frame, for the numbers of `error`: a row for each frame or each atom."""
    if len(error) != len(weight):
        weight = torch.repeat_interleave(weight, _atoms(ref))
    return weight.view(-1, *[1] * (error.dim() - 1))


def _difference(name: str, ref: Batch, pred: Predictions) -> Tensor:
    """Label minus prediction: energies, dipoles and polarisabilities per atom."""
    found: Tensor = ref[name] - pred[name]
    if name in ("energy", "dipole", "polarizability"):
        found = found / _like(found, _atoms(ref), ref)
    return found


def _huber(difference: Tensor, delta: Tensor | float) -> Tensor:
    size = difference.abs()
    return torch.where(size < delta, 0.5 * difference**2, delta * (size - 0.5 * delta))


def _delta(loss: torch.nn.Module) -> float:
    """The difference from which on `loss` is linear."""
    return float(vars(loss)["huber_delta"])


def _of_huber(name: str) -> Term:
    def term(loss: torch.nn.Module, ref: Batch, pred: Predictions) -> Tensor:
        difference = _difference(name, ref, pred)
        weight = _like(difference, ref[f"{name}_weight"], ref)
        return weight * _huber(difference, _delta(loss))

    return term


def _of_universal(name: str) -> Term:
    """The label's weight is a factor of the difference, as in mace-torch."""

    def term(loss: torch.nn.Module, ref: Batch, pred: Predictions) -> Tensor:
        difference = _difference(name, ref, pred)
        weight = _like(difference, ref[f"{name}_weight"], ref)
        delta: Tensor | float = _delta(loss)
        if name == "forces":
            size = torch.linalg.vector_norm(weight * ref["forces"], dim=-1, keepdim=True)
            delta = torch.full_like(size, _delta(loss))
            for limit, factor in _LARGE:
                delta = torch.where(size < limit, delta, _delta(loss) * factor)
        return _huber(weight * difference, delta)

    return term


def _absolute_energy(loss: torch.nn.Module, ref: Batch, pred: Predictions) -> Tensor:
    del loss
    weight: Tensor = ref["energy_weight"]
    return weight * _difference("energy", ref, pred).abs()


def _length_of_forces(loss: torch.nn.Module, ref: Batch, pred: Predictions) -> Tensor:
    del loss
    length = torch.linalg.vector_norm(_difference("forces", ref, pred), dim=-1)
    weighted: Tensor = _like(length, ref["forces_weight"], ref) * length
    return weighted


def _square(name: str, scale: float = 1.0) -> Term:
    def term(loss: torch.nn.Module, ref: Batch, pred: Predictions) -> Tensor:
        del loss
        difference = _difference(name, ref, pred)
        weight: Tensor = ref[f"{name}_weight"]  # of a dipole and a polarisability by component
        if weight.dim() == 1:
            weight = _like(difference, weight, ref)
        return scale * weight * difference**2

    return term


_ENERGY_FORCES_STRESS = ("energy", "forces", "stress")
# By class of mace-torch's loss
_TERMS: dict[str, dict[str, Term]] = {
    "WeightedHuberEnergyForcesStressLoss": {n: _of_huber(n) for n in _ENERGY_FORCES_STRESS},
    "UniversalLoss": {n: _of_universal(n) for n in _ENERGY_FORCES_STRESS},
    "WeightedEnergyForcesL1L2Loss": {"energy": _absolute_energy, "forces": _length_of_forces},
    "DipoleSingleLoss": {"dipole": _square("dipole", _DIPOLE_SCALE)},
    "DipolePolarLoss": {n: _square(n) for n in ("dipole", "polarizability")},
    "WeightedEnergyForcesDipoleLoss": {
        **{n: _square(n) for n in ("energy", "forces")},
        "dipole": _square("dipole", _DIPOLE_SCALE),
    },
}
