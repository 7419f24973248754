"""Options of a training run with an adapter, beside mace-torch's own. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from mace_lora.adapters.options import option
from mace_lora.backends.registry import AUTO, CHOICES, describe
from mace_lora.errors import ConfigError, did_you_mean
from mace_lora.frames.units import HELP, Units
from mace_lora.training import recipes
from mace_lora.training.recipes import Choice
from mace_lora.upstream.known import TRUST_HELP

CONSTANT, COSINE = "constant", "cosine"


@dataclass(frozen=True)
class RunOptions:
    """Options of a training run with an adapter that mace-torch doesn't have.

    Each is a flag, but for `chosen`: the flags that were set to what suits, `given`: those that the
    user gave, `argv`: the command line, without the program, and `again`: how to go on after an
    interruption, where that is no command line.
    """

    adapter_start: str | None = option(
        None,
        "an adapter directory to continue from: its factors are the start, and its method and "
        "options hold unless a flag says otherwise",
        type=str,
        metavar="DIR",
    )
    warmup_steps: int = option(
        0, "number of optimiser steps over which the learning rate rises linearly to --lr"
    )
    schedule: str = option(
        CONSTANT,
        "how the learning rate falls over the run, beside what --scheduler does: not at all, or "
        "as a cosine from --lr to 0",
        choices=(CONSTANT, COSINE),
    )
    accumulate: int = option(
        1,
        "batches per optimiser step: the effect of a batch that many times larger, in the memory "
        "of one",
    )
    batch_atoms: int = option(
        0,
        "batches of as many frames as have at most so many atoms in all, for training and "
        "validation, instead of --batch_size (given as well, it is the most frames); a larger "
        "frame is a batch of its own; 0: by --batch_size",
    )
    batch_edges: int = option(
        0, "the same by edges, pairs of atoms within the cutoff, which memory and time follow"
    )
    protect: bool = option(
        False,
        "keep the start's behaviour where the training frames say nothing: its forces on pairs of "
        "atoms from contact to 3 A and on distorted training frames, at up to half again the time",
    )
    solve_e0s: bool = option(
        False,
        "solve E0s that were estimated again at each validation, on training frames, so that "
        "energies keep their mean while forces are learnt",
    )
    members: int = option(
        1,
        "train a committee of so many adapters, which differ in their seeds, one after the other: "
        "its spread tells how far predictions are to be trusted",
    )
    bootstrap: bool = option(
        False, "with --members: each sees frames of its own, drawn with replacement"
    )
    checkpoint_seconds: float = option(
        600.0, "seconds between checkpoints within a long epoch; 0: one after each step"
    )
    units: str | None = option(None, HELP, type=str)
    check: bool = option(
        True,
        "compare some labels of each file with what the foundation model predicts: a mistaken unit "
        "or sign ends the run before it begins (mace_lora check says more)",
    )
    step: str = option(
        AUTO,
        f"how steps and evaluations are computed, with the same results: {describe()}. Without an "
        "adapter, and from random numbers as well, it is mace-torch's own unless this is given",
        choices=CHOICES,
    )
    defaults: str = option(
        recipes.OURS,
        "where flags that are not given take their values from: what suits a fine-tuning, as the "
        "log shows, or mace-torch",
        choices=(recipes.OURS, recipes.MACE_TORCH),
    )
    trust: bool = option(False, TRUST_HELP)
    overwrite: bool = option(
        False, "replace a .model file of this --name that a run with other flags has made"
    )
    chosen: Mapping[str, Choice] = field(default_factory=dict)
    given: Mapping[str, object] = field(default_factory=dict)
    argv: tuple[str, ...] = ()
    again: str = ""

    def __post_init__(self) -> None:
        if self.step not in CHOICES:
            raise ConfigError(f"--step={self.step}: {did_you_mean(self.step, CHOICES)}")
        if self.schedule not in (CONSTANT, COSINE):
            raise ConfigError(
                f"--schedule={self.schedule}: {did_you_mean(self.schedule, (CONSTANT, COSINE))}"
            )
        if self.warmup_steps < 0:
            raise ConfigError(f"--warmup_steps={self.warmup_steps}: 0 or more is needed")
        if self.accumulate < 1:
            raise ConfigError(f"--accumulate={self.accumulate}: 1 or more is needed")
        for name in ("batch_atoms", "batch_edges"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"--{name}={getattr(self, name)}: how many {name[6:]} a batch may have is "
                    "needed, or 0 for batches by --batch_size"
                )
        if self.batch_atoms and self.batch_edges:
            raise ConfigError(
                f"--batch_atoms={self.batch_atoms} and --batch_edges={self.batch_edges}: give one "
                "of them (edges are what memory follows)"
            )
        if self.members < 1:
            raise ConfigError(f"--members={self.members}: 1 or more is needed")
        if self.bootstrap and self.members == 1:
            raise ConfigError("--bootstrap is for committees: give --members=4, say")
        if not self.checkpoint_seconds >= 0:
            raise ConfigError(f"--checkpoint_seconds={self.checkpoint_seconds}: 0 or more")
        Units.parse(self.units)

    @property
    def by_size(self) -> tuple[str, int] | None:
        """What batches are cut by, "atoms" or "edges", and the most of them; None: by frames."""
        if self.batch_atoms:
            return "atoms", self.batch_atoms
        return ("edges", self.batch_edges) if self.batch_edges else None

    @property
    def left_to_data(self) -> frozenset[str]:
        """Flags that the training frames decide."""
        ours = self.defaults == recipes.OURS
        found = recipes.left_to_data(self.given) if ours else frozenset()
        return found - {"batch_size", "valid_batch_size"} if self.by_size else found

    @classmethod
    def flags(cls) -> tuple[Field[Any], ...]:
        return tuple(f for f in fields(cls) if "help" in f.metadata)
