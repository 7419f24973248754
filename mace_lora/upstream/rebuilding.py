"""A foundation model made into what a run starts from: other elements, E0s, one head."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from mace_lora.errors import FoundationModelError
from mace_lora.model.description import (
    Description,
    atomic_numbers,
    check_head,
    heads,
    restore_constants,
)
from mace_lora.upstream import library
from mace_lora.upstream import names as upstream
from mace_lora.upstream.precision import default_dtype


def check_rebuildable(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Raises FoundationModelError where mace-torch can't start this fine-tuning from `model`."""
    called, kind = f"--foundation_model={args.foundation_model}", type(model).__name__
    if "error" in library.architecture(model):
        raise FoundationModelError(
            f"{called}: a {kind}, from which mace-torch can't start a fine-tuning: it takes "
            "ScaleShiftMACE, MACELES and PolarMACE"
        )
    if kind in ("MACELES", "PolarMACE") and args.model != kind:
        raise FoundationModelError(f"{called}: a {kind}; give --model={kind} too")
    if len(heads(model)) > 1:  # of one head mace-torch doesn't ask the name
        check_head(model, args.foundation_head, "--foundation_head")


def architecture(model: torch.nn.Module) -> dict[str, str]:
    """What a person wants to know of the architecture; empty where mace-torch doesn't tell it."""
    config = library.architecture(model)
    found: dict[str, str] = {}
    for key in ("interaction_cls_first", "interaction_cls"):
        if key in config:
            found[key] = config[key].__name__
    for key in ("num_interactions", "hidden_irreps", "MLP_irreps", "max_ell", "correlation"):
        if key in config:
            found[key] = str(config[key])
    return found


def specialise(foundation: torch.nn.Module, description: Description) -> torch.nn.Module:
    """The model that a fine-tuning run starts from: `foundation` with the run's elements and E0s.

    Args:
        foundation: a one-head foundation model (see `one_head`); it is not changed.
        description: as `describe` gave it for the model of the run.

    Raises:
        FoundationModelError: the run has elements that the foundation model lacks.
    """
    numbers = [int(z) for z in description["atomic_numbers"]]
    known = set(atomic_numbers(foundation))
    if not set(numbers) <= known:
        raise FoundationModelError(
            f"the adapter is for elements {numbers}; this base model knows {sorted(known)}"
        )
    config = library.architecture(foundation)
    if "error" in config:
        raise FoundationModelError(f"a {type(foundation).__name__} can't be rebuilt: {config}")
    names = list(description["heads"])
    config |= {
        "atomic_energies": np.array(description["atomic_energies"]),
        "atomic_numbers": numbers,
        "num_elements": len(numbers),
        "heads": names,
        "atomic_inter_scale": [1.0] * len(names),
        "atomic_inter_shift": [0.0] * len(names),
    }
    dtype = getattr(torch, description["dtype"])
    with default_dtype(dtype):
        model = type(foundation)(**config)
        upstream.original("transfer_weights")(
            model,
            foundation,
            library.elements(numbers),
            load_readout=True,
            max_L=config["hidden_irreps"].lmax,
            default_dtype=dtype,
        )
    restore_constants(model, description)
    return model.to(next(foundation.parameters()).device)


def one_head(model: torch.nn.Module, head: str | None = None) -> torch.nn.Module:
    """The model with only `head` of its heads, as mace-torch takes it for fine-tuning.

    Raises:
        FoundationModelError: it has several, and none of this name.
    """
    if len(heads(model)) == 1:
        return model
    check_head(model, head, "head")
    dtype = next(model.parameters()).dtype
    with default_dtype(dtype):
        one: torch.nn.Module = upstream.original("one_head")(model, head)
        return one
