"""Small MACE models of every kind that mace-torch 0.3.16 offers, untrained, in float64."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from mace import modules

from e3nn import o3  # isort: skip

from mace_lora.upstream.precision import default_dtype

_COMMON: dict[str, Any] = {
    "r_max": 4.0,
    "num_bessel": 4,
    "num_polynomial_cutoff": 5,
    "max_ell": 2,
    "num_interactions": 2,
    "hidden_irreps": o3.Irreps("4x0e + 4x1o"),
    "MLP_irreps": o3.Irreps("4x0e"),
    "gate": torch.nn.functional.silu,
    "avg_num_neighbors": 6.0,
    "correlation": 2,
    "radial_MLP": [8, 8],
}
_HCO = {"num_elements": 3, "atomic_numbers": [1, 6, 8]}
_HCNO = {"num_elements": 4, "atomic_numbers": [1, 6, 7, 8]}


def _interactions(first: str, then: str | None = None) -> dict[str, Any]:
    classes = modules.interaction_classes
    return {
        "interaction_cls_first": classes[f"RealAgnostic{first}InteractionBlock"],
        "interaction_cls": classes[f"RealAgnostic{then or first}InteractionBlock"],
    }


def _energy(heads: int = 1, elements: int = 3) -> dict[str, Any]:
    return {
        "atomic_energies": np.linspace(-1.0, -3.0, heads * elements).reshape(heads, elements),
        "heads": [f"head{i}" for i in range(heads)] if heads > 1 else ["Default"],
        "atomic_inter_scale": [0.5] * heads,
        "atomic_inter_shift": [0.1] * heads,
        "radial_type": "bessel",
    }


def _categorical(classes: int, offset: int = 0) -> dict[str, Any]:
    embedded = {"type": "categorical", "per": "graph", "emb_dim": 4}
    return {**embedded, "num_classes": classes, "offset": offset}


_RESIDUAL = _interactions("Residual")
_BIASED = modules.readout_classes["NonLinearBiasReadoutBlock"]
# name -> (class, arguments)
ZOO: dict[str, tuple[type, dict[str, Any]]] = {
    "residual": (modules.ScaleShiftMACE, {**_HCO, **_RESIDUAL, **_energy()}),
    "plain_mace": (
        modules.MACE,
        {
            **_HCO,
            **_interactions("", "Residual"),
            "atomic_energies": np.array([[-1.0, -2.0, -3.0]]),
            "heads": ["Default"],
        },
    ),
    "first_then_residual": (
        modules.ScaleShiftMACE,
        {**_HCO, **_interactions("", "Residual"), **_energy()},
    ),
    "attention": (modules.ScaleShiftMACE, {**_HCO, **_interactions("AttResidual"), **_energy()}),
    "density_zbl_agnesi": (
        modules.ScaleShiftMACE,
        {
            **_HCO,
            **_interactions("Density", "DensityResidual"),
            **_energy(),
            "pair_repulsion": True,
            "distance_transform": "Agnesi",
        },
    ),
    "nonlinear": (
        modules.ScaleShiftMACE,
        {**_HCO, **_interactions("ResidualNonLinear"), **_energy(), "readout_cls": _BIASED},
    ),
    "two_heads_biased_readout": (
        modules.ScaleShiftMACE,
        {**_HCO, **_RESIDUAL, **_energy(heads=2), "readout_cls": _BIASED},
    ),
    "high_order": (
        modules.ScaleShiftMACE,
        {
            **_HCO,
            **_RESIDUAL,
            **_energy(),
            "hidden_irreps": o3.Irreps("4x0e + 4x1o + 4x2e"),
            "correlation": 3,
        },
    ),
    "dipoles": (
        modules.AtomicDipolesMACE,
        {**_HCO, **_interactions("", "Residual"), "atomic_energies": None},
    ),
    "dielectric": (
        modules.AtomicDielectricMACE,
        {
            **_HCO,
            **_interactions("", "Residual"),
            "atomic_energies": None,
            "hidden_irreps": o3.Irreps("4x0e + 4x1o + 4x2e"),
            "MLP_irreps": o3.Irreps("4x0e + 4x1o + 4x2e"),
        },
    ),
    "energy_dipoles": (
        modules.EnergyDipolesMACE,
        {
            **_HCO,
            **_interactions("", "Residual"),
            "atomic_energies": np.array([[-1.0, -2.0, -3.0]]),
        },
    ),
    "polar": (
        modules.PolarMACE,
        {
            **_HCO,
            **_RESIDUAL,
            **_energy(),
            "atomic_multipoles_max_l": 1,
            "field_feature_max_l": 1,
            "readout_cls": modules.NonLinearReadoutBlock,
        },
    ),
    "charge_spin": (  # as OMol's
        modules.ScaleShiftMACE,
        {
            **_HCO,
            **_RESIDUAL,
            **_energy(),
            "embedding_specs": {
                "total_charge": _categorical(5, offset=2),
                "total_spin": _categorical(5),
            },
        },
    ),
    "wide": (
        modules.ScaleShiftMACE,
        {**_HCNO, **_RESIDUAL, **_energy(elements=4), "max_ell": 3, "correlation": 3},
    ),
    "charge_and_spin": (
        modules.ScaleShiftMACE,
        {
            **_HCO,
            **_RESIDUAL,
            **_energy(),
            "use_embedding_readout": True,
            "embedding_specs": {
                "total_charge": {
                    **{"type": "categorical", "per": "graph", "emb_dim": 4},
                    **{"num_classes": 9, "offset": 4},
                },
                "total_spin": {"type": "continuous", "per": "graph", "emb_dim": 3, "in_dim": 1},
            },
        },
    ),
    "foundation": (
        modules.ScaleShiftMACE,
        {
            **_HCNO,
            **_RESIDUAL,
            **_energy(elements=4),
            "atomic_energies": np.array([[-13.6, -1027.0, -1485.0, -2041.0]]),
        },
    ),
}


def build(name: str) -> torch.nn.Module:
    """The model called `name`, the same numbers every time."""
    kind, arguments = ZOO[name]
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        return kind(**{**_COMMON, **arguments})


def available() -> list[str]:
    """All names; PolarMACE only where its long-range package is installed."""
    return [name for name in ZOO if name != "polar" or importlib.util.find_spec("graph_longrange")]
