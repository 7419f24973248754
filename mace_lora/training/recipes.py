"""What a preset sets beside the options of its method, so that it is a whole recipe.

The values are flags of mace-torch's and of ours; one that the user gives wins. They were chosen on
paracetamol of rMD17, see README.md of this folder.
"""

from __future__ import annotations

from collections.abc import Mapping

# Energies and forces count alike, as in arXiv 2606.12704. Adapters start as no change, so that
# weight decay pulls a model back to its start
_RECIPE: Mapping[str, object] = {
    "lr": 0.005,
    "schedule": "cosine",
    "optimizer": "adamw",
    "weight_decay": 0.2,
    "clip_grad": 1.0,
    "ema": True,
    "ema_decay": 0.999,
    "energy_weight": 10.0,
    "forces_weight": 10.0,
    "protect": True,
}

# method -> preset -> flags
RECIPES: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "full": {"balanced": _RECIPE},
    "lora": dict.fromkeys(("small-data", "balanced", "max-accuracy"), _RECIPE),
}

# All flags that some preset sets
FLAGS = sorted({flag for presets in RECIPES.values() for p in presets.values() for flag in p})


def of(method: str, preset: str | None) -> Mapping[str, object]:
    """The flags of a preset; none where no preset is asked for."""
    return RECIPES[method][preset] if preset is not None else {}
