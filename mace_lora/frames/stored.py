"""Frames in HDF5 and LMDB files, which mace-torch reads one by one while it trains.

They are looked through before training as those of .xyz files are. mace-torch's data sets turn each
frame into a graph at once; they are asked for the frame itself.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol, TypeVar

import ase

from mace_lora.errors import ConfigError, DataError
from mace_lora.frames.keys import ALIASES
from mace_lora.upstream import library
from mace_lora.upstream import names as upstream
from mace_lora.upstream.graphs import Configuration, Graphs

# Of a larger data set so many frames are looked at, evenly spread
MOST_FRAMES = 20_000
# In the place of mace-torch's AtomicData: the frame as it was read
_AS_READ = SimpleNamespace(from_config=lambda config, **_: config)


T = TypeVar("T")


class StoredData(Protocol):
    """A data set of mace-torch's: frames as they were read, if `atomic_dataclass` keeps them so."""

    atomic_dataclass: object

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Configuration | None: ...


class StoredFrames:
    """The frames of one HDF5 file, or of the LMDB files of one data set.

    Args:
        path: the file.
        dataset: mace-torch's data set of it.
    """

    def __init__(self, path: str, dataset: StoredData) -> None:
        self.path = path
        self.keys: dict[str, str] = {}
        self._dataset = copy.copy(dataset)
        self._dataset.atomic_dataclass = (
            _AS_READ  # of HDF5Dataset; LMDBDataset has it in its module
        )
        self._step = -(-len(dataset) // MOST_FRAMES)

    def __len__(self) -> int:
        """All frames, also those that `__iter__` passes over."""
        return len(self._dataset)

    def __iter__(self) -> Iterator[Configuration]:
        if self._step > 1:
            logging.info(
                f"{self.path} holds {len(self._dataset)} frames: every {self._step}th is looked at"
            )
        for i in range(0, len(self._dataset), self._step):
            yield self._frame(i)

    def _frame(self, i: int) -> Configuration:
        try:
            with upstream.substituted({"graph_of_lmdb": _AS_READ}):
                frame: Configuration | None = self._dataset[i]
        except Exception as error:  # whatever h5py and lmdb raise for a damaged file
            raise DataError(
                f"{self.path}, frame {i} can't be read: {type(error).__name__}: {error}"
            ) from error
        if frame is None:  # mace-torch has printed why
            raise DataError(f"{self.path}, frame {i} can't be read")
        return frame

    def place(self, number: int) -> str:
        """0-based, in the order of the data set."""
        return str(number * self._step)

    def called(self, label: str) -> str:
        return label

    def remedy(self, label: str) -> str:
        found = sorted(k for k, v in self._frame(0).properties.items() if v is not None)
        return (
            f"(there are {', '.join(found) or 'no labels'}): write the file again with it; "
            f"mace_prepare_data has the flag --{label}_key"
        )

    def may_hold(self, label: str) -> bool:
        del label  # the preparation has kept what it was told to keep
        return True


def check_flags(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: a folder without data; HDF5 or LMDB together with what mace-torch reads from
            .xyz alone: elements, validation and test frames.
    """
    trained = is_stored("train_file", args.train_file)
    validated = is_stored("valid_file", args.valid_file)
    if is_stored("test_file", args.test_file) or (trained and args.test_file):
        raise ConfigError(
            f"--test_file={args.test_file}: mace-torch takes HDF5 from the folder --test_dir "
            "alone, and .xyz files only if it trains on .xyz files"
        )
    if args.test_dir is not None and not test_files(args.test_dir):
        raise ConfigError(f"--test_dir={args.test_dir}: there are no HDF5 files (.h5) in it")
    args.multi_processed_test = False  # where mace-torch fails; all files are found without it
    if not trained or args.heads:
        return
    file = f"--train_file={args.train_file}"
    if not validated:
        raise ConfigError(f"{file}: beside HDF5 or LMDB give such a --valid_file, too")
    if args.atomic_numbers is None and not args.statistics_file:
        raise ConfigError(
            f"{file}: for HDF5 and LMDB give --statistics_file, as "
            "mace_prepare_data --compute_statistics writes it, or --atomic_numbers='[1, 6, 8]'"
        )


def is_stored(flag: str, path: object) -> bool:
    """Whether mace-torch reads a file or folder frame by frame; only a text can be one.

    Raises:
        ConfigError: a folder without data.
    """
    if not isinstance(path, str):
        return False
    try:
        return not library.reads_with_ase(path)
    except RuntimeError:
        raise ConfigError(f"--{flag}={path}: a folder without HDF5 or LMDB files") from None


def test_files(folder: str | None) -> list[str]:
    """The HDF5 files of `--test_dir`: those called *_test.h5, or all where none is called so.

    mace-torch looks for such names alone, which `mace_prepare_data` doesn't give: it evaluates none
    of them, in silence.
    """
    if folder is None:
        return []
    found = sorted(str(f) for end in ("h5", "hdf5") for f in Path(folder).rglob(f"*.{end}"))
    return [f for f in found if f.endswith("_test.h5")] or found


@dataclass(frozen=True)
class Statistics:
    """What `mace_prepare_data --compute_statistics` has found of a training set.

    Attributes:
        atomic_numbers: the elements.
        energies: E0s by atomic number, eV; those are missing that the frames didn't tell, where
            some lack an energy.
        mean, std: of the energy per atom beside the E0s, eV.
        avg_num_neighbors: of an atom.
    """

    atomic_numbers: list[int]
    energies: dict[int, float]
    mean: float
    std: float
    avg_num_neighbors: float

    @classmethod
    def read(cls, path: str) -> Statistics:
        """
        Raises:
            ConfigError: there is no such file, or something else in it.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            energies = content["atomic_energies"]
            if energies.endswith(".json"):
                energies = str(json.loads(Path(energies).read_text(encoding="utf-8")))
            return cls(
                [int(z) for z in ast.literal_eval(str(content["atomic_numbers"]))],
                {
                    int(z): float(e)
                    for z, e in ast.literal_eval(_plain(energies)).items()
                    if e is not None
                },
                *(content[name] for name in ("mean", "std", "avg_num_neighbors")),
            )
        except (OSError, KeyError, TypeError, ValueError, SyntaxError, AttributeError) as error:
            raise ConfigError(
                f"--statistics_file={path} can't be used ({type(error).__name__}: {error}): a file "
                "is needed as mace_prepare_data --compute_statistics writes it"
            ) from error


def _plain(numbers: str) -> str:
    """Numbers as numpy 2 prints them, np.int64(6) and np.float64(-1.5), without numpy's names.

    None stands for those that are not finite, which Python can't write.
    """
    return re.sub(r"-?\b(nan|inf)\b", "None", re.sub(r"np\.\w+\(([^()]*)\)", r"\1", numbers))


def frame_of_lmdb(atoms: ase.Atoms, **keywords: object) -> Configuration:
    """mace-torch's Configuration of a frame in LMDB, its charge and spin under any evident name."""
    for name, aliases in ALIASES.items():
        present = [key for key in aliases if atoms.info.get(key) is not None]
        if present and name not in present:
            atoms.info[name] = atoms.info[present[0]]
    frame: Configuration = upstream.original("frame_of_lmdb")(atoms, **keywords)
    return frame


def parts(path: str, dataset: StoredData) -> list[StoredFrames]:
    """The files of a data set: a folder of HDF5 files is several."""
    if hasattr(dataset, "datasets"):
        return [part for d in dataset.datasets for part in parts(path, d)]
    return [StoredFrames(str(getattr(dataset, "file_path", path)), dataset)]


def open_hdf5(path: str, graphs: Graphs, **keywords: object) -> StoredData:
    """mace-torch's data set of an HDF5 file, with our graphs."""
    dataset: StoredData = upstream.original("hdf5")(path, **keywords)
    return mended(dataset, graphs)


def mended(dataset: T, graphs: Graphs) -> T:
    """`dataset`, or the HDF5 files in it, with our graphs, and with all of their frames.

    `mace_prepare_data` marks files of an odd number of frames (`drop_last`), so that mace-torch
    leaves the last batch out of a test: all of a small file.
    """
    for part in getattr(dataset, "datasets", [dataset]):
        if hasattr(part, "atomic_dataclass"):
            part.atomic_dataclass, part.drop_last = graphs, False
    return dataset
