"""The bases in which weights of contractions are given, and updates carried from one to another.

A product of features up to some order is a sum of paths, each with weights, and the coupling
tensors (`U_matrix_...`) say what each path is. mace-torch has a full basis and a reduced one. In
the full one paths depend on each other, since all factors of a product are the same features and
only the symmetric part of a coupling counts; where parities are natural (0e, 1o, 2e, ...), both
span the same space. So an adapter file says what its paths are: their values at fixed features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch

from mace_lora.adapters.low_rank import LowRank
from mace_lora.errors import ArtefactError
from mace_lora.model.fingerprint import base_state
from mace_lora.model.injection import adapters

# Points at which paths are compared, at least
LEAST_POINTS = 4
# Relative differences of constants that come from another precision, not from another meaning
ROUNDING = 1e-5

# Values of paths by the name of the weight, each (points, 2l+1, paths)
Bases = dict[str, torch.Tensor]


def bases_of(model: torch.nn.Module) -> Bases:
    """What the paths of MACE's own contractions are; none in cuequivariance's format."""
    return {
        weight: values(module.get_buffer(f"U_matrix_{order}"), order)
        for path, module in model.named_modules()
        for order, weight in weights_of(path, module)
    }


def weights_of(path: str, module: torch.nn.Module) -> Iterator[tuple[int, str]]:
    """Orders of the contraction at `path`, and their weights by name; none of other modules."""
    orders = [n for n, _ in module.named_buffers(recurse=False) if n.startswith("U_matrix_")]
    highest = len(orders)
    for order in range(1, highest + 1):
        last = "weights_max" if order == highest else f"weights.{highest - 1 - order}"
        yield order, f"{path}.{last}"


def values(coupling: torch.Tensor, order: int, points: int = 0) -> torch.Tensor:
    """The paths of a coupling tensor at fixed features, in double precision.

    Args:
        coupling: ((2l+1,) features, ..., features, paths), a feature axis for each of `order`.
        points: how many; 0 for as many as tell these paths apart, twice over.

    Returns:
        (points, 2l+1, paths); the first points are always the same.
    """
    double = coupling.detach().cpu().double()
    if double.ndim == order + 1:
        double = double.unsqueeze(0)
    components, features, paths = double.shape[0], double.shape[1], double.shape[-1]
    points = points or max(LEAST_POINTS, math.ceil((2 * paths + 4) / components))
    at = waves(points, features)
    found = torch.einsum("mi...p,ki->km...p", double, at)
    for _ in range(order - 1):
        found = torch.einsum("kmi...p,ki->km...p", found, at)
    # what is antisymmetric leaves rounding, and that is no path
    if found.abs().max() <= ROUNDING * double.abs().max():
        found = torch.zeros_like(found)
    return found.reshape(points, components, paths)


def waves(rows: int, columns: int) -> torch.Tensor:
    """A matrix without pattern, the same with every version of torch."""
    frequencies = torch.arange(2, columns + 2, dtype=torch.float64).sqrt()
    return torch.sin(torch.outer(torch.arange(1, rows + 1, dtype=torch.float64), frequencies))


def common(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of two sets of paths at the points that both have."""
    points = min(len(one), len(other))
    return one[:points], other[:points]


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two sets of paths, by their values, are the same one by one."""
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= ROUNDING * one.abs().max().clamp_min(1e-30))


def transition(there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """(paths here, paths there): the smallest weights here whose values are those there, or near.

    `left_over` says how near.
    """
    now, before = (v.reshape(-1, v.shape[-1]) for v in (here, there))
    found: torch.Tensor = torch.linalg.pinv(now, rtol=ROUNDING) @ before
    return found


def left_over(
    there: torch.Tensor, before: torch.Tensor, here: torch.Tensor, now: torch.Tensor
) -> float:
    """How far products with weights `now` are from those with `before`, relative to these.

    Args:
        there, here: values of the paths.
        before, now: weights or updates of them, (elements, paths, channels).
    """
    wanted = torch.einsum("kmp,epc->kmec", there, before.double())
    found = torch.einsum("kmp,epc->kmec", here, now.double())
    size = float(wanted.norm())
    return float((found - wanted).norm()) / size if size else float(found.norm() > 0)


def carry(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], there: Bases, here: Bases
) -> dict[str, torch.Tensor]:
    """The factors of an adapter for `model`, whose contractions have other paths.

    Args:
        model: carries the adapters that get the factors, untouched here.
        tensors: factors by `<weight>.<factor>`.
        there, here: the paths to which these belong, and those of `model`.

    Returns:
        `tensors`, with the factors of updates of contractions in the paths of `model`: exactly the
        same update. Factors that mean the same already are kept to the last bit.

    Raises:
        ArtefactError: an update isn't a combination of the paths here, or a method's factors also
            depend on base weights in the paths there.
    """
    found, own, state = dict(tensors), dict(adapters(model)), base_state(model)
    for name, before in there.items():
        if name not in here:
            continue
        before, now = common(before, here[name])
        if alike(before, now):
            continue
        prefix = f"{name}."
        mine = {k.removeprefix(prefix): found.pop(k) for k in tensors if k.startswith(prefix)}
        adapter = own.get(name)
        if mine:
            if "D" in mine:  # trained in full, it may be flat
                elements, _, channels = state[name].shape
                mine["D"] = mine["D"].reshape(elements, before.shape[-1], channels)
            mine = _carried(name, mine, adapter, before, now)
        if adapter is not None:
            fresh = {k: p.detach() for k, p in adapter.named_parameters()}
            found.update({prefix + k: v for k, v in (mine or fresh).items()})
    return found


def _carried(
    name: str,
    mine: dict[str, torch.Tensor],
    adapter: Any,
    there: torch.Tensor,
    here: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The factors of one weight in other paths; none where it needs none."""
    matrix = transition(there, here)
    if torch.linalg.matrix_rank(here.flatten(0, 1)) == here.flatten(0, 1).shape[0]:
        raise ArtefactError(f"the file says too little of the paths of {name} to carry it over")
    if set(mine) == {"lora_gain.0"}:  # DoRA of rank 0: multiples of whatever the base has
        return mine
    if set(mine) == {"D"}:
        before = mine["D"].double()
        now = torch.einsum("qp,epc->eqc", matrix, before)
        _check(name, left_over(there, before, here, now))
        return {} if adapter is None else {"D": now.reshape(adapter.D.shape)}
    if set(mine) != {"lora_A.0", "lora_B.0"}:
        raise ArtefactError(
            f"the adapter's update of {name} also depends on the base weights, in a basis of paths "
            "that this model doesn't have: load it on the model that it was trained from and merge "
            "it there (lora, elora and full can be carried over)"
        )
    a, b = (mine[k].double() for k in ("lora_A.0", "lora_B.0"))
    before = (a @ b).reshape(-1, there.shape[-1], b.shape[1])
    rows = a.reshape(-1, there.shape[-1], a.shape[1])
    moved = torch.einsum("qp,epr->eqr", matrix, rows).reshape(-1, a.shape[1])
    now = (moved @ b).reshape(-1, here.shape[-1], b.shape[1])
    _check(name, left_over(there, before, here, now))
    if adapter is None:
        return {}
    if moved.shape == adapter.lora_A[0].shape:
        return {"lora_A.0": moved, "lora_B.0": b}
    # the rank is capped by the number of paths, and no product of the factors needs more
    fitted = deepcopy(adapter).double()
    assert isinstance(fitted, LowRank)
    fitted.fit_parts([(moved @ b) * fitted.parts[0].scale])
    return {k: p.detach() for k, p in fitted.named_parameters()}


def _check(name: str, left: float) -> None:
    if left > ROUNDING:
        raise ArtefactError(
            f"the adapter's update of {name} can't be had with the paths of this model: the best "
            f"one misses {left:.1e} of its products, where rounding alone is below {ROUNDING:g}. "
            "Load it on a model in the basis that it was trained in"
        )
