"""The Python interface beyond `inject` and `merge`: mace-torch's own names, adapters in files."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from mace_lora.config import AdapterConfig
from mace_lora.errors import ArtefactError, ConfigError
from mace_lora.model import artefact
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.injection import adapter_parameters, adapters, disable_adapter, inject
from mace_lora.model.merging import merge
from mace_lora.model.report import InjectionReport
from mace_lora.upstream import rebuilding


def inject_lora(
    model: torch.nn.Module,
    rank: int = 4,
    alpha: float = 1.0,
    wrap_equivariant: bool = True,
    wrap_dense: bool = True,
    cueq_config: Any = None,
) -> InjectionReport:
    """Attach LoRA adapters in place, with mace-torch's signature.

    Args:
        model: a MACE model.
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
    from mace_lora.model.layers import find_sites

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


def load_foundation(
    name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """A foundation model, to `inject` adapters into.

    Args:
        name: `mini`, a name that mace-torch downloads (`medium_off`, ...), or a `.model` file. A
            file is a pickle, which can run code: open only those you trust.
        device: where to put it.
        dtype: torch.float32 or torch.float64; None keeps the file's (for `mini`, torch's default).

    Raises:
        FoundationModelError: no such file or name, or the file holds no MACE model.
    """
    from mace_lora.upstream import loading

    return loading.load(name, device, dtype, flag="")


def save_adapter(model: torch.nn.Module, folder: str | Path) -> None:
    """Write the adapters of `model` to a directory, without its own weights.

    Args:
        model: carries adapters.
        folder: written whole or not at all; an older adapter there is replaced.

    Raises:
        ConfigError: the model carries no adapters.
        ArtefactError: something that is no adapter has that name; it is left as it is.
    """
    from mace_lora.model.description import describe

    config = next((adapter.config for _, adapter in adapters(model)), None)
    if config is None:
        raise ConfigError("the model carries no adapters: inject some before saving them")
    with disable_adapter(model):  # E0s, scale and shift may be adapted
        description = {**describe(model), "fingerprint": fingerprint(model)}
    base = {"name": None, "head": None, **description}
    artefact.write(folder, config, adapter_parameters(model), base, description)


def load_adapter(base: torch.nn.Module | str | Path, folder: str | Path) -> torch.nn.Module:
    """Base model and adapter directory to an adapted model; `merge` makes it a plain one.

    Args:
        base: the foundation model that the adapter was trained from (as a model, which is not
            changed, or by name or file as in `load_foundation`), or the model that the training
            run started from.
        folder: written by `save_adapter` or by a training run.

    Returns:
        A new model with the run's elements, E0s, scale and shift, and its adapters attached.

    Raises:
        ArtefactError: the directory is broken, or belongs to another base model.
        FoundationModelError: there is no such base model.
    """
    from mace_lora.model.description import restore_constants
    from mace_lora.upstream import loading

    content = artefact.read(folder)
    # in the precision of the run before anything is computed, as the run itself did
    dtype = getattr(torch, content.model["dtype"])
    model = loading.given(base, dtype=dtype, copy=True)
    model = rebuilding.one_head(model, content.base.get("head"))
    found = fingerprint(model)
    if found == content.model.get("fingerprint"):
        restore_constants(model, content.model)
    elif found == content.base.get("fingerprint"):
        model = rebuilding.specialise(model, content.model)
        found = fingerprint(model)
        if found != content.model.get("fingerprint"):
            raise ArtefactError(
                f"{folder} was trained from this base model, but the installed mace-torch makes "
                f"another starting point of it (fingerprint {found[:12]}, expected "
                f"{str(content.model.get('fingerprint'))[:12]}); it was written by "
                f"{content.versions}"
            )
    else:
        raise ArtefactError(
            f"{folder} belongs to another base model: it was trained from "
            f"{content.base.get('name')!r} ({content.base.get('class')}, fingerprint "
            f"{str(content.base.get('fingerprint'))[:12]}), this one has fingerprint {found[:12]}"
        )
    inject(model, content.config)
    artefact.load_factors(model, content.tensors)
    return model
