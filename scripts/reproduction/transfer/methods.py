"""The methods that are compared, as data. Each is run at the same learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from mace_lora.errors import ConfigError, did_you_mean
from mace_lora.training.recipes import RECIPES
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


def _recipe(method: str, name: str) -> dict[str, object]:
    """A preset's flags but for the rate, which the comparison varies."""
    flags = {"adapter": method, **preset(method, name), **RECIPES[method][name]}
    return {k: v for k, v in flags.items() if k != "lr"}


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
                "lora_rank16",
                "lora, all layers, rank 16, alpha 8",
                {"adapter": "lora", **preset("lora", "max-accuracy"), **OURS},
            )
        ),
        *(
            Candidate(
                Method(f"{method}_{name}", f"{method}, preset {name}", _recipe(method, name)),
            )
            for method, presets in RECIPES.items()
            for name in presets
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
