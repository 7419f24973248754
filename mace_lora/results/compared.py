"""Errors before and after a run, on its training, validation and test frames."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from prettytable import PrettyTable

from mace_lora.frames.keys import DEFAULTS
from mace_lora.frames.units import Units
from mace_lora.results.evaluation import UNITS, Errors, errors, predict_values
from mace_lora.results.labelled import LabelledFrames, Values, frames_of, read_frames, with_inputs
from mace_lora.upstream import predicting
from mace_lora.upstream.answers import MOST_FRAMES, Answers
from mace_lora.upstream.inputs import inputs_of
from mace_lora.upstream.types import Dataset

TRAINING, VALIDATION, TEST = "training", "validation", "test"


@dataclass(frozen=True)
class Compared:
    """One set of frames of one head, and what the model predicts before and after the run."""

    kind: str  # TRAINING, VALIDATION or TEST
    head: str
    name: str
    frames: LabelledFrames
    before: Values
    after: Values

    @cached_property
    def rows(self) -> list[tuple[Errors, Errors]]:
        """Errors before and after: of all frames, by configuration type and by element."""
        both = errors(self.frames, self.before), errors(self.frames, self.after)
        return list(zip(*both, strict=True))

    def offset(self) -> tuple[float, float]:
        """Mean and RMSE of the energies after the run, meV per atom; NaN without labels."""
        left = 1e3 * (self.after.energy - self.frames.labels.energy)
        left = left[np.isfinite(left)]
        return (left.mean(), np.sqrt((left**2).mean())) if left.size else (np.nan, np.nan)


def compare(
    args: argparse.Namespace,
    start: torch.nn.Module,
    model: torch.nn.Module,
    train_sets: Mapping[str, Dataset],
    valid_sets: Mapping[str, Dataset],
    units: Units,
    answers: tuple[Answers, Answers] | None = None,
) -> list[Compared]:
    """Predict the frames of a run, at most MOST_FRAMES of each set, with its start and its result.

    Args:
        args: the parsed flags.
        start: what was trained, before training.
        model: the merged model.
        train_sets, valid_sets: by head.
        units: of the labels in the test file.
        answers: what start and result have predicted so far.
    """
    both = list(zip((start, model), answers or (Answers(), Answers()), strict=True))
    found = []
    for kind, head, frames in _labelled(args, model, train_sets, valid_sets, units):
        known = with_inputs(frames, inputs_of(model))
        before, after = (
            predict_values(m, known, [head] * len(known.atoms), answers=so_far)
            for m, so_far in both
        )
        found.append(Compared(kind, head, known.name, known, before, after))
    return found


def _labelled(
    args: argparse.Namespace,
    model: torch.nn.Module,
    train_sets: Mapping[str, Dataset],
    valid_sets: Mapping[str, Dataset],
    units: Units,
) -> list[tuple[str, str, LabelledFrames]]:
    found = []
    for kind, sets in ((TRAINING, train_sets), (VALIDATION, valid_sets)):
        for head, dataset in sets.items():
            atoms = predicting.atoms_of(dataset, model, MOST_FRAMES)
            if atoms:
                name = kind if len(sets) == 1 else f"{kind}, {head}"
                found.append((kind, head, frames_of(atoms, name)))
    if isinstance(args.test_file, str) and args.test_file.endswith(".xyz"):
        test = read_as_flagged(args, args.test_file, units, MOST_FRAMES)
        found.append((TEST, list(valid_sets)[-1], test))
    return found


def read_as_flagged(
    args: argparse.Namespace, path: str, units: Units, most: int | None = None
) -> LabelledFrames:
    """Frames of a file under the keys and in the units that the flags of a run say."""
    asked = {q: getattr(args, f"{q}_key", key) for q, key in DEFAULTS.items()}
    return read_frames(path, asked, most=most, factors=units.factors(path))


def table(sets: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: RMSE of each set, `before -> after` for each quantity with labels."""
    all_of = [(s.name, *s.rows[0]) for s in sets]
    used = [q for q in UNITS if any(q in after.rmse for _, _, after in all_of)]
    heading = ["RMSE", "frames", *(f"{q}, {UNITS[q]}" for q in used)]
    rows = [
        [name, str(after.count), *(before_after(before, after, q) for q in used)]
        for name, before, after in all_of
    ]
    return heading, rows


def before_after(before: Errors, after: Errors, quantity: str) -> str:
    """`before → after`, RMSE in UNITS; "" without labels."""
    if quantity not in after.rmse:
        return ""
    return f"{before.rmse[quantity]:.1f} → {after.rmse[quantity]:.1f}"


def as_text(sets: Sequence[Compared]) -> str:
    """The table for a log."""
    heading, rows = table(sets)
    text = PrettyTable(heading)
    text.align = "r"
    text.align["RMSE"] = "l"
    text.add_rows(rows)
    return str(text)
