"""What is optimised and averaged: the adapters' parameters, all of them and nothing else."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable

import torch

from mace_lora.model.injection import adapters
from mace_lora.upstream import names as upstream
from mace_lora.upstream.types import Average

# mace-torch's learning-rate factors by part of the model
_FACTORS = {
    "node_embedding": "embedding_lr_factor",
    "interactions": "interactions_lr_factor",
    "products": "products_lr_factor",
    "readouts": "readouts_lr_factor",
}


def count(module: torch.nn.Module) -> int:
    """Number of trained parameters; mace-torch's count includes the frozen ones."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def parameter_groups(args: argparse.Namespace, model: torch.nn.Module) -> dict[str, object]:
    """Arguments of the optimiser.

    mace-torch sorts parameters by the names of layers, and so misses some of the adapters'. Here
    each part of the model has a group, with mace-torch's learning-rate factor for it, every trained
    parameter is in one of them, and all have the weight decay that was asked for.
    """
    factors: dict[str, float] = json.loads(args.lr_params_factors)
    own = {
        id(adapter.get_parameter(name)): factor
        for _, adapter in adapters(model)
        for name, factor in adapter.lr_factors().items()
    }
    groups: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.partition(".")[0], own.get(id(parameter), 1.0)
            groups.setdefault(key, []).append(parameter)
    logging.info(
        f"Weight decay {args.weight_decay} applies to all adapter parameters and to no frozen one"
    )
    return {
        "params": [
            {
                "name": part if factor == 1 else f"{part} x {factor:g}",
                "params": parameters,
                "weight_decay": args.weight_decay,
                "lr": factor * factors.get(_FACTORS.get(part, ""), 1.0) * args.lr,
            }
            for (part, factor), parameters in groups.items()
        ],
        "lr": args.lr,
        "amsgrad": args.amsgrad,
        "betas": (args.beta, 0.999),
    }


def lbfgs(
    params: Iterable[torch.nn.Parameter], *, history_size: int, max_iter: int, line_search_fn: str
) -> torch.optim.LBFGS:
    """mace-torch hands LBFGS the frozen parameters too, and moves them."""
    return torch.optim.LBFGS(
        [p for p in params if p.requires_grad],
        history_size=history_size,
        max_iter=max_iter,
        line_search_fn=line_search_fn,
    )


def average(parameters: Iterable[torch.nn.Parameter], decay: float) -> Average:
    """mace-torch averages frozen parameters too, which costs time and memory for nothing."""
    made: Average = upstream.original("ema")(
        [p for p in parameters if p.requires_grad], decay=decay
    )
    return made
