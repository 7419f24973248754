"""What a fine-tuning changes in a model besides weights: elements, heads, E0s, scale, shift."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from mace_lora.errors import FoundationModelError, did_you_mean

# What `describe` gives; with `fingerprint` added to it, and for a base model its `name` and `head`,
# it is what adapter files and checkpoints keep of a model
Description: TypeAlias = dict[str, Any]


def describe(model: torch.nn.Module) -> Description:
    """What fine-tuning changes besides weights, as plain JSON: elements, heads, E0s, scale, shift.

    E0s in eV, one row per head and one column per element; floats survive JSON exactly.
    """
    energies = _constant(model, "atomic_energies_fn", "atomic_energies")
    scale, shift = (_constant(model, "scale_shift", name) for name in ("scale", "shift"))
    return {
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "r_max": float(model.get_buffer("r_max")),
        "atomic_numbers": atomic_numbers(model),
        "heads": heads(model),
        "atomic_energies": None
        if energies is None
        else energies.reshape(-1, energies.shape[-1]).tolist(),
        "scale": None if scale is None else scale.reshape(-1).tolist(),
        "shift": None if shift is None else shift.reshape(-1).tolist(),
    }


def atomic_numbers(model: torch.nn.Module) -> list[int]:
    """The elements that a model knows, in its order."""
    return [int(z) for z in model.get_buffer("atomic_numbers")]


def heads(model: torch.nn.Module) -> list[str]:
    """The names of a model's heads; models from before there were heads have one, `Default`."""
    return list(getattr(model, "heads", None) or ["Default"])


def e0s(model: torch.nn.Module, head: str | None = None) -> dict[int, float]:
    """E0s (eV) of a head, the last one if None, by atomic number; none where a model has none."""
    found = _constant(model, "atomic_energies_fn", "atomic_energies")
    if found is None:
        return {}
    numbers = atomic_numbers(model)
    rows = found.detach().reshape(-1, len(numbers)).tolist()
    row = rows[min(heads(model).index(head), len(rows) - 1)] if head else rows[-1]
    return dict(zip(numbers, row, strict=True))


def check_head(model: torch.nn.Module, head: str | None, called: str) -> None:
    """Raises FoundationModelError where `model` has no such head; None stands for the last one.

    Args:
        called: what messages call the argument, such as `--head`.
    """
    known = heads(model)
    if head is not None and head not in known:
        raise FoundationModelError(
            f"{called}={head}: the model has no such head; {did_you_mean(str(head), known)}"
        )


def _constant(model: torch.nn.Module, layer: str, name: str) -> torch.Tensor | None:
    """E0s, scale or shift: in effect, where they carry an adapter; None where there are none."""
    found: torch.Tensor | None = getattr(getattr(model, layer, None), name, None)
    return found


@torch.no_grad()
def restore_constants(model: torch.nn.Module, description: Description) -> None:
    """Set E0s, scale and shift of `model` to those of `description`."""
    for layer, name, key in (
        ("atomic_energies_fn", "atomic_energies", "atomic_energies"),
        ("scale_shift", "scale", "scale"),
        ("scale_shift", "shift", "shift"),
    ):
        old = _constant(model, layer, name)
        if description[key] is not None and old is not None:
            new = torch.tensor(description[key], dtype=old.dtype, device=old.device)
            setattr(model.get_submodule(layer), name, new.reshape(old.shape))
