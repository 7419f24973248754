"""MACE models in and out: foundation models, what a fine-tuning changes in them, predictions."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch

from mace_lora import artefact
from mace_lora.errors import FoundationModelError, did_you_mean
from mace_lora.host import mini, upstream
from mace_lora.host.precision import default_dtype

MINI = "mini"
_PARTS = ("r_max", "atomic_numbers", "node_embedding", "interactions", "products", "readouts")
# Outputs that are compared when a merge is proved; a model gives some of them
OUTPUTS = ("energy", "forces", "stress", "dipole", "polarizability")


def upstream_names() -> list[str]:
    """Names of foundation models that mace-torch downloads by itself."""
    run_train = upstream.module("mace.cli.run_train")
    named = [*run_train.mace_mp_names, *run_train.polar_model_names]
    return sorted({n for n in named if n} | {"small_off", "medium_off", "large_off", "mace_omol"})


def is_ours(name: str) -> bool:
    """Whether `load` loads this model, rather than mace-torch: `mini` and files."""
    return name not in upstream_names()


def given(
    base: torch.nn.Module | str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    flag: str = "",
    copy: bool = False,
) -> torch.nn.Module:
    """A model that a caller names, or gives as it is; the arguments are those of `load`.

    Returns:
        The model itself where it fits already and no `copy` is asked for, or a new one.

    Raises:
        FoundationModelError: neither a model, nor a name or path of one.
    """
    if not isinstance(base, torch.nn.Module):
        return load(base, device or "cpu", dtype, flag)
    own = next(base.parameters())
    fits = (dtype in (None, own.dtype)) and (device is None or torch.device(device) == own.device)
    return base if fits and not copy else deepcopy(base).to(device=device, dtype=dtype)


def load(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    flag: str = "foundation_model",
) -> torch.nn.Module:
    """A foundation model: `mini`, one that mace-torch knows by name, or a `.model` file.

    Args:
        name: a name or path. A file is a pickle, which can run code: open only those you trust.
        device: where to put it.
        dtype: cast to this precision; None keeps the file's.
        flag: what messages call it; empty for its name alone.

    Raises:
        FoundationModelError: no such file or name, or the file holds no MACE model.
    """
    if not isinstance(name, (str, Path)):
        raise FoundationModelError(
            f"a foundation model is named by a text or a path (mini, medium_off, a .model file), "
            f"found {type(name).__name__}"
        )
    if dtype not in (None, torch.float32, torch.float64):
        raise FoundationModelError(f"dtype={dtype!r}: torch.float32 or torch.float64 is needed")
    name = str(name)
    if name == MINI:
        model = mini.build(dtype)
    elif is_ours(name):
        model = _load_file(name, device, flag)
    else:
        model = _load_named(name, device, dtype or torch.float64)
    model = model.to(device)
    return model if dtype is None else model.to(dtype)


def _load_named(name: str, device: str | torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A model that mace-torch downloads, or finds in its cache."""
    try:
        return _from_upstream(name, device, dtype)
    except Exception as error:  # of a dozen kinds, from the network to unpickling
        raise FoundationModelError(
            f"--foundation_model={name}: mace-torch can't load it: "
            f"{type(error).__name__}: {error}. Without a network, download its file "
            "elsewhere and give the path"
        ) from error


def _from_upstream(name: str, device: str | torch.device, dtype: torch.dtype) -> torch.nn.Module:
    keywords = {"device": str(device), "default_dtype": str(dtype).removeprefix("torch.")}
    if name in upstream.module("mace.cli.run_train").polar_model_names:
        return upstream.original("mace_polar")(model=name, return_raw_model=True, **keywords)
    if name == "mace_omol":
        return upstream.original("mace_omol")(**keywords).models[0]
    if name.endswith("_off"):
        return upstream.original("mace_off")(model=name.removesuffix("_off"), **keywords).models[0]
    return upstream.original("mace_mp")(model=name, **keywords).models[0]


def _load_file(name: str, device: str | torch.device, flag: str) -> torch.nn.Module:
    path = Path(name).expanduser()
    called = f"--{flag}={name}" if flag else name
    if path.is_dir():
        hint = " (an adapter goes to --adapter, beside its base model)"
        raise FoundationModelError(
            f"{called} is a folder; expected a .model file, or a name"
            + hint * (path / artefact.CONFIG).exists()
        )
    if not path.is_file():
        raise FoundationModelError(
            f"{called}: there is no such file, and no model of that name; "
            f"{did_you_mean(name, [MINI, *upstream_names()])}"
        )
    try:
        model = torch.load(path, map_location=device, weights_only=False)
    except Exception as error:  # whatever unpickling a foreign file raises
        raise FoundationModelError(
            f"{called}: the file can't be read as a model "
            f"({type(error).__name__}: {error}); expected a .model file saved by MACE"
        ) from error
    problem = _not_a_mace_model(model)
    if problem:
        raise FoundationModelError(f"{called}: {problem}")
    return model


def _not_a_mace_model(model: Any) -> str | None:
    if isinstance(model, torch.jit.ScriptModule):
        return (
            "a compiled TorchScript model, which can't be fine-tuned; "
            "give the .model file that was saved beside it"
        )
    if isinstance(model, dict):
        return "a checkpoint or a state dict, no model; give the .model file of that run"
    missing = [p for p in _PARTS if not hasattr(model, p)]
    if missing:
        return f"no MACE model: a {type(model).__name__} without {', '.join(missing)}"
    if any(type(m).__module__.startswith("cuequivariance") for m in model.modules()):
        return (
            "a model in cuequivariance's format; convert it first with mace_cueq_to_e3nn, "
            "and train with --enable_cueq=True"
        )
    return None


def check_rebuildable(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Raises FoundationModelError where mace-torch can't start this fine-tuning from `model`."""
    called, kind = f"--foundation_model={args.foundation_model}", type(model).__name__
    config = upstream.module("mace.tools.scripts_utils").extract_config_mace_model(model)
    if "error" in config:
        raise FoundationModelError(
            f"{called}: a {kind}, from which mace-torch can't start a fine-tuning: it takes "
            "ScaleShiftMACE, MACELES and PolarMACE"
        )
    if kind in ("MACELES", "PolarMACE") and args.model != kind:
        raise FoundationModelError(f"{called}: a {kind}; give --model={kind} too")
    heads, head = getattr(model, "heads", None) or [], args.foundation_head
    if head is not None and len(heads) > 1 and head not in heads:
        raise FoundationModelError(
            f"{called} has no head {head!r} (--foundation_head); {did_you_mean(head, heads)}"
        )


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


def architecture(model: torch.nn.Module) -> dict[str, Any]:
    """What a person wants to know of the architecture; empty where mace-torch doesn't tell it."""
    config = upstream.module("mace.tools.scripts_utils").extract_config_mace_model(model)
    found = {}
    for key in ("interaction_cls_first", "interaction_cls"):
        if key in config:
            found[key] = config[key].__name__
    for key in ("num_interactions", "hidden_irreps", "MLP_irreps", "max_ell", "correlation"):
        if key in config:
            found[key] = str(config[key])
    return found


def _row(values: torch.Tensor) -> list[float]:
    return [float(v) for v in values.detach().cpu().reshape(-1)]


def _rows(values: torch.Tensor) -> list[list[float]]:
    return [_row(row) for row in torch.atleast_2d(values)]


def specialise(foundation: torch.nn.Module, description: dict[str, Any]) -> torch.nn.Module:
    """The model that a fine-tuning run starts from: `foundation` with the run's elements and E0s.

    Args:
        foundation: a one-head foundation model (see `one_head`); it is not changed.
        description: as `describe` gave it for the model of the run.

    Raises:
        FoundationModelError: the run has elements that the foundation model lacks.
    """
    table = upstream.module("mace.tools").AtomicNumberTable
    numbers = [int(z) for z in description["atomic_numbers"]]
    known = {int(z) for z in foundation.atomic_numbers}
    if not set(numbers) <= known:
        raise FoundationModelError(
            f"the adapter is for elements {numbers}; this base model knows {sorted(known)}"
        )
    config = upstream.module("mace.tools.scripts_utils").extract_config_mace_model(foundation)
    if "error" in config:
        raise FoundationModelError(f"a {type(foundation).__name__} can't be rebuilt: {config}")
    heads = list(description["heads"])
    config |= {
        "atomic_energies": np.array(description["atomic_energies"]),
        "atomic_numbers": numbers,
        "num_elements": len(numbers),
        "heads": heads,
        "atomic_inter_scale": [1.0] * len(heads),
        "atomic_inter_shift": [0.0] * len(heads),
    }
    dtype = getattr(torch, description["dtype"])
    with default_dtype(dtype):
        model = type(foundation)(**config)
        upstream.module("mace.tools.finetuning_utils").load_foundations_elements(
            model,
            foundation,
            table(numbers),
            load_readout=True,
            max_L=config["hidden_irreps"].lmax,
            default_dtype=dtype,
        )
    restore_constants(model, description)
    return model.to(next(foundation.parameters()).device)


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


def one_head(model: torch.nn.Module, head: str | None = None) -> torch.nn.Module:
    """The model with only `head` of its heads, as mace-torch takes it for fine-tuning.

    Raises:
        FoundationModelError: it has several, and none of this name.
    """
    heads = list(getattr(model, "heads", None) or [])
    if len(heads) <= 1:
        return model
    if head is not None and head not in heads:
        raise FoundationModelError(
            f"the model has no head {str(head)!r}; {did_you_mean(str(head), heads)}"
        )
    dtype = next(model.parameters()).dtype
    with default_dtype(dtype):
        return upstream.module("mace.tools.scripts_utils").remove_pt_head(model, head)


def predict(
    model: torch.nn.Module,
    batches: Iterable[Any],
    device: str | torch.device | None = None,
    compute_stress: bool = False,
) -> dict[str, torch.Tensor]:
    """Energies (eV), forces (eV/A) and whatever else of OUTPUTS the model gives, over `batches`."""
    extra = {"compute_stress": True} if compute_stress else {}
    device = device or next(model.parameters()).device
    results: dict[str, list[torch.Tensor]] = {}
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:  # forces need a graph to positions, not to parameters
            parameter.requires_grad = False
        for batch in batches:
            output = model(batch.to(device).to_dict(), training=False, **extra)
            for key in OUTPUTS:
                if output.get(key) is not None:
                    results.setdefault(key, []).append(output[key].detach())
    finally:
        for parameter in trainable:
            parameter.requires_grad = True
    return {key: torch.cat(values) for key, values in results.items()}


def largest_difference(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """Per output of both: the largest difference, absolute and relative to the largest value."""
    found = {}
    for key in (k for k in one if k in other):
        difference = (one[key] - other[key]).abs().max().item() if one[key].numel() else 0.0
        size = one[key].abs().max().item() if one[key].numel() else 1.0
        found[key] = (difference, difference / max(size, torch.finfo(one[key].dtype).tiny))
    return found


def batch_of(dataset: Any, n_frames: int) -> list[Any]:
    """The first `n_frames` of a data set as one batch (a list of one), or an empty list."""
    geometric = upstream.module("mace.tools.torch_geometric")
    items = [dataset[i] for i in range(min(n_frames, len(dataset)))]
    return [geometric.Batch.from_data_list(items)] if items else []


def atoms_of(dataset: Any, model: torch.nn.Module, n_frames: int) -> list[ase.Atoms]:
    """The first frames of a data set of mace-torch as `ase.Atoms`, labelled by the default keys."""
    numbers = model.atomic_numbers.cpu()
    found = []
    for i in range(min(n_frames, len(dataset))):
        data = dataset[i]
        atoms = ase.Atoms(
            numbers[data.node_attrs.argmax(dim=1)].numpy(),
            data.positions.numpy(),
            cell=None if data.cell is None else data.cell.reshape(3, 3).numpy(),
            pbc=None if data.pbc is None else data.pbc.reshape(3).numpy(),
        )
        for name, place in (("energy", atoms.info), ("forces", atoms.arrays)):
            if getattr(data, name) is not None and float(getattr(data, f"{name}_weight")):
                place[f"REF_{name}"] = getattr(data, name).numpy()
        if data.stress is not None and float(data.stress_weight):
            atoms.info["REF_stress"] = data.stress.reshape(3, 3).numpy()
        found.append(atoms)
    return found


def frames_to_batch(
    frames: Iterable[Any], model: torch.nn.Module, head: str | None = None, **keys: str
) -> Any:
    """ASE frames as one batch for `model`, in its precision, on its device.

    Args:
        frames: `ase.Atoms` with labels under mace-torch's default keys (REF_energy, REF_forces).
        model: gives elements, cutoff and heads.
        head: of the model, the last one if None.
        keys: other names for the labels, `energy_key="energy"` for example.
    """
    batches = upstream.module("mace.tools.torch_geometric").Batch
    with default_dtype(next(model.parameters()).dtype):
        batch = batches.from_data_list(frames_to_data(frames, model, head, **keys))
    return batch.to(next(model.parameters()).device)


def frames_to_data(
    frames: Iterable[Any], model: torch.nn.Module, head: str | None = None, **keys: str
) -> list[Any]:
    """ASE frames as a data set of mace-torch; the arguments are those of `frames_to_batch`."""
    data = upstream.module("mace.data")
    defaults = upstream.module("mace.tools.default_keys").DefaultKeys.keydict()
    specification = data.update_keyspec_from_kwargs(data.KeySpecification(), {**defaults, **keys})
    table = upstream.module("mace.tools").AtomicNumberTable([int(z) for z in model.atomic_numbers])
    heads = getattr(model, "heads", None) or ["Default"]
    with default_dtype(next(model.parameters()).dtype):
        return [
            data.AtomicData.from_config(
                data.config_from_atoms(
                    atoms, key_specification=specification, head_name=head or heads[-1]
                ),
                z_table=table,
                cutoff=float(model.r_max),
                heads=heads,
            )
            for atoms in frames
        ]
