"""What a preset sets beside the options of its method, so that it is a whole recipe.

The values are flags of mace-torch's and of ours; one that the user gives wins. They were chosen on
paracetamol and toluene of rMD17 by `scripts/reproduce.sh transfer`, see README.md of this folder.
"""

from __future__ import annotations

from collections.abc import Mapping

# Energies and forces count alike, as in arXiv 2606.12704
_COMMON: Mapping[str, object] = {
    "energy_weight": 10.0,
    "forces_weight": 10.0,
    "ema": True,
    "ema_decay": 0.999,
    "clip_grad": 1.0,
    "optimizer": "adamw",
}

# method -> preset -> flags
RECIPES: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "full": {"balanced": {**_COMMON, "lr": 0.005, "weight_decay": 1.0, "schedule": "cosine"}},
    "lora": {
        "small-data": {**_COMMON, "lr": 0.005},
        "balanced": {**_COMMON, "lr": 0.005},
        "max-accuracy": {**_COMMON, "lr": 0.005},
    },
}

# All flags that some preset sets
FLAGS = sorted({flag for presets in RECIPES.values() for p in presets.values() for flag in p})


def of(method: str, preset: str | None) -> Mapping[str, object]:
    """The flags of a preset; none where no preset is asked for."""
    return RECIPES[method][preset] if preset is not None else {}
