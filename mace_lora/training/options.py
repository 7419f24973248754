"""Options of a training run with an adapter, beside mace-torch's own. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from mace_lora.adapters.options import option
from mace_lora.backends.registry import AUTO, CHOICES, describe
from mace_lora.errors import ConfigError, did_you_mean
from mace_lora.frames.units import HELP, Units
from mace_lora.upstream.known import TRUST_HELP

CONSTANT, COSINE = "constant", "cosine"


@dataclass(frozen=True)
class RunOptions:
    """Options of a training run with an adapter that mace-torch doesn't have.

    Each is a flag, but for `chosen`: the flags that a preset has set, with their values.
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
    protect: bool = option(
        False,
        "keep the start's behaviour where the training frames say nothing: its forces on pairs of "
        "atoms from contact to 3 A and on distorted training frames, at up to half again the time",
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
        f"how steps and evaluations are computed, with the same results: {describe()}",
        choices=CHOICES,
    )
    trust: bool = option(False, TRUST_HELP)
    chosen: Mapping[str, object] = field(default_factory=dict)

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
        if not self.checkpoint_seconds >= 0:
            raise ConfigError(f"--checkpoint_seconds={self.checkpoint_seconds}: 0 or more")
        Units.parse(self.units)

    @classmethod
    def flags(cls) -> tuple[Field[Any], ...]:
        return tuple(f for f in fields(cls) if "help" in f.metadata)
