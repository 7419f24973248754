"""Which way a run takes: the one that was asked for, or the one that pays."""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Iterator, Sequence

import torch

from mace_lora.step.base import CannotServe, Way
from mace_lora.step.padding import Shape

# Steps that are timed before "auto" decides; the first ones, which warm up, don't count
TIMED, IGNORED = 12, 4
# The share of a fused step that compiling saves: measured, MACE-OFF23 medium, 5 aspirin frames
COMPILED_SAVES = 0.2
# Compiling must be expected to save this many times what it costs
MARGIN = 2.0


def choose(name: str, shapes: Sequence[Shape] = ()) -> Way:
    """The way called `name` of `config.WAYS`; eager where it can't serve. "auto" begins as fused.

    Args:
        name: a value of `--step`.
        shapes: for the ways that compute batches of fixed shapes.
    """
    if name == "eager":
        return Way()
    # imported here: --help can do without e3nn
    if name == "compile":
        from mace_lora.step.compiled import Compiled

        return Chosen(Compiled(shapes), asked_for=True)
    if name == "cudagraph":
        from mace_lora.step.cudagraph import Captured

        return Chosen(Captured(shapes), asked_for=True)
    from mace_lora.step.fusing import Fused

    return Chosen(Fused(), asked_for=name != "auto")


class Chosen(Way):
    """One way, and eager where it can't serve, with one line in the log that says why."""

    def __init__(self, way: Way, *, asked_for: bool) -> None:
        self.way = way
        self._asked_for = asked_for

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.way.name

    @property
    def caches_weights(self) -> bool:  # type: ignore[override]
        return self.way.caches_weights

    @contextlib.contextmanager
    def active(self, model: torch.nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.way.active(model))
            except CannotServe as reason:
                say = logging.warning if self._asked_for else logging.info
                say(f"--step={self.name} can't serve this run, which goes on in eager: {reason}")
                self.way = Way()
            yield


class Auto:
    """Times the first steps of a run, then decides once whether compiling pays.

    Args:
        steps: in the whole run.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._seconds: list[float] = []

    def is_time(self, seconds: float) -> bool:
        """Told how long each step took; True once, when enough are known."""
        self._seconds.append(seconds)
        return len(self._seconds) == TIMED

    def compiling_pays(self, way: Way, cost: float) -> bool:
        """Whether to go on compiled; says why.

        Args:
            way: that the steps were computed by.
            cost: expected seconds to compile.
        """
        usual = statistics.median(self._seconds[IGNORED:])
        left = max(0, self._steps - TIMED)
        said = f"--step=auto: {way.name}, {usual:.3g} s per step"
        if way.name != "fused":
            logging.info(said)
            return False
        saved = usual * left * COMPILED_SAVES
        pays = saved > MARGIN * cost
        logging.info(
            f"{said}, about {usual * left:.0f} s for the {left} steps ahead. Compiling would take "
            f"about {cost:.0f} s and save about {saved:.0f} s: {'worth it' if pays else 'not done'}"
        )
        return pays
