"""Foundation models in, adapters of a model to a directory and back."""

from __future__ import annotations

from pathlib import Path

import torch

from mace_lora.errors import ArtefactError, ConfigError
from mace_lora.model import artefact
from mace_lora.model.description import restore_constants
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.identity import identity, is_same
from mace_lora.model.injection import adapter_parameters, config_of, disable_adapter, inject
from mace_lora.upstream import bases, loading, rebuilding


def load_foundation(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust: bool = False,
) -> torch.nn.Module:
    """A foundation model, to `inject` adapters into.

    Args:
        name: `mini`, a name that mace-torch downloads (`medium_off`, ...), or a `.model` file,
            of any year and installation. A file is read and the model rebuilt with the installed
            mace-torch: nothing in the file is run.
        device: where to put it.
        dtype: torch.float32 or torch.float64; None keeps the file's (for `mini`, torch's default).
        trust: run the file, which can be any program, instead of reading it: for one that can't be
            read, made by somebody you know.

    Raises:
        FoundationModelError: no such file or name, or the file holds no MACE model.
    """
    return loading.load(name, device, dtype, flag="", trust=trust)


def change_basis(model: torch.nn.Module, reduced: bool) -> torch.nn.Module:
    """The same model with its contractions in the other basis of mace-torch.

    mace-torch has a full and a reduced basis (`--use_reduced_cg`). Both span the same products
    where the irreps have natural parity (0e, 1o, 2e, ...). Adapters fit either model.

    Args:
        model: without adapters; it is not changed.
        reduced: into the reduced basis, which needs cuequivariance; else into the full one.

    Raises:
        ConfigError: the model carries adapters, or is no model.
        FoundationModelError: it doesn't exist in that basis; the message says by how much.
    """
    if config_of(model) is not None:
        raise ConfigError("the model carries adapters: merge them before its basis is changed")
    return bases.in_basis(model, reduced)


def save_adapter(model: torch.nn.Module, folder: str | Path) -> None:
    """Write the adapters of `model` to a directory, without its own weights.

    Args:
        model: carries adapters.
        folder: written whole or not at all; an older adapter there is replaced.

    Raises:
        ConfigError: the model carries no adapters.
        ArtefactError: something that is no adapter has that name; it is left as it is.
    """
    config = config_of(model)
    if config is None:
        raise ConfigError("the model carries no adapters: inject some before saving them")
    with disable_adapter(model):  # E0s, scale and shift may be adapted
        description = identity(model)
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
    content = artefact.read(folder)
    # in the precision of the run before anything is computed, as the run itself did
    dtype = getattr(torch, content.model["dtype"])
    given = loading.given(base, dtype=dtype, copy=True)
    model = _start_of_the_run(rebuilding.one_head(given, content.base.get("head")), content, folder)
    inject(model, content.config)
    artefact.load_factors(model, content.tensors, content.model)
    return model


def _start_of_the_run(
    model: torch.nn.Module, content: artefact.Artefact, folder: str | Path
) -> torch.nn.Module:
    """The model that the adapters were attached to; `model` is it already, or its foundation.

    Raises:
        ArtefactError: it is neither.
    """
    if is_same(model, content.model):
        restore_constants(model, content.model)
        return model
    if not is_same(model, content.base):
        found = fingerprint(model)
        raise ArtefactError(
            f"{folder} belongs to another base model: it was trained from "
            f"{content.base.get('name')!r} ({content.base.get('class')}, fingerprint "
            f"{content.base['fingerprint'][:12]}), this one has fingerprint {found[:12]}"
        )
    start = rebuilding.specialise(model, content.model)
    if not is_same(start, content.model):
        found, wanted = fingerprint(start), content.model["fingerprint"]
        raise ArtefactError(
            f"{folder} was trained from this base model, but the installed mace-torch makes "
            f"another starting point of it (fingerprint {found[:12]}, expected {wanted[:12]}); it "
            f"was written by {content.versions}"
        )
    return start
