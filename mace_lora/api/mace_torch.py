"""LoRA under the names and with the signatures of mace-torch."""

from __future__ import annotations

from copy import deepcopy

import torch

from mace_lora.config import AdapterConfig
from mace_lora.errors import ConfigError
from mace_lora.model.injection import inject
from mace_lora.model.layers import find_sites
from mace_lora.model.merging import merge
from mace_lora.model.report import InjectionReport


def inject_lora(
    model: torch.nn.Module,
    rank: int = 4,
    alpha: float = 1.0,
    wrap_equivariant: bool = True,
    wrap_dense: bool = True,
    cueq_config: object = None,
) -> InjectionReport:
    """Attach LoRA adapters in place, with mace-torch's signature.

    Args:
        rank: rank of the updates, capped per irrep at what a layer can use.
        alpha: the update is scaled by alpha / rank.
        wrap_equivariant: adapt the equivariant linear layers.
        wrap_dense: adapt torch.nn.Linear and the radial networks.
        cueq_config: accepted for compatibility; adapters change weights, whatever the kernels.

    Raises:
        ConfigError, NoLayerMatched: see `inject`.
    """
    del cueq_config
    kinds = (["linear"] if wrap_equivariant else []) + (["dense", "radial"] if wrap_dense else [])
    if not kinds:
        raise ConfigError("wrap_equivariant=False and wrap_dense=False leave no layer to adapt")
    present = {site.layout.kind for site in find_sites(model)[0]}
    targets = tuple(k for k in kinds if k in present) or tuple(kinds)
    return inject(model, AdapterConfig.create("lora", rank=rank, alpha=alpha, targets=targets))


def merge_lora_weights(model: torch.nn.Module, inplace: bool = True) -> torch.nn.Module:
    """Fold the adapters into the model's weights, with mace-torch's signature.

    Args:
        model: carries adapters.
        inplace: False leaves `model` as it is and merges a copy.

    Returns:
        The plain model.

    Raises:
        NotMergeable: see `merge`.
    """
    return merge(model if inplace else deepcopy(model))
