"""Frames in HDF5 and LMDB files, which mace-torch reads one by one while it trains.

They are looked through before training as those of .xyz files are. mace-torch's data sets turn each
frame into a graph at once; they are asked for the frame itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import IO, Any

from mace_lora.errors import ConfigError, DataError
from mace_lora.upstream import library
from mace_lora.upstream import names as upstream

# Of a larger data set so many frames are looked at, evenly spread
MOST_FRAMES = 20_000
# In the place of mace-torch's AtomicData: the frame as it was read
_AS_READ = SimpleNamespace(from_config=lambda config, **_: config)


class StoredFrames:
    """The frames of one HDF5 file, or of the LMDB files of one data set.

    Args:
        path: the file.
        dataset: mace-torch's data set of it.
    """

    def __init__(self, path: str, dataset: Any) -> None:
        self.path = path
        self._dataset = copy.copy(dataset)
        self._dataset.atomic_dataclass = (
            _AS_READ  # of HDF5Dataset; LMDBDataset has it in its module
        )
        self._step = -(-len(dataset) // MOST_FRAMES)

    def __iter__(self) -> Iterator[Any]:
        if self._step > 1:
            logging.info(
                f"{self.path} holds {len(self._dataset)} frames: every {self._step}th is looked at"
            )
        for i in range(0, len(self._dataset), self._step):
            yield self._frame(i)

    def _frame(self, i: int) -> Any:
        try:
            with upstream.substituted({"graph_of_lmdb": _AS_READ}):
                frame = self._dataset[i]
        except Exception as error:  # whatever h5py and lmdb raise for a damaged file
            raise DataError(
                f"{self.path}, frame {i} can't be read: {type(error).__name__}: {error}"
            ) from error
        if frame is None:  # mace-torch has printed why
            raise DataError(f"{self.path}, frame {i} can't be read")
        return frame

    def place(self, number: int, frame: Any) -> str:
        """0-based, in the order of the data set."""
        del frame
        return str(number * self._step)

    def called(self, label: str) -> str:
        return label

    def remedy(self, label: str) -> str:
        found = sorted(k for k, v in self._frame(0).properties.items() if v is not None)
        return (
            f"(there are {', '.join(found) or 'no labels'}): write the file again with it; "
            f"mace_prepare_data has the flag --{label}_key"
        )


def check_flags(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: a folder without data; HDF5 or LMDB together with what mace-torch reads from
            .xyz alone: elements, E0s, validation and test frames.
    """
    stored = {flag: _stored(flag, getattr(args, flag)) for flag in ("train_file", "valid_file")}
    if _stored("test_file", args.test_file) or (stored["train_file"] and args.test_file):
        raise ConfigError(
            f"--test_file={args.test_file}: mace-torch takes HDF5 from --test_dir alone, "
            "those called *_test.h5, and with .xyz files only if it trains on .xyz files"
        )
    if not stored["train_file"] or args.heads:
        return
    file = f"--train_file={args.train_file}"
    if not stored["valid_file"]:
        raise ConfigError(f"{file}: beside HDF5 or LMDB give such a --valid_file, too")
    if args.statistics_file:
        return
    if args.atomic_numbers is None:
        raise ConfigError(
            f"{file}: for HDF5 and LMDB give --statistics_file, as "
            "mace_prepare_data --compute_statistics writes it, or --atomic_numbers='[1, 6, 8]'"
        )
    if args.E0s in (None, "estimated", "average"):
        raise ConfigError(
            f"{file}, --E0s={args.E0s}: E0s can't be found from HDF5 or LMDB; give "
            "--statistics_file, --E0s=foundation, or numbers: --E0s='{1: -13.6, ...}'"
        )


def _stored(flag: str, path: str | None) -> bool:
    """Whether mace-torch reads a file or folder frame by frame; only a text can be one."""
    if not isinstance(path, str):
        return False
    try:
        return not library.reads_with_ase(path)
    except RuntimeError:
        raise ConfigError(f"--{flag}={path}: a folder without HDF5 or LMDB files") from None


def read_statistics(file: IO[str]) -> Any:
    """JSON as mace_prepare_data writes it: its E0s under numpy 2 it can't read again."""
    content = json.load(file)
    energies = content.get("atomic_energies") if isinstance(content, dict) else None
    if isinstance(energies, str):
        content["atomic_energies"] = re.sub(r"np\.float\d+\(([^()]*)\)", r"\1", energies)
    return content


def parts(path: str, dataset: Any) -> list[StoredFrames]:
    """The files of a data set: a folder of HDF5 files is several."""
    if hasattr(dataset, "datasets"):
        return [part for d in dataset.datasets for part in parts(path, d)]
    return [StoredFrames(str(getattr(dataset, "file_path", path)), dataset)]
