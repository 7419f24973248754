"""Flags that suit the frames of a run: chosen once those are read, and told."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml
from prettytable import PrettyTable

from mace_lora.files import whole_file
from mace_lora.training import recipes
from mace_lora.training.data import Data
from mace_lora.training.epochs import processes
from mace_lora.training.epochs.sizes import Limit
from mace_lora.training.recipes import Choice
from mace_lora.training.record import Run
from mace_lora.upstream import graphs, logs, predicting
from mace_lora.upstream.graphs import Configuration

# Frames on which edges per atom are counted, before all of them become graphs
FEW_FRAMES = 8
EDGES_PER_ATOM = 50  # of files that aren't read at once


@dataclass(frozen=True)
class Suiting:
    """Our function between reading frames and making batches of them."""

    run: Run
    data: Data

    def energies_as_array(self, input_data: object, heads: list[str]) -> npt.NDArray[np.float64]:
        """Upstream's `dict_to_array`, which is called when the frames are known."""
        if self.run.asked.options.defaults == recipes.OURS:
            self._suit()
        return self.data.energies.as_array(input_data, heads)

    def _suit(self) -> None:
        args, options = self.run.asked.args, self.run.asked.options
        may = options.left_to_data
        chosen = dict(options.chosen)
        n_frames, n_atoms = self._counted(args)
        if n_frames:
            found = recipes.by_data(
                n_frames, n_atoms, stresses(self.data.train_frames, self.data.other_frames)
            )
            chosen |= _set(args, found, may)
            steps = self._batches(n_frames, n_atoms)
            steps /= processes.count(args.distributed) * options.accumulate
            chosen |= _set(args, recipes.by_steps(max(1, int(steps))), may)
        self.run.chosen = chosen
        if chosen:
            flags = " ".join(f"--{flag}={choice.value}" for flag, choice in chosen.items())
            logging.info(f"Set to what suits (why: see the log file): {flags}")
            logs.to_file(f"Flags that were not given:\n{table(chosen)}")

    def _batches(self, n_frames: int, n_atoms: int) -> float:
        """About how many batches an epoch has."""
        args, options = self.run.asked.args, self.run.asked.options
        limit = Limit.of(args, options)
        if limit is None:
            return float(n_frames / args.batch_size)
        size = n_atoms / n_frames
        if limit.unit == "edges":
            few = list(itertools.islice(self.data.train_frames, FEW_FRAMES))
            graphs = predicting.graphs_of(few, self.run.foundation)
            atoms = sum(len(graph.positions) for graph in graphs)
            size *= sum(map(limit.size, graphs)) / atoms if atoms else EDGES_PER_ATOM
        per_batch: float = min(max(1.0, limit.most / size), limit.frames)
        return n_frames / per_batch

    def _counted(self, args: argparse.Namespace) -> tuple[int, int]:
        """Frames to train on, and atoms in them."""
        frames, atoms = self.data.n_train, self.data.n_train_atoms
        part = 1.0 if args.valid_file else 1 - args.valid_fraction
        return round(part * frames), round(part * atoms)


def _set(
    args: argparse.Namespace, choices: Mapping[str, Choice], may: frozenset[str]
) -> dict[str, Choice]:
    chosen = {flag: choice for flag, choice in choices.items() if flag in may}
    vars(args).update({flag: choice.value for flag, choice in chosen.items()})
    return chosen


def stresses(train: Iterable[Configuration], others: Iterable[Configuration] = ()) -> int:
    """How many training frames have a stress; 0 if a frame that has one is no crystal, be it among
    `others`: such a stress depends on what is taken for its volume.
    """
    having = [[frame for frame in frames if _has_stress(frame)] for frames in (train, others)]
    are_crystals = all(all(graphs.periodic_in(frame)) for frames in having for frame in frames)
    return len(having[0]) if are_crystals else 0


def _has_stress(frame: Configuration) -> bool:
    return frame.properties.get("stress") is not None and not graphs.is_placeholder(frame)


def table(chosen: Mapping[str, Choice]) -> str:
    """Flag, value and why, for the log."""
    made = PrettyTable(["flag", "value", "why"], align="l")
    made.add_rows([[f"--{flag}", choice.value, choice.why] for flag, choice in chosen.items()])
    return made.get_string()


def write(run: Run) -> None:
    """`<name>.yaml` beside the model: the run, for --config, whatever defaults become."""
    args, options = run.asked.args, run.asked.options
    left_out = ("config", "restart_latest")
    own = {flag: value for flag, value in options.given.items() if flag not in left_out}
    chosen = {flag: choice.value for flag, choice in run.chosen.items()}
    own = {"E0s": args.E0s, "seed": args.seed, "default_dtype": args.default_dtype} | own | chosen
    text = "# This run, as mace_run_train --config=FILE repeats it\n" + yaml.safe_dump(
        {flag: value for flag, value in own.items() if value is not None}, sort_keys=False
    )
    path = Path(args.model_dir) / f"{args.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as new:
        Path(new).write_text(text)
