"""mace-torch's conversions to cuequivariance and back, with the weights of contractions kept.

Linear layers hold the same numbers on both sides. Symmetric contractions don't, and the way back
goes through a pseudo-inverse; see `contractions`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from mace_lora.errors import ConfigError, UnsupportedUpstream
from mace_lora.model.contractions import project
from mace_lora.upstream import names as upstream
from mace_lora.upstream.precision import exact_coefficients
from mace_lora.upstream.types import Tensors

_Transfer = Callable[[Tensors, Tensors], None]
# Largest relative difference between mace-torch's converted weights and ours
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def convert(model: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """A model like `model` in cuequivariance's layout, whose contractions have e3nn's parameters.

    Raises:
        ConfigError: mace-torch can't convert this model.
        UnsupportedUpstream: it converts contractions in a way that is not known.
    """
    exact_coefficients()
    matrices: Tensors = {}
    original = upstream.original("transfer_contractions")

    def transfer(source: Tensors, target: Tensors, *settings: object) -> None:
        original(source, target, *settings)
        matrices.update(_matrices(model, source, lambda s, t: original(s, t, *settings)))

    try:
        with upstream.substituted({"transfer_contractions": transfer}):
            converted: torch.nn.Module = upstream.original("to_cueq")(model, device=device)
    except NotImplementedError as error:  # correlation 1, or above 3
        raise ConfigError(
            f"--enable_cueq=True: mace-torch can't convert this model: {error}; leave the flag out"
        ) from error
    _same_parameters(converted, model)
    for name, contractions in _products(model).items():
        product = converted.get_submodule(name)
        before = cast(torch.Tensor, product.weight).detach()
        project(product, list(contractions), matrices[name])
        difference = (cast(torch.Tensor, product.weight) - before).abs().max()
        if not difference <= _TOLERANCE[before.dtype] * before.abs().max():
            raise UnsupportedUpstream(
                f"--enable_cueq=True: mace-torch {upstream.version()} converts the weights of "
                f"{name} in a way that is not known here; leave the flag out"
            )
    return converted


@torch.no_grad()
def convert_back(model: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """A merged model of `convert` in e3nn's layout, with the very weights of its contractions."""
    exact_coefficients()
    plain: torch.nn.Module = upstream.original("from_cueq")(model, device=device)
    _same_parameters(plain, model)
    own = dict(model.named_parameters())
    for name in _products(plain):
        for key, parameter in plain.get_submodule(name).named_parameters():
            parameter.copy_(own[f"{name}.{key}"])
    return plain


def _same_parameters(converted: torch.nn.Module, model: torch.nn.Module) -> None:
    """Let parameters be parameters on both sides.

    Bessel frequencies, which mace-torch makes parameters where it loads a foundation model, come
    out of its conversions as buffers.
    """
    for name, _ in model.named_parameters():
        path, _, tensor = name.rpartition(".")
        try:
            holder = converted.get_submodule(path)
        except AttributeError:
            continue  # weights of contractions
        if tensor in holder._buffers:
            value = holder.get_buffer(tensor)
            delattr(holder, tensor)
            holder.register_parameter(tensor, torch.nn.Parameter(value))


def _products(model: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """The contractions of each symmetric contraction of a model in e3nn's layout, by its name."""
    names = [f"products.{i}.symmetric_contractions" for i in range(len(_list(model, "products")))]
    return {name: _list(model, f"{name}.contractions") for name in names}


def _list(model: torch.nn.Module, name: str) -> torch.nn.ModuleList:
    return cast(torch.nn.ModuleList, model.get_submodule(name))


def _matrices(model: torch.nn.Module, source: Tensors, transfer: _Transfer) -> Tensors:
    """What mace-torch does to the paths: (new paths, old paths) by product.

    It is linear in them, and the same for each element and channel: it is done to unit vectors.
    """
    units, paths = dict(source), {}
    for product, contractions in _products(model).items():
        names = [
            f"{product}.contractions.{k}.{key}"
            for k, part in enumerate(contractions)
            for key in ("weights_max", *(f"weights.{j}" for j in range(_count(part))))
        ]
        sizes = [source[name].shape[1] for name in names]
        unit = torch.split(torch.eye(sum(sizes), dtype=torch.float64), sizes)
        units |= {name: rows.unsqueeze(0) for name, rows in zip(names, unit, strict=True)}
        paths[product] = f"{product}.weight"
    found: Tensors = {}
    transfer(units, found)
    return {product: found[key].squeeze(0) for product, key in paths.items()}


def _count(contraction: torch.nn.Module) -> int:
    return len(cast(torch.nn.ParameterList, contraction.get_submodule("weights")))
