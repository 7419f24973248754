"""Files, folders and flags are checked before anything is read, data when they are read."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mace_lora.errors import ConfigError, DataError
from mace_lora.frames import stored
from mace_lora.frames.checks import XyzFrames, check, symbols
from mace_lora.model import artefact
from mace_lora.training.epochs import processes
from mace_lora.upstream import library
from mace_lora.upstream import names as upstream

_FOUNDATION = "the foundation model"
# Flags of mace-torch's whose values it takes as they are: what they must be, in words
_NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda n: 0 <= n < 2**32, "0 or more, and below 2^32"),
    **dict.fromkeys(
        ("batch_size", "valid_batch_size", "max_num_epochs", "patience", "eval_interval"),
        (lambda n: n >= 1, "1 or more"),
    ),
    **dict.fromkeys(("lr", "swa_lr"), (lambda x: 0 < x < math.inf, "a finite number above 0")),
    "weight_decay": (lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
    "ema_decay": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "lr_factor": (lambda x: 0 < x < 1, "a number between 0 and 1"),
    "clip_grad": (lambda x: x is None or x > 0, "a number above 0, or None for no clipping"),
}


def numbers(args: argparse.Namespace) -> None:
    """Raises ConfigError for a number with which nothing can be trained."""
    for flag, (is_right, words) in _NUMBERS.items():
        value = getattr(args, flag)
        if not is_right(value):
            raise ConfigError(f"--{flag}={value}: {words} is needed")


def heads(args: argparse.Namespace) -> None:
    """Raises ConfigError where --heads is no table of tables."""
    if args.heads is None:
        return
    try:
        table = ast.literal_eval(args.heads) if isinstance(args.heads, str) else args.heads
        if table and all(isinstance(head, dict) for head in table.values()):
            return
    except (ValueError, TypeError, SyntaxError, AttributeError):
        pass
    raise ConfigError(
        f"--heads={args.heads}: a table of tables is needed, such as "
        "\"{'one': {'train_file': 'one.xyz', 'E0s': 'estimated'}}\""
    )


def known_elements(args: argparse.Namespace, foundation: Any) -> None:
    """Raises ConfigError where --atomic_numbers names what the loaded foundation model lacks."""
    if foundation is None or args.atomic_numbers is None:
        return
    try:
        asked = {int(z) for z in ast.literal_eval(args.atomic_numbers)}
    except (ValueError, TypeError, SyntaxError):
        raise ConfigError(
            f"--atomic_numbers={args.atomic_numbers}: a list such as '[1, 6, 8]' is needed"
        ) from None
    _refuse_unknown(asked, {int(z) for z in foundation.atomic_numbers})


def _refuse_unknown(asked: set[int], known: set[int]) -> None:
    if not asked <= known:
        raise ConfigError(
            "the elements of this run (--atomic_numbers, or the statistics file) include "
            f"{symbols(sorted(asked - known))}; {_FOUNDATION} knows {symbols(sorted(known))}"
        )


def optional_packages(args: argparse.Namespace) -> None:
    """Raises ConfigError naming the flag whose package is not installed."""
    needed = {
        "--enable_cueq=True": (args.enable_cueq or args.only_cueq, "cuequivariance_torch"),
        "--enable_oeq=True": (args.enable_oeq, "openequivariance"),
        "--optimizer=schedulefree": (args.optimizer == "schedulefree", "schedulefree"),
        "--wandb": (args.wandb, "wandb"),
    }
    for flag, (asked, package) in needed.items():
        if asked and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{flag} needs the package {package}, which is not installed: "
                f"pip install {package.replace('_', '-')}, or leave the flag out"
            )
    unknown = [name for name in args.wandb_log_hypers if args.wandb and name not in vars(args)]
    if unknown:
        raise ConfigError(
            f"--wandb_log_hypers={unknown[0]} is no flag of mace-torch's (the adapter and its "
            "options are logged without being named)"
        )


def folders_writable(args: argparse.Namespace) -> None:
    """Make the output folders now, so that a run can't fail for them after hours of training.

    Raises:
        ConfigError: naming the flag whose folder can't be written to.
        ArtefactError: something that is no adapter stands where the adapter is to be written.
    """
    for flag in ("work_dir", "model_dir", "checkpoints_dir", "results_dir", "log_dir"):
        folder = getattr(args, flag, None)
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # several processes may look at once
                pass
        except OSError as error:
            raise ConfigError(f"--{flag}={folder} can't be written to: {error}") from None
    artefact.check_free(Path(args.model_dir or args.work_dir) / f"{args.name}_adapter")


def checked_loader(
    load: Callable[..., tuple[Any, list[Any]]],
    args: argparse.Namespace,
    known_elements: Callable[[], set[int] | None],
    seen: list[str],
) -> Callable[..., tuple[Any, list[Any]]]:
    """mace-torch's `load_from_xyz`, followed by a check of the frames.

    Args:
        load: the original.
        args: the run's flags.
        known_elements: gives the elements of the foundation model, or None to check no elements.
        seen: the files that were read; added to.
    """

    def load_from_xyz(*positional: Any, **keywords: Any) -> tuple[Any, list[Any]]:
        path = str(keywords.get("file_path", positional[0] if positional else "?"))
        keys = keywords.get("key_specification")
        keys = {**keys.info_keys, **keys.arrays_keys} if keys is not None else {}
        try:
            energies, frames = load(*positional, **keywords)
        except Exception as error:  # ASE raises many kinds for a broken file
            raise DataError(f"{path} can't be read: {type(error).__name__}: {error}") from error
        seen.append(path)
        known = known_elements()
        check(
            XyzFrames(path, frames, keys),
            args,
            None if known is None else (_FOUNDATION, known),
            labels=not keywords.get("no_data_ok"),
        )
        return energies, frames

    return load_from_xyz


def checked_dataset(
    load: Callable[..., Any],
    args: argparse.Namespace,
    known_elements: Callable[[], set[int] | None],
) -> Callable[..., Any]:
    """mace-torch's `load_dataset_for_path`, followed by a check of the frames in HDF5 and LMDB.

    Args: as for `checked_loader`.
    """
    checked: set[str] = set()

    def load_dataset_for_path(**keywords: Any) -> Any:
        path, numbers = keywords["file_path"], {int(z) for z in keywords["z_table"].zs}
        _refuse_unknown(numbers, known_elements() or numbers)

        head = keywords["head_config"]
        for test in _stored_tests(head, args) - checked:
            checked.add(test)
            settings = {name: keywords[name] for name in ("r_max", "z_table")}
            _looked_through(
                test, partial(library.hdf5, test, **settings, head=head.head_name), args, numbers
            )
        return _looked_through(str(path), partial(load, **keywords), args, numbers)

    return load_dataset_for_path


def _looked_through(
    path: str, load: Callable[[], Any], args: argparse.Namespace, numbers: set[int]
) -> Any:
    """What `load` gives, checked; a list comes from .xyz, which was checked when it was read."""
    try:
        dataset = load()
    except Exception as error:  # of h5py, lmdb and ASE
        raise DataError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    if not isinstance(dataset, list):
        for part in stored.parts(path, dataset):
            check(part, args, ("this run (--atomic_numbers, or the statistics file)", numbers))
    return dataset


def _stored_tests(head: Any, args: argparse.Namespace) -> set[str]:
    """Test sets in HDF5, which mace-torch opens after training."""
    if head.test_dir is None:
        return set()
    pattern = "*/*" if args.multi_processed_test else "*_test.h5"
    return {str(path) for path in Path(head.test_dir).glob(pattern)}


def split(
    items: list[Any], valid_fraction: float, seed: int, work_dir: str, *rest: Any, **keywords: Any
) -> Any:
    """mace-torch's split of the training set, which needs two frames and a fraction.

    Raises:
        DataError: there are none to spare for validation.
    """
    if not 0 < valid_fraction < 1:
        raise ConfigError(
            f"--valid_fraction={valid_fraction}: a number between 0 and 1 is needed, or a "
            "--valid_file of its own"
        )
    if len(items) < 2:
        raise DataError(
            f"the training set holds {len(items)} frame, and --valid_fraction={valid_fraction} "
            "takes one of it for validation: give more frames, or a --valid_file of its own"
        )
    original = upstream.original("split")
    with contextlib.ExitStack() as stack:
        if not processes.is_first():  # it writes the indices down
            work_dir = stack.enter_context(tempfile.TemporaryDirectory())
        return original(items, valid_fraction, seed, work_dir, *rest, **keywords)


def enough_frames(train_loader: Any, args: argparse.Namespace) -> None:
    """Raises ConfigError where the training set makes not even one batch."""
    count = processes.count(args.distributed)
    frames = len(train_loader.dataset)
    if frames // (args.batch_size * count) == 0 and not (args.lbfgs and frames):
        times = f" times {count} processes" if count > 1 else ""
        raise ConfigError(
            f"--batch_size={args.batch_size}{times} is larger than the training set of "
            f"{frames} frames, so that there is no batch to train on"
        )
