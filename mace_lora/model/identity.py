"""What adapter files and checkpoints keep of a model, and whether another is the same one.

A model whose contractions are given in another basis has other numbers there, and predicts the
same. So beside the fingerprint there are one of all other weights, and a few sums over the products
of the contractions, which no basis changes.
"""

from __future__ import annotations

import math

import torch

from mace_lora.model.bases import LEAST_POINTS, ROUNDING, Bases, bases_of, waves
from mace_lora.model.description import Description, describe
from mace_lora.model.fingerprint import base_state, fingerprint

SUMS = 4  # of the products of a contraction


def identity(model: torch.nn.Module) -> Description:
    """`describe`, and which weights these are.

    Added are `fingerprint`, `bases`: the values of paths by the weight of a contraction (see
    `bases`), and `any_basis`: what is the same in all of them. The last two are missing in
    cuequivariance's format.
    """
    bases = bases_of(model)
    found = {**describe(model), "fingerprint": fingerprint(model)}
    if bases:
        found["bases"] = {name: values.tolist() for name, values in bases.items()}
        found["any_basis"] = _in_any_basis(model, bases)
    return found


def stored_bases(description: Description) -> Bases:
    """The `bases` of an identity; none where it has none."""
    stored = description.get("bases") or {}
    return {name: torch.as_tensor(v, dtype=torch.float64) for name, v in stored.items()}


def without_bases(description: Description) -> Description:
    """The rest of an identity: what people read."""
    return {key: value for key, value in description.items() if key != "bases"}


def is_same(model: torch.nn.Module, description: Description) -> bool:
    """Whether `description` is of this model, in this basis of its contractions or in another."""
    if fingerprint(model) == description["fingerprint"]:
        return True
    wanted, bases = description.get("any_basis"), bases_of(model)
    if wanted is None or wanted["sums"].keys() != bases.keys():
        return False
    found = _in_any_basis(model, bases)
    return found["fingerprint"] == wanted["fingerprint"] and all(
        _near(found["sums"][name], wanted["sums"][name]) for name in bases
    )


def check_any_basis(table: object) -> bool:
    """Whether a file's `any_basis` is one."""
    return (
        isinstance(table, dict)
        and set(table) == {"fingerprint", "sums"}
        and isinstance(table["fingerprint"], str)
        and isinstance(table["sums"], dict)
        and all(_numbers(text) for text in table["sums"].values())
    )


def _in_any_basis(model: torch.nn.Module, bases: Bases) -> Description:
    state = base_state(model)
    sums = {}
    for name, values in bases.items():
        weight = state[name].detach().cpu().double()
        elements, paths, channels = weight.shape
        at = values[:LEAST_POINTS].reshape(-1, paths)
        projected = waves(SUMS, len(at)) @ at
        over = waves(1, elements * channels).reshape(elements, channels)
        numbers = torch.einsum("sp,epc,ec->s", projected, weight, over).tolist()
        sums[name] = " ".join(f"{number:.9e}" for number in numbers)  # one line of JSON
    return {"fingerprint": fingerprint(model, without=bases), "sums": sums}


def _near(one: str, other: str) -> bool:
    mine, theirs = (torch.tensor(_numbers(text)) for text in (one, other))
    return bool((mine - theirs).norm() <= ROUNDING * theirs.norm().clamp_min(1e-12))


def _numbers(text: object) -> list[float]:
    """The sums in a text; none where it is no such text."""
    try:
        found = [float(word) for word in str(text).split()]
    except ValueError:
        return []
    return found if len(found) == SUMS and all(map(math.isfinite, found)) else []
