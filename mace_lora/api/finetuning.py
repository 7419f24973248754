"""Fine-tuning in one call: what the command does, on frames and models in memory or in files."""

from __future__ import annotations

import filecmp
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ase
import ase.io
import torch

from mace_lora import parsing
from mace_lora.adapters.options import AdapterOptions
from mace_lora.adapters.registry import METHODS, options_of
from mace_lora.api.command import call, in_python
from mace_lora.api.result import Result
from mace_lora.config import AdapterConfig
from mace_lora.errors import ConfigError, FoundationModelError, closest
from mace_lora.files import whole_file
from mace_lora.frames import attached
from mace_lora.frames.keys import DEFAULTS
from mace_lora.model.injection import config_of
from mace_lora.training.arguments import build_parser

# A file, or frames in memory
Frames = str | Path | ase.Atoms | Iterable[ase.Atoms]

# Flags of the command that are arguments here, and what they are called
_ARGUMENTS = {
    "foundation_model": "base",
    "train_file": "frames",
    "valid_file": "valid",
    "test_file": "test",
    "adapter": "method",
    "lora": "method",
    "work_dir": "folder",
    "restart_latest": "folder",
}
# Where a run writes is one folder, and what it is started by is this function
_NOT_HERE = (
    *("model_dir", "checkpoints_dir", "results_dir", "log_dir", "downloads_dir", "config"),
    *("dry_run", "distributed", "launcher", "help", "version", "members", "bootstrap"),
)
_DEFAULT_METHOD, _PRESET = "full", "balanced"


def finetune(
    base: str | Path | torch.nn.Module,
    frames: Frames,
    *,
    valid: Frames | None = None,
    test: Frames | None = None,
    method: str | AdapterConfig | AdapterOptions | None = None,
    preset: str | None = None,
    folder: str | Path | None = None,
    name: str = "finetuned",
    max_num_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    valid_fraction: float | None = None,
    device: str | None = None,
    default_dtype: str | None = None,
    seed: int | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    units: str | None = None,
    overwrite: bool = False,
    **options: object,
) -> Result:
    """Fine-tune a foundation model, with all that the command `mace_run_train` does.

    That is: checks of frames, keys and units, E0s, settings that suit, fused steps, protection, a
    verdict, and a merged model that was proved. What is left out (None) suits a fine-tuning. What a
    run changes in its process is put back, and nothing is written into the working folder.

        result = finetune("mini", frames, test=test, max_num_epochs=20)
        atoms.calc = result.calculator()

    Args:
        base: the foundation model: a name (`mini`, `medium_off`, ...), a `.model` file or a model,
            which is not changed.
        frames: to train on: `ase.Atoms` whose labels are the results of their calculators (eV,
            eV/Å, eV/Å³; one that has none is asked for them) or stand under REF_energy, REF_forces
            and REF_stress in `info` and `arrays`; or the path of a file of them.
        valid, test: frames to judge and to test by; without `valid` a tenth of `frames`.
        method: `full` (the default), `lora`, `elora`, `dora`, `mmea`; or a method with its options,
            `LoraOptions(rank=8)` or `AdapterConfig.create("lora", rank=8)`.
        preset: of `lora`, which it stands for where no method is named: `small-data`, `balanced`
            (the default of `lora`) or `max-accuracy`.
        folder: where the run writes, and goes on if it was interrupted; one that is done is
            answered without training. None: a temporary one, kept as long as the result.
        name: the files are called by it.
        max_num_epochs, batch_size, lr, valid_fraction, device, default_dtype, seed: of the
            training; see `mace_run_train --help`.
        energy_key, forces_key, stress_key: where labels stand in `frames`, `valid` and `test`.
        units: of the labels, such as `energy=Hartree,forces=Hartree/Bohr`.
        overwrite: begin anew, and replace what another run left in `folder` under this name.
        options: any other flag of the command by its name (`ema=False`, `E0s={1: -13.6}`, ...),
            and the options of the method (`rank=8`, `alpha=8`, `targets=("all",)`), which win
            where a flag has the same name (`gate` of `mmea`).

    Returns:
        Model, adapter, errors, verdict and files.

    Raises:
        ConfigError: an option is unknown or makes no sense, or `folder` holds another run.
        DataError: frames can't be trained on.
        FoundationModelError: there is no such base, or it can't be fine-tuned.
        MaceLoraError: whatever else the command refuses.
        KeyboardInterrupt: after Ctrl-C; the checkpoint is kept, and the same call with the same
            folder goes on from it.
    """
    common = {
        "max_num_epochs": max_num_epochs,
        "batch_size": batch_size,
        "lr": lr,
        "valid_fraction": valid_fraction,
        "device": device,
        "default_dtype": default_dtype,
        "seed": seed,
        "energy_key": energy_key,
        "forces_key": forces_key,
        "stress_key": stress_key,
        "units": units,
        "overwrite": overwrite or None,
    }
    adapter = _adapter(method, preset, options)
    flags = {"name": name, **adapter, **common, **_others(options, adapter)}
    keys = {label: str(flags[f"{label}_key"]) for label in DEFAULTS if flags.get(f"{label}_key")}
    sets = {"frames": frames, "valid": valid, "test": test}
    with _folder(folder) as place:
        made = {place / f"{name}_{part}.xyz": part for part in sets}
        names = {**_ARGUMENTS, f"{adapter['adapter']}_preset": "preset"}
        names |= {flag: flag.partition("_")[2] for flag in adapter if "_" in flag}
        with in_python(names, made):
            for part, given in sets.items():
                flags[_flag(part)] = _as_file(
                    given, part, place / f"{name}_{part}.xyz", keys, overwrite, place
                )
            flags["foundation_model"] = _base(base, place / f"{name}_base.model")
            flags |= {"work_dir": str(place), "restart_latest": not overwrite}
            again = f"call finetune again with folder={str(place)!r}"
            record = call(parsing.as_flags(build_parser(), flags), again)
        if record is None or not hasattr(record, "saved"):
            raise ConfigError("this process has saved no model: finetune is for one process")
        result = Result.of(record, temporary=folder is None)
        if folder is None:
            weakref.finalize(result, shutil.rmtree, place, ignore_errors=True)
        return result


def _flag(part: str) -> str:
    return next(flag for flag, argument in _ARGUMENTS.items() if argument == part)


# ------------------------------------------------------------------ method and options


def _adapter(
    method: str | AdapterConfig | AdapterOptions | None,
    preset: str | None,
    options: Mapping[str, object],
) -> dict[str, object]:
    """Flags of the method: its name, preset, and options."""
    if isinstance(method, AdapterOptions):
        method = AdapterConfig.of(method)
    if isinstance(method, AdapterConfig):
        if preset is not None:
            raise ConfigError(f"preset={preset!r} and a method with its options: give one of them")
        values = method.options.to_json()
        given = {k: v for k, v in values.items() if v not in ([], None)}
        return {"adapter": method.method, **{f"{method.method}_{k}": v for k, v in given.items()}}
    if method is None:
        method = _DEFAULT_METHOD if preset is None else "lora"
    kind = options_of(method)
    if preset is None and _PRESET in kind.presets:
        preset = _PRESET
    if preset is not None:
        AdapterConfig.create(method, preset)  # an unknown one, in words
    known = {field.name for field in kind.fields()}
    own = {f"{method}_{name}": value for name, value in options.items() if name in known}
    return {"adapter": method, **({f"{method}_preset": preset} if preset else {}), **own}


def _others(options: Mapping[str, object], adapter: Mapping[str, object]) -> dict[str, object]:
    """Options that are none of the method's, each a flag of the command.

    Raises:
        ConfigError: there is no such flag, or it is an argument here.
    """
    method = str(adapter["adapter"])
    own = {field.name for field in options_of(method).fields()}
    left = {name: value for name, value in options.items() if name not in own}
    known = {flag.removeprefix("--") for flag in parsing.all_flags(build_parser())}
    of_methods = {field.name for m in METHODS for field in options_of(m).fields()}
    for name in left:
        if name in _ARGUMENTS:
            raise ConfigError(f"{name} is called {_ARGUMENTS[name]} here: give {_ARGUMENTS[name]}=")
        if name in _NOT_HERE:
            raise ConfigError(f"{name} has no place here: the command and mace_lora.train take it")
        if name in known:
            continue
        others = [m for m in METHODS if name in {f.name for f in options_of(m).fields()}]
        if others:
            raise ConfigError(
                f"{name} is an option of {', '.join(others)}, and the method is {method!r}: leave "
                f"it out, or give method={others[0]!r}"
            )
        hint = closest(name, {*of_methods, *known, *_ARGUMENTS.values()} - set(_NOT_HERE))
        raise ConfigError(f"finetune has no option {name!r}. {hint}".rstrip())
    return left


# ------------------------------------------------------------------ files


@contextmanager
def _folder(folder: str | Path | None) -> Iterator[Path]:
    """Where a run writes; a temporary folder is removed after an error, unless it can go on."""
    if folder is not None:
        place = Path(folder).expanduser().absolute()
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"folder={folder}: it can't be made: {error}") from None
        yield place
        return
    place = Path(tempfile.mkdtemp(prefix="mace_lora_"))
    try:
        yield place
    except BaseException:
        if _checkpoints(place):
            logging.getLogger(__name__).warning(
                f"what was trained is kept: finetune(..., folder={str(place)!r}) goes on"
            )
        else:
            shutil.rmtree(place, ignore_errors=True)
        raise


def _checkpoints(place: Path) -> list[Path]:
    return list(place.glob("checkpoints/*_latest.pt"))


def _as_file(
    given: Frames | None,
    part: str,
    path: Path,
    keys: Mapping[str, str],
    overwrite: bool,
    place: Path,
) -> str | None:
    """The path of a file with these frames, which is `path` for those in memory.

    Raises:
        DataError: they are no frames.
        ConfigError: the run in this folder was trained on others.
    """
    if given is None:
        return None
    if isinstance(given, (str, Path)):
        return str(Path(given).expanduser().absolute())
    frames = attached.labelled(given, part, keys)
    with whole_file(path) as new:
        ase.io.write(new, frames, format="extxyz")
        same = not path.exists() or filecmp.cmp(path, new, shallow=False)
        if not (same or overwrite) and _checkpoints(place):
            raise ConfigError(
                f"folder={place}: it holds a run on other {part}; give another folder or name, "
                "or overwrite=True to begin anew"
            )
    return str(path)


def _base(base: str | Path | torch.nn.Module, path: Path) -> str:
    """The name or path of a foundation model, which is `path` for one in memory."""
    if isinstance(base, torch.nn.Module):
        if config_of(base) is not None:
            raise ConfigError(
                "base carries adapters: merge(model) makes a plain model of it; to go on with an "
                "adapter give its foundation model and adapter_start=folder"
            )
        with whole_file(path) as new:
            torch.save(base, new)
        return str(path)
    if not isinstance(base, (str, Path)):
        raise FoundationModelError(
            f"base: a name (mini, medium_off, ...), a .model file or a model is needed, found "
            f"{type(base).__name__}"
        )
    there = Path(base).expanduser()
    return str(there.absolute()) if there.exists() else str(base)
