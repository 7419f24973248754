"""What is known of a run, stage by stage.

mace-torch's script calls our functions in a fixed order. Each stage is written by one of them, and
those that come later read it: see `run` for the order.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from mace_lora.config import AdapterConfig
from mace_lora.errors import WriteError
from mace_lora.model.description import Description
from mace_lora.model.report import InjectionReport
from mace_lora.results.compared import Compared
from mace_lora.results.progress import History
from mace_lora.training.options import RunOptions
from mace_lora.training.recipes import Choice
from mace_lora.upstream.answers import Answers
from mace_lora.upstream.types import Dataset


class StageNotReached(AttributeError):
    """A fault of the program: something of a run is read before it is known."""


@dataclass(frozen=True)
class Asked:
    """What the user asked for."""

    args: argparse.Namespace  # mace-torch's flags; its script fills some in on the way
    config: AdapterConfig
    options: RunOptions
    given: dict[str, object] = field(init=False)  # the flags before the script began

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", dict(vars(self.args)))


@dataclass(frozen=True)
class Started:
    """The models that the run started from, as `describe` gives them, with their fingerprints.

    Attributes:
        base: the foundation model, with its name and the head taken from it.
        start: the model with the elements, E0s and heads of this run, before the adapter.
    """

    base: Description
    start: Description


@dataclass
class Progress:
    """Where a run stands: plain numbers, stored in each checkpoint."""

    epoch: int = 0  # that is being trained
    steps: int = 0  # batches of it that are done
    valid_loss: float = math.inf  # of the last validation
    initial_loss: float = math.inf  # of the validation before any training
    lowest_loss: float = math.inf  # of this stage
    without_improvement: int = 0  # validations since then
    stage_two: bool = False  # whether stage two (`--swa`) has begun
    backend: str = ""  # what computes the steps of this run, see `computing`


@dataclass(frozen=True)
class Trained:
    """The epochs have begun; history and progress grow until they are over."""

    n_frames: int  # in the training set
    train_sets: dict[str, Dataset]  # by head
    valid_sets: dict[str, Dataset]
    history: History = field(default_factory=History)  # empty but in the first process
    at: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Saved:
    """The first process has merged the adapter; again after stage two (`--swa`)."""

    model: torch.nn.Module
    lost: WriteError | None = None  # what could not be written, and the script went on without


class Run:
    """One run with an adapter. What belongs to a stage has no value before (see `hasattr`).

    Attributes:
        files: that frames were read from, so far.
        chosen: the flags that were not given, at what suits the run.
        evaluated: the data sets of mace-torch's tables at the end, with their errors.
        before, after: what the start and the result predict, as far as somebody has asked.
        estimated: the heads whose E0s were estimated, by none but the foundation model's answers.
        foundation: the foundation model as it was loaded, with all its heads and elements.
        unadapted: the model of the start, a copy, plain layers with the E0s of the start.
        injected: says what the adapter changes in the model.
        compared: frames with predictions before and after.
        judged: the verdict, a sentence each.
        began: when, of `time.monotonic`.
    """

    foundation: torch.nn.Module
    started: Started
    unadapted: torch.nn.Module
    injected: InjectionReport
    trained: Trained
    saved: Saved

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.began = time.monotonic()
        self.files: list[str] = []
        self.evaluated: list[tuple[Dataset, Mapping[str, float]]] = []
        self.before, self.after = Answers(), Answers()
        self.estimated: set[str] = set()
        self.compared: list[Compared] = []
        self.judged: list[str] = []
        self.chosen: dict[str, Choice] = dict(asked.options.chosen)

    def __getattr__(self, name: str) -> NoReturn:
        known = ", ".join(vars(self))
        raise StageNotReached(f"this run has not come to {name!r}; it knows {known}")
