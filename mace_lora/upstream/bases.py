"""The bases in which files and the installed mace-torch have the weights of contractions.

A product of features up to some order is a sum of paths, each with its weights, and the coupling
tensors (`U_matrix_...`) say what each path is. mace-torch has a full basis, whose paths depend on
each other once the product is symmetrised, and a reduced one; both may differ between versions. A
file brings its coupling tensors along, and these are what counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch

from mace_lora.errors import FoundationModelError
from mace_lora.model.bases import ROUNDING, left_over, transition, values, weights_of
from mace_lora.upstream.hyperparameters import Foreign, number, part, parts, tensor
from mace_lora.upstream.precision import default_dtype
from mace_lora.upstream.reading import Made

_POINTS = 64  # at which paths are compared: there are fewer independent ones


def contractions(tree: Made) -> Iterator[tuple[str, Made]]:
    """MACE's own contractions in `tree` by path; none in cuequivariance's format."""
    for i, product in enumerate(parts(tree, "products")):
        own = product.get("symmetric_contractions.contractions")
        for j, made in (own.children if isinstance(own, Made) else {}).items():
            yield f"products.{i}.symmetric_contractions.contractions.{j}", made


def symmetric(coupling: torch.Tensor, vector: bool) -> torch.Tensor:
    """A coupling tensor as a matrix of what it couples, symmetrised, by its paths.

    Contracted with copies of one vector of features, only the symmetric part counts: the paths of
    the full basis depend on each other, those of the reduced one do not.

    Args:
        coupling: ((2l+1,) features, ..., features, paths) for each order of correlation.
        vector: whether there is an axis 2l+1 of the output in front.
    """
    first = 1 if vector else 0
    axes = range(first, coupling.ndim - 1)
    orders = list(itertools.permutations(axes))
    double = coupling.double()
    total = torch.zeros_like(double)
    for order in orders:
        total += double.permute(*range(first), *order, coupling.ndim - 1)
    # what is antisymmetric leaves rounding, and that is no path
    if total.abs().max() <= ROUNDING * double.abs().max():
        total.zero_()
    return (total / len(orders)).reshape(-1, coupling.shape[-1])


def is_full(tree: Made) -> bool:
    """Whether some paths of a contraction depend on each other, which tells the full basis."""
    return _depend(made.tensors("_buffers") for _, made in contractions(tree))


def tell_basis(model: torch.nn.Module) -> None:
    """Let `use_reduced_cg` of a model say what its weights are.

    Where cuequivariance is missing, mace-torch builds the full basis and says otherwise.
    """
    if getattr(model, "use_reduced_cg", False) and _depend(
        dict(module.named_buffers(recurse=False))
        for name, module in model.named_modules()
        if ".contractions." in name
    ):
        setattr(model, "use_reduced_cg", False)  # noqa: B010  (torch's stubs know tensors alone)


def _depend(contractions: Iterable[Mapping[str, torch.Tensor]]) -> bool:
    for buffers in contractions:
        for name, coupling in buffers.items():
            order = name.removeprefix("U_matrix_")
            if order == name or order == "1":
                continue
            matrix = symmetric(coupling, vector=coupling.ndim > int(order) + 1)
            if matrix.any() and torch.linalg.matrix_rank(matrix, rtol=1e-4) < matrix.shape[1]:
                return True
    return False


def same_basis(model: torch.nn.Module, tree: Made) -> bool:
    """Whether all paths of the file's contractions are those of `model`."""
    return all(_agrees(model.get_submodule(path), made) for path, made in contractions(tree))


def _agrees(module: torch.nn.Module, made: Made) -> bool:
    kept = made.tensors("_buffers")
    return all(
        name in kept and close(kept[name], own)
        for name, own in module.named_buffers(recurse=False)
        if name.startswith("U_matrix")
    )


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two constants differ by rounding alone."""
    if one.shape != other.shape:
        return False
    if not one.numel():
        return True
    size = other.abs().max().clamp_min(1e-30)
    return bool((one - other).abs().max() <= ROUNDING * size)


def changed_bases(
    model: torch.nn.Module, tree: Made
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Weights of contractions whose paths the installed mace-torch has otherwise, in its paths.

    Raises:
        Foreign: they can't be had as a combination of these paths.
    """
    for path, made in contractions(tree):
        module = model.get_submodule(path)
        if _agrees(module, made):
            continue
        own, found = dict(module.named_buffers(recurse=False)), {}
        highest = int(number(made.get("correlation")))
        for order in range(1, highest + 1):
            name = "weights_max" if order == highest else str(highest - 1 - order)
            holder = made if order == highest else part(made, "weights")
            weights = holder.tensors("_parameters")[name]
            there, here = tensor(made, f"U_matrix_{order}"), own[f"U_matrix_{order}"]
            vector = there.ndim > order + 1
            matrix = _transition(symmetric(there, vector), symmetric(here, vector), path)
            found[name] = torch.einsum("pq,eqc->epc", matrix.to(weights.dtype), weights.detach())
        yield path, found


def _transition(there: torch.Tensor, here: torch.Tensor, path: str) -> torch.Tensor:
    """(paths here, paths there): the weights here that couple as those there do."""
    matrix: torch.Tensor = torch.linalg.pinv(here, rtol=1e-6) @ there
    if not close(here @ matrix, there):
        raise Foreign(f"the weights of {path} are in a basis that mace-torch doesn't have")
    return matrix


@torch.no_grad()
def in_basis(model: torch.nn.Module, reduced: bool) -> torch.nn.Module:
    """A copy of `model` whose contractions are in mace-torch's reduced or full basis.

    Raises:
        FoundationModelError: a contraction isn't a combination of these paths, the model is in
            cuequivariance's format, or the reduced basis is asked for without cuequivariance.
    """
    changed = deepcopy(model)
    for block in changed.get_submodule("products").children():
        old: Any = block.get_submodule("symmetric_contractions")
        parts = getattr(old, "contractions", None)
        if parts is None:
            raise FoundationModelError("a model in cuequivariance's format has no such basis")
        first = next(iter(parts))
        with torch.random.fork_rng(devices=[]), default_dtype(first.weights_max.dtype):
            new = type(old)(
                irreps_in=old.irreps_in,
                irreps_out=old.irreps_out,
                correlation=first.correlation,
                num_elements=first.weights_max.shape[0],
                use_reduced_cg=reduced,
            ).to(first.weights_max.device)
        for i, (one, other) in enumerate(zip(parts, new.contractions, strict=True)):
            _fill(other, one, f"contraction {i} of {type(block).__name__}")
        block.symmetric_contractions = new
    setattr(changed, "use_reduced_cg", reduced)  # noqa: B010  (torch's stubs know tensors alone)
    if reduced:
        tell_basis(changed)
        if not getattr(changed, "use_reduced_cg"):  # noqa: B009
            raise FoundationModelError(
                "mace-torch has the reduced basis where cuequivariance is installed: "
                "pip install cuequivariance-torch"
            )
    return changed


def _fill(new: torch.nn.Module, old: torch.nn.Module, called: str) -> None:
    """Give a contraction the weights with which it is `old`."""
    for order, name in weights_of("", old):
        weight = name.removeprefix(".")
        before, now = (part.get_parameter(weight) for part in (old, new))
        couplings = (part.get_buffer(f"U_matrix_{order}") for part in (old, new))
        there, here = (values(coupling, order, _POINTS) for coupling in couplings)
        matrix = transition(there, here).to(before)
        found = torch.einsum("qp,epc->eqc", matrix, before)
        left = left_over(there, before.cpu(), here, found.cpu())
        if left > ROUNDING:
            raise FoundationModelError(
                f"{called}, order {order}, can't be had in the other basis: the best weights miss "
                f"{left:.1e} of its products"
            )
        now.copy_(found)
        now.requires_grad_(before.requires_grad)
