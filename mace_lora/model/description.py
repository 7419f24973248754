"""What a fine-tuning changes in a model besides weights: elements, heads, E0s, scale, shift."""

from __future__ import annotations

from typing import Any

import torch


def describe(model: torch.nn.Module) -> dict[str, Any]:
    """What fine-tuning changes besides weights, as plain JSON: elements, heads, E0s, scale, shift.

    E0s in eV, one row per head and one column per element; floats survive JSON exactly.
    """
    energies = getattr(model, "atomic_energies_fn", None)
    scale_shift = getattr(model, "scale_shift", None)
    return {
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "r_max": float(model.r_max),
        "atomic_numbers": [int(z) for z in model.atomic_numbers],
        "heads": list(getattr(model, "heads", None) or ["Default"]),
        "atomic_energies": None if energies is None else _rows(energies.atomic_energies),
        "scale": None if scale_shift is None else _row(scale_shift.scale),
        "shift": None if scale_shift is None else _row(scale_shift.shift),
    }


def _row(values: torch.Tensor) -> list[float]:
    return [float(v) for v in values.detach().cpu().reshape(-1)]


def _rows(values: torch.Tensor) -> list[list[float]]:
    return [_row(row) for row in torch.atleast_2d(values)]


@torch.no_grad()
def restore_constants(model: torch.nn.Module, description: dict[str, Any]) -> None:
    """Set E0s, scale and shift of `model` to those of `description`."""
    if description["atomic_energies"] is not None:
        energies = model.atomic_energies_fn.atomic_energies
        new = torch.tensor(description["atomic_energies"], dtype=energies.dtype)
        energies.copy_(new.reshape(energies.shape))
    if description["scale"] is not None:
        for name in ("scale", "shift"):
            buffer = getattr(model.scale_shift, name)
            new = torch.tensor(description[name], dtype=buffer.dtype, device=buffer.device)
            setattr(model.scale_shift, name, new.reshape(buffer.shape))
