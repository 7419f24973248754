"""The frames of a run: read, checked, and made graphs, whichever files they come from."""

from __future__ import annotations

import argparse
import ast
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias, TypeVar

import torch

from mace_lora.check.before import before_training
from mace_lora.errors import ConfigError, DataError
from mace_lora.frames import checks, stored
from mace_lora.frames.checks import Rules, symbols
from mace_lora.frames.energies import AtomicEnergies
from mace_lora.frames.reading import XyzFrames
from mace_lora.frames.stored import StoredData, StoredFrames
from mace_lora.frames.units import Units
from mace_lora.model.description import atomic_numbers
from mace_lora.training.epochs import processes
from mace_lora.training.options import RunOptions
from mace_lora.upstream import graphs, library
from mace_lora.upstream import names as upstream
from mace_lora.upstream.answers import Answers
from mace_lora.upstream.graphs import Configuration, Graphs, KeySpecification
from mace_lora.upstream.inputs import inputs_of
from mace_lora.upstream.types import ElementTable, Graph, HeadConfig

T = TypeVar("T")
# A data set that is read frame by frame, or all frames of a file that ASE reads
Loaded: TypeAlias = StoredData | list[Graph]
_FOUNDATION = "the foundation model"
_REPLAY = "pt_head"  # mace-torch's name of the head that replays


class Data:
    """Our functions for the data of a run.

    Args:
        args: the run's flags.
        loaded: gives the foundation model once it is loaded.
        files: to which those are added that frames were read from, as ASE reads them.
        estimated: to which the heads are added whose E0s are estimated.
        options: of the run: the units of the files, whether labels are checked, and what suits.
        answers: what the foundation model predicts.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        loaded: Callable[[], torch.nn.Module | None] = lambda: None,
        files: list[str] | None = None,
        estimated: set[str] | None = None,
        options: RunOptions | None = None,
        answers: Answers | None = None,
    ) -> None:
        self.args = args
        self._answers = answers or Answers()
        self._units = Units.parse(options.units if options else None)
        self._checks_units = options is not None and options.check
        self.energies = AtomicEnergies(lambda: bool(args.foundation_model_elements), self._answers)
        self.has_isolated_atoms = False  # which give the E0s, whatever --E0s says
        self._files = [] if files is None else files
        self._estimated = set() if estimated is None else estimated
        self._loaded = loaded
        # a stress is trained on where there is one, whatever the loss is so far
        self._welcome_stress = options is not None and "loss" in options.left_to_data
        self.train_frames: list[Configuration] = []  # that ASE read, before some are split off
        self.other_frames: list[Configuration] = []  # that ASE read to validate and to test
        self.n_train = self.n_train_atoms = 0  # frames to train on, before some are split off
        self._one_head: torch.nn.Module | None = None
        self._graphs = Graphs()
        self._looked_through: set[str] = set()
        self._lacking: dict[str, str] = {}  # of the training files: label -> what to say
        self._labelled: set[str] = set()  # labels that some training file has

    def foundation(self) -> torch.nn.Module | None:
        """The foundation model, with the one head that goes on, once it is loaded."""
        return self._one_head or self._loaded()

    def substitutes(self) -> dict[str, object]:
        """Our functions by key of `substitutions.ROWS`."""
        makers = ("graphs", "graph_of_replay", "graph_of_lmdb")
        return {
            **dict.fromkeys(makers, self._graphs),
            "items": graphs.items,
            "load_xyz": self.load_xyz,
            "load_stored": self.load_stored,
            "frame_of_lmdb": stored.frame_of_lmdb,
            "hdf5": self.open_hdf5,
            "test_files": lambda dir_path, suffix: stored.test_files(dir_path),
            "head_config": self.head_config,
            "remove_head": self.remove_head,
            "split": split,
            "atomic_energies": self.energies.read,
            "estimate_e0s": self.energies.estimate,
        }

    def known_elements(self) -> set[int] | None:
        """Atomic numbers of the foundation model, once it is loaded."""
        model = self.foundation()
        return None if model is None else set(atomic_numbers(model))

    def _rules(self, who: str, known: set[int] | None, labelled: bool = True) -> Rules:
        needed, welcome = checks.counted(self.args) if labelled else ([], [])
        model = self.foundation()
        self._graphs.padded = graphs.is_long_range(str(self.args.model)) or (
            model is not None and graphs.sees_cells(model)
        )
        return Rules(
            known=None if known is None else (who, known),
            needed=needed,
            welcome=welcome,
            cutoff=float(self.args.r_max),
            padded=self._graphs.padded,
            inputs={} if model is None else inputs_of(model),
        )

    def remove_head(
        self, model: torch.nn.Module, head_to_keep: str | None = None
    ) -> torch.nn.Module:
        """Upstream takes one head of a foundation model with several, which goes on alone."""
        alone: torch.nn.Module = upstream.original("remove_head")(model, head_to_keep)
        self._one_head = alone
        return alone

    # ------------------------------------------------------------------ elements and E0s

    def head_config(
        self, head: dict[str, object], head_name: str, args: argparse.Namespace
    ) -> HeadConfig:
        """Upstream's settings of one head: E0s that were asked for are those of the run.

        Upstream puts the E0s of a statistics file in their place, and fits none to frames that it
        reads one by one.
        """
        config: HeadConfig = upstream.original("head_config")(head, head_name, args)
        if config.statistics_file is not None and head_name != _REPLAY:
            found = stored.Statistics.read(config.statistics_file)
            config.mean, config.std = found.mean, found.std
            config.avg_num_neighbors, config.compute_avg_num_neighbors = (
                found.avg_num_neighbors,
                False,
            )
            config.atomic_numbers = str(found.atomic_numbers)
            if config.E0s is None:
                lacking = sorted(set(found.atomic_numbers) - found.energies.keys())
                if lacking:
                    raise ConfigError(
                        f"--statistics_file={config.statistics_file} has no E0 of "
                        f"{symbols(lacking)}: mace_prepare_data fits none where frames lack an "
                        "energy; give --E0s=estimated"
                    )
                config.E0s = str(found.energies)
            logging.info(f"Elements from {config.statistics_file}, E0s={config.E0s}")
            config.statistics_file = None
        if str(config.E0s).lower() == "estimated":
            self._estimated.add(head_name)
        files = [config.train_file] if isinstance(config.train_file, str) else config.train_file
        one_by_one = [file for file in files if stored.is_stored("train_file", file)]
        fits = bool(one_by_one) and str(config.E0s).lower() in ("estimated", "average")
        counts = config.atomic_numbers is not None and head_name != _REPLAY
        parts = self._parts(config, one_by_one) if one_by_one and (fits or counts) else []
        if counts:
            for part in parts:
                first = next(iter(part), None)
                self._count(len(part), len(part) * (0 if first is None else _atoms(first)))
        if fits:
            config.E0s = str(self._fitted(config, parts))
        return config

    def _fitted(self, head: HeadConfig, parts: list[StoredFrames]) -> dict[int, float]:
        """E0s from frames in HDF5 and LMDB; --E0s of the head says which."""
        table = library.elements(ast.literal_eval(str(head.atomic_numbers)))
        frames = [frame for part in parts for frame in part]
        if (asked := str(head.E0s)).lower() == "average":
            return self.energies.read(asked, frames, table)
        model = self.foundation()
        if model is None:
            raise ConfigError("--E0s=estimated: there is no foundation model to estimate them from")
        return self.energies.estimated(model, frames, table, self.args.device)

    def _parts(self, head: HeadConfig, files: list[str]) -> list[StoredFrames]:
        """The frames of HDF5 and LMDB files, as they stand there."""
        table = library.elements(ast.literal_eval(str(head.atomic_numbers)))
        settings = {"r_max": self.args.r_max, "z_table": table, "heads": [head.head_name]}
        load = upstream.original("load_stored")
        opened = {file: load(file_path=file, head_config=head, **settings) for file in files}
        return [part for file, data in opened.items() for part in stored.parts(file, data)]

    # ------------------------------------------------------------------ files that ASE reads

    def load_xyz(
        self,
        file_path: str,
        key_specification: KeySpecification,
        head_name: str = "Default",
        config_type_weights: Mapping[object, float] | None = None,
        extract_atomic_energies: bool = False,
        keep_isolated_atoms: bool = False,
        no_data_ok: bool = False,
    ) -> tuple[dict[int, float], list[Configuration]]:
        """E0s of isolated atoms, and the frames of a file.

        In the place of upstream's, which trains labels that lack under ASE's own keys as 0, takes
        forces with constraints applied, and 0 for E0s where it finds no energy.
        """
        # without labels where the foundation model gives them
        rules = self._rules(_FOUNDATION, self.known_elements(), labelled=not no_data_ok)
        frames = XyzFrames(
            file_path,
            graphs.key_names(key_specification),
            head_name,
            config_type_weights,
            wanted=() if no_data_ok else self._wanted(rules),
            inputs=rules.inputs,
            factors=self._factors(file_path, head_name),
        )
        if extract_atomic_energies:
            frames.set_isolated_aside(keep=keep_isolated_atoms)
            if frames.energies:  # they are the E0s, whatever --E0s says
                self.has_isolated_atoms = True
                self._estimated.discard(head_name)
        for frame in frames.configurations:
            frame.weight *= self._replay_weight(file_path, head_name)
        self._files.append(file_path)
        lacking = checks.check(frames, rules)
        model = self.foundation()
        if self._checks_units and model is not None and not no_data_ok:
            labels = (*rules.needed, *rules.welcome)
            before_training(frames, model, labels, self.args.foundation_head, self._answers)
        if extract_atomic_energies:  # these are frames to train on
            self._remember(lacking, rules)
            self._count(len(frames.configurations), sum(map(_atoms, frames.configurations)))
            self.train_frames += frames.configurations
        else:
            self.other_frames += frames.configurations
        return frames.energies, frames.configurations

    def _wanted(self, rules: Rules) -> tuple[str, ...]:
        welcome = ("stress",) if self._welcome_stress else ()
        return ("energy", "forces", *rules.needed, *rules.welcome, *welcome)

    def _count(self, frames: int, atoms: int) -> None:
        self.n_train += frames
        self.n_train_atoms += atoms

    def _factors(self, path: str, head: str) -> dict[str, float]:
        """What `--units` says of a file; one of replay, which others wrote, must be named."""
        factors = self._units.factors(path, alone=head == _REPLAY)
        if factors:
            said = ", ".join(f"{label} by {factor:.6g}" for label, factor in factors.items())
            logging.info(f"{path}: labels are multiplied (--units): {said}")
        return factors

    def _replay_weight(self, path: str, head: str) -> float:
        """`--weight_pt_head` for files that the user gives for replay, 1 for all others.

        mace-torch writes it into the replay data that it downloads, and forgets it for others.
        """
        args = self.args
        if head != _REPLAY or not args.multiheads_finetuning:
            return 1.0
        given = (args.pt_train_file, args.pt_valid_file)
        return float(args.weight_pt_head) if path in given else 1.0

    def _remember(self, lacking: dict[str, str], rules: Rules) -> None:
        self._lacking |= lacking
        self._labelled |= set(rules.needed) - lacking.keys()

    def refuse_missing_labels(self) -> None:
        """Raises DataError where the loss needs a label that no training frame has at all."""
        for label, sentence in self._lacking.items():
            if label not in self._labelled:
                raise DataError(f"{sentence}; or train without it: --{label}_weight=0")

    # ------------------------------------------------------------------ HDF5 and LMDB

    def load_stored(
        self,
        file_path: str | Path | list[str],
        r_max: float,
        z_table: ElementTable,
        heads: list[str],
        head_config: HeadConfig,
        collection: object = None,
    ) -> Loaded:
        """mace-torch's `load_dataset_for_path`, and a check of the frames that it reads later."""
        numbers = {int(z) for z in z_table.zs}
        refuse_unknown(numbers, self.known_elements() or numbers)

        if self._replay_weight(str(file_path), head_config.head_name) != 1:
            raise ConfigError(
                f"--weight_pt_head={self.args.weight_pt_head}: frames in HDF5 and LMDB keep the "
                "weights that they were written with; give replay frames in extended xyz"
            )
        for test in set(stored.test_files(head_config.test_dir)) - self._looked_through:
            self._looked_through.add(test)
            settings = {"r_max": r_max, "z_table": z_table, "head": head_config.head_name}
            self._look_through(test, partial(self.open_hdf5, test, **settings), numbers)
        original = upstream.original("load_stored")
        load = partial(original, file_path, r_max, z_table, heads, head_config, collection)
        return self._look_through(str(file_path), load, numbers)

    def open_hdf5(self, file_path: str, **keywords: object) -> StoredData:
        """mace-torch's `HDF5Dataset`."""
        return stored.open_hdf5(file_path, self._graphs, **keywords)

    def _look_through(self, path: str, load: Callable[[], Loaded], numbers: set[int]) -> Loaded:
        """What `load` gives, checked; a list comes from .xyz, which was checked when read."""
        try:
            dataset = load()
        except Exception as error:  # of h5py, lmdb and ASE
            raise DataError(f"{path} can't be read: {type(error).__name__}: {error}") from error
        if not isinstance(dataset, list):
            rules = self._rules("this run (--atomic_numbers, or the statistics file)", numbers)
            for part in stored.parts(path, dataset):
                checks.check(part, rules)
        return stored.mended(dataset, self._graphs)


def _atoms(frame: Configuration) -> int:
    return len(frame.atomic_numbers)


def refuse_unknown(asked: set[int], known: set[int]) -> None:
    """Raises ConfigError for elements of a run that its foundation model doesn't know."""
    if not asked <= known:
        raise ConfigError(
            "the elements of this run (--atomic_numbers, or the statistics file) include "
            f"{symbols(sorted(asked - known))}; {_FOUNDATION} knows {symbols(sorted(known))}"
        )


def split(
    items: list[T],
    valid_fraction: float,
    seed: int,
    work_dir: str,
    *rest: object,
    **keywords: object,
) -> tuple[list[T], list[T]]:
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
    with ExitStack() as stack:
        if not processes.is_first():  # it writes the indices down
            work_dir = stack.enter_context(TemporaryDirectory())
        parts: tuple[list[T], list[T]] = original(
            items, valid_fraction, seed, work_dir, *rest, **keywords
        )
        return parts
