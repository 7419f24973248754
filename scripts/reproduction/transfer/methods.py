"""The methods that are compared, as data. Each is run at the same learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from mace_lora.adapters.options import LoraOptions
from mace_lora.errors import ConfigError, did_you_mean
from mace_lora.training import recipes
from reproduction.protocol import Method, preset

RATES = (0.001, 0.005, 0.01)  # the published ones of full fine-tuning and LoRA, and ours
# Of the study on strategies (arXiv 2606.12704); weights and schedule stand in configs/transfer.yaml
FULL = {"ema_decay": 0.999, "clip_grad": 1.0}
LORA = {"ema_decay": 0.99, "clip_grad": 10.0}
OURS = {"ema_decay": 0.999, "clip_grad": 10.0}


@dataclass(frozen=True)
class Candidate:
    """A method, and whether the others are measured against it."""

    method: Method
    baseline: bool = False


def _upstream_lora(rank: int, alpha: float) -> Method:
    return Method(
        f"upstream_rank{rank}",
        f"mace-torch's --lora, rank {rank}, alpha {alpha:g}",
        {"lora": True, "lora_rank": rank, "lora_alpha": alpha, **LORA},
        upstream=True,
    )


# What suits a fine-tuning, but for the rate, which the comparison varies, and for the weights,
# which all methods share
_OF_THE_COMPARISON = ("lr", "energy_weight", "forces_weight")
RECIPE = {f: c.value for f, c in recipes.RECIPE.items() if f not in _OF_THE_COMPARISON}


CANDIDATES = {
    candidate.method.name: candidate
    for candidate in (
        Candidate(Method("full", "full fine-tuning", FULL, upstream=True), baseline=True),
        Candidate(_upstream_lora(4, 1.0), baseline=True),
        Candidate(_upstream_lora(16, 16.0), baseline=True),
        Candidate(
            Method("full_fast", "the same by --adapter=full", {"adapter": "full", **FULL}),
            baseline=True,
        ),
        Candidate(
            Method(
                "lora_fast",
                "mace-torch's --lora, rank 16, alpha 16, by --adapter=lora",
                {"adapter": "lora", "lora_rank": 16, "lora_alpha": 16.0, **LORA},
            ),
            baseline=True,
        ),
        Candidate(
            Method(
                "lora_rank16",
                "lora, all layers, rank 16, alpha 8",
                {"adapter": "lora", **preset("lora", "max-accuracy"), **OURS},
            )
        ),
        Candidate(Method("full_ours", "--adapter=full", {"adapter": "full", **RECIPE})),
        *(
            Candidate(
                Method(
                    f"lora_{name}",
                    f"lora, preset {name}",
                    {"adapter": "lora", **preset("lora", name), **RECIPE},
                )
            )
            for name in LoraOptions.presets
        ),
    )
}


def select(names: str) -> list[Candidate]:
    """Candidates by comma-separated names, or "all".

    Raises:
        ConfigError: no such method.
    """
    chosen = list(CANDIDATES) if names == "all" else names.split(",")
    for name in chosen:
        if name not in CANDIDATES:
            raise ConfigError(f"--methods={name}: {did_you_mean(name, ['all', *CANDIDATES])}")
    return [CANDIDATES[name] for name in chosen]
