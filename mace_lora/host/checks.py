"""Labels and frames are checked once, when they are read and before any training."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase.data import chemical_symbols

from mace_lora.errors import ConfigError, DataError

# what must be there at all, unless the loss gives it no weight: property -> (flag, weight flag)
_NEEDED = {"energy": ("energy_key", "energy_weight"), "forces": ("forces_key", "forces_weight")}


def files_exist(args: argparse.Namespace) -> None:
    """Raises ConfigError naming the flag whose file is not there."""
    for flag in ("train_file", "valid_file", "test_file"):
        value = getattr(args, flag, None)
        for path in [value] if isinstance(value, str) else value or []:
            if not Path(path).exists():
                raise ConfigError(f"--{flag}={path}: there is no such file")


def folders_writable(args: argparse.Namespace) -> None:
    """Make the output folders now, so that a run can't fail for them after hours of training.

    Raises:
        ConfigError: naming the flag whose folder can't be written to.
    """
    for flag in ("work_dir", "model_dir", "checkpoints_dir", "results_dir", "log_dir"):
        folder = getattr(args, flag, None)
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            probe = Path(folder) / ".mace_lora_probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"--{flag}={folder} can't be written to: {error}") from None


def checked_loader(
    load: Callable[..., tuple[Any, list[Any]]],
    args: argparse.Namespace,
    known_elements: Callable[[], set[int] | None],
) -> Callable[..., tuple[Any, list[Any]]]:
    """mace-torch's `load_from_xyz`, followed by the checks below.

    Args:
        load: the original.
        args: the run's flags.
        known_elements: gives the elements of the foundation model, or None to check no elements.
    """

    def load_from_xyz(*positional: Any, **keywords: Any) -> tuple[Any, list[Any]]:
        path = str(keywords.get("file_path", positional[0] if positional else "?"))
        keys = keywords.get("key_specification")
        keys = {**keys.info_keys, **keys.arrays_keys} if keys is not None else {}
        try:
            energies, frames = load(*positional, **keywords)
        except Exception as error:  # ASE raises many kinds for a broken file
            raise DataError(f"{path} can't be read: {type(error).__name__}: {error}") from error
        if not keywords.get("no_data_ok"):
            check_frames(path, frames, keys, args, known_elements())
        return energies, frames

    return load_from_xyz


def enough_frames(train_loader: Any, args: argparse.Namespace) -> None:
    """Raises ConfigError where the training set makes not even one batch."""
    if len(train_loader) == 0:
        raise ConfigError(
            f"--batch_size={args.batch_size} is larger than the training set of "
            f"{len(train_loader.dataset)} frames, so that there is no batch to train on"
        )


def check_frames(
    path: str,
    frames: list[Any],
    keys: dict[str, str],
    args: argparse.Namespace,
    known: set[int] | None = None,
) -> None:
    """Raises DataError for missing labels, labels of a wrong shape or not finite, unknown elements.

    Args:
        path: the file, for messages.
        frames: mace-torch's Configurations of that file.
        keys: the name of each property in the file.
        args: the run's flags (weights of the loss).
        known: atomic numbers of the foundation model, if there is one.
    """
    if not frames:
        raise DataError(f"{path} holds no frames to train on or to test with")
    if not getattr(args, "compute_dipole_only", False) and "dipole" not in str(args.loss):
        for name, (flag, weight) in _NEEDED.items():
            _check_present(path, frames, name, keys.get(name, name), flag, getattr(args, weight))
    for frame in frames:
        for name, value in frame.properties.items():
            if value is not None and not _is_finite(value):
                where = _frame_index(path, frame)
                raise DataError(
                    f"{path}, frame {where}: {name} (key {keys.get(name, name)!r}) holds NaN or "
                    "infinite values; mend or remove the frame"
                )
        if not _is_finite(frame.positions):
            raise DataError(f"{path}, frame {_frame_index(path, frame)}: positions are not finite")
        forces = frame.properties.get("forces")
        if forces is not None and np.shape(forces) != (len(frame.atomic_numbers), 3):
            raise DataError(
                f"{path}, frame {_frame_index(path, frame)}: forces of shape {np.shape(forces)}, "
                f"expected ({len(frame.atomic_numbers)}, 3)"
            )
        if known is not None:
            _check_elements(path, frame, known)


def _check_present(
    path: str, frames: list[Any], name: str, key: str, flag: str, weight: float
) -> None:
    missing = sum(frame.properties.get(name) is None for frame in frames)
    if not missing or not weight:
        return
    if missing == len(frames):
        raise DataError(
            f"{path} has no {name} under the key {key!r} in any of its {len(frames)} frames; "
            f"its keys are {_keys_in_file(path)}; name the right one with --{flag}"
        )
    logging.warning(
        f"{path}: {missing} of {len(frames)} frames have no {name} under {key!r}: "
        f"they are left out of the {name} part of the loss"
    )


def _keys_in_file(path: str) -> str:
    atoms = ase.io.read(path, index=0)
    calculated = list(atoms.calc.results) if atoms.calc is not None else []
    own = [k for k in atoms.arrays if k not in ("numbers", "positions")]
    return ", ".join(sorted({*atoms.info, *own, *calculated})) or "none"


def _check_elements(path: str, frame: Any, known: set[int]) -> None:
    unknown = sorted({int(z) for z in frame.atomic_numbers} - known)
    if unknown:
        raise DataError(
            f"{path}, frame {_frame_index(path, frame)} holds {_symbols(unknown)}; "
            f"the foundation model knows {_symbols(sorted(known))}"
        )


def _symbols(numbers: list[int]) -> str:
    return ", ".join(f"{chemical_symbols[z]} ({z})" for z in numbers)


def _is_finite(value: Any) -> bool:
    try:
        return bool(np.isfinite(np.asarray(value, dtype=float)).all())
    except (TypeError, ValueError):
        return True  # texts, such as the head


def _frame_index(path: str, frame: Any) -> str:
    """Where `frame` stands in the file: 0-based, as in ase.io.read(path, index)."""
    for i, atoms in enumerate(ase.io.read(path, index=":")):
        if len(atoms) == len(frame.positions) and np.array_equal(
            atoms.positions, frame.positions, equal_nan=True
        ):
            return str(i)
    return "?"
