"""Upstream's names that we rely on, checked before a run, substituted during it, restored after.

mace-torch's `run_train.run` is one long function that looks its helpers up by name in its module.
We call it as it is and put our own helpers under some of those names while it runs. Builds of one
version differ, so what counts is that each name exists with the parameters we expect.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from mace_lora.errors import UnsupportedUpstream

TESTED = "0.3.16"
_RUN = "mace.cli.run_train"


@dataclass(frozen=True)
class Name:
    """A name of upstream's, where it is looked up, and the parameters we rely on.

    `parameters` are names that must be among the callable's parameters; None: any object.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...] | None = ()


# key -> name; the reason for each substitute stands beside it in session.py, training.py,
# speed.py and saving.py
NAMES: dict[str, Name] = {
    "inject": Name(_RUN, "inject_LoRAs", ("model", "rank", "alpha")),
    "merge": Name(_RUN, "merge_lora_weights", ("model",)),
    "to_cueq": Name(_RUN, "run_e3nn_to_cueq", ("input_model", "device")),
    "from_cueq": Name(_RUN, "run_cueq_to_e3nn", ("input_model", "device")),
    "transfer_contractions": Name(
        "mace.cli.convert_e3nn_cueq",
        "transfer_symmetric_contractions",
        ("source_dict", "target_dict"),
    ),
    "to_oeq": Name(_RUN, "run_e3nn_to_oeq", ("input_model", "device")),
    "from_oeq": Name(_RUN, "run_oeq_to_e3nn", ("input_model", "device")),
    "configure_model": Name(_RUN, "configure_model", ("args", "model_foundation", "z_table")),
    "avg_num_neighbors": Name(_RUN, "get_avg_num_neighbors", ("args", "train_loader")),
    "params_options": Name(_RUN, "get_params_options", ("args", "model")),
    "lbfgs": Name(_RUN, "LBFGS", ("params",)),
    "ema": Name(_RUN, "ExponentialMovingAverage", ("parameters", "decay")),
    "foundation_names": Name(_RUN, "mace_mp_names", None),
    "mace_mp": Name(_RUN, "mace_mp", ("model", "device", "default_dtype")),
    "mace_off": Name(_RUN, "mace_off", ("model", "device", "default_dtype")),
    "mace_omol": Name(_RUN, "mace_omol", ("device", "default_dtype")),
    "mace_polar": Name(_RUN, "mace_polar", ("model", "device", "default_dtype")),
    "init_distributed": Name(_RUN, "init_distributed", ("args",)),
    "ddp": Name(_RUN, "DDP", ("module", "device_ids", "broadcast_buffers")),
    "jit": Name(_RUN, "jit", None),
    "extract_config": Name(_RUN, "extract_config_mace_model", ("model",)),
    "count_parameters": Name("mace.tools", "count_parameters", ("module",)),
    "train": Name("mace.tools", "train", ("model", "valid_loaders", "train_loader", "logger")),
    "checkpoints": Name("mace.tools", "CheckpointHandler", ()),
    "log_errors": Name("mace.tools.train", "valid_err_log", ("eval_metrics", "epoch")),
    "take_step": Name("mace.tools.train", "take_step", ("model", "batch", "optimizer", "ema")),
    "step_of_lbfgs": Name("mace.tools.train", "take_step_lbfgs", ("model", "data_loader")),
    "evaluate": Name("mace.tools.train", "evaluate", ("model", "loss_fn", "data_loader")),
    "evaluate_at_the_end": Name(
        "mace.tools.tables_utils", "evaluate", ("model", "loss_fn", "data_loader")
    ),
    "metrics": Name("mace.tools.train", "MACELoss", ("loss_fn",)),
    "load_xyz": Name("mace.data", "load_from_xyz", ("file_path", "key_specification")),
    "json": Name(_RUN, "json", None),
    "load_stored": Name(_RUN, "load_dataset_for_path", ("file_path", "z_table", "head_config")),
    "graphs": Name("mace.data", "AtomicData", None),
    "graph_of_replay": Name("mace.tools.multihead_tools", "AtomicData", None),
    "graph_of_lmdb": Name("mace.data.lmdb_dataset", "AtomicData", None),
    "split": Name("mace.data", "random_train_valid_split", ("items", "valid_fraction", "seed")),
    "atomic_energies": Name(_RUN, "get_atomic_energies", ("E0s", "train_collection", "z_table")),
    "energies_as_array": Name(_RUN, "dict_to_array", ("input_data", "heads")),
    "estimate_e0s": Name("mace.data", "estimate_e0s_from_foundation", ("foundation_model",)),
    "save": Name("torch", "save", ("obj", "f")),
    "jit_save": Name("torch.jit", "save", ("m", "f")),
}
# Called, never substituted
CALLED: tuple[Name, ...] = (
    Name(_RUN, "run", ("args",)),
    Name("mace.tools.train", "train_one_epoch", ("data_loader", "optimizer", "ema", "epoch")),
    Name("mace.data", "HDF5Dataset", ("file_path", "r_max", "z_table", "atomic_dataclass")),
    Name("mace.tools.arg_parser", "build_default_arg_parser", ()),
    Name("mace.tools.scripts_utils", "extract_config_mace_model", ("model",)),
    Name("mace.tools.scripts_utils", "remove_pt_head", ("model", "head_to_keep")),
    Name("mace.tools.finetuning_utils", "load_foundations_elements", ("model", "table")),
)


def module(name: str) -> ModuleType:
    """The module called `name`. `mace.tools.train` as an attribute would be the function."""
    return importlib.import_module(name)


def version() -> str:
    """The installed version of mace-torch."""
    try:
        return metadata.version("mace-torch")
    except metadata.PackageNotFoundError:
        raise UnsupportedUpstream(
            f"mace-torch is not installed; install it with: pip install mace-torch=={TESTED}"
        ) from None


def problems() -> list[str]:
    """What of upstream is not as we rely on it: a line each, nothing where all is well."""
    found = []
    for name in (*NAMES.values(), *CALLED):
        full = f"{name.module}.{name.attribute}"
        try:
            value = getattr(module(name.module), name.attribute)
        except (ImportError, AttributeError):
            found.append(f"{full} does not exist")
            continue
        if name.parameters:
            try:
                has = set(inspect.signature(value).parameters)
            except (TypeError, ValueError):
                continue
            missing = [p for p in name.parameters if p not in has]
            if missing:
                found.append(f"{full} has no parameter {', '.join(missing)}")
    return found


def check() -> None:
    """Raises UnsupportedUpstream where mace-torch is not as we rely on it."""
    installed = version()
    found = problems()
    if found:
        raise UnsupportedUpstream(
            f"mace-torch {installed} can't be hosted: {'; '.join(found)}. "
            f"mace_lora is tested with mace-torch {TESTED}: pip install mace-torch=={TESTED}"
        )


# Upstream's own objects while ours stand in their place
_saved: dict[str, Any] = {}


def original(key: str) -> Any:
    """Upstream's own object under `key` of NAMES, whether or not ours stands in its place now."""
    if key in _saved:
        return _saved[key]
    name = NAMES[key]
    return getattr(module(name.module), name.attribute)


@contextlib.contextmanager
def substituted(substitutes: dict[str, Any]) -> Iterator[None]:
    """Put `substitutes` (by key of NAMES) in place; restore upstream's whatever happens."""
    mine = {key: original(key) for key in substitutes if key not in _saved}
    _saved.update(mine)
    try:
        for key, value in substitutes.items():
            setattr(module(NAMES[key].module), NAMES[key].attribute, value)
        yield
    finally:
        for key, value in mine.items():
            setattr(module(NAMES[key].module), NAMES[key].attribute, value)
            del _saved[key]
