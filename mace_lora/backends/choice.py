"""Which way a run takes: the one that was asked for, or the one that is expected to pay.

What "auto" chooses follows from what is known before the first step, never from measured times: two
runs of one kind on one machine compute alike, to the last digit.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mace_lora.backends.base import CannotServe, Way
from mace_lora.backends.padding import Shape

# Seconds of a fused step in float64 on two cores, fitted to MACE-OFF23 medium (128 channels) and
# mini (32), 300 to 6,000 edges: per layer, then per layer and edge; (constant, per channel)
_PER_LAYER = (0.01, 1e-4)
_PER_EDGE = (1e-5, 4e-7)
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
    # imported here: --help can do without e3nn
    if name == "eager":
        from mace_lora.backends.fusing import Eager

        return Eager()
    if name == "compile":
        from mace_lora.backends.compiled import Compiled

        return Chosen(Compiled(shapes), asked_for=True)
    if name == "cudagraph":
        from mace_lora.backends.cudagraph import Captured

        return Chosen(Captured(shapes), asked_for=True)
    from mace_lora.backends.fusing import Fused

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


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take, from its own numbers alone.

    Attributes:
        step: seconds of a fused step.
        steps: that are ahead.
        cost: seconds to compile.
    """

    step: float
    steps: int
    cost: float

    @classmethod
    def of(cls, model: torch.nn.Module, steps: int, edges: float, cost: float) -> Forecast:
        """
        Args:
            model: a MACE model.
            steps: that are ahead.
            edges: of a batch, on average.
            cost: seconds to compile.
        """
        layers, channels = _size(model)
        per_layer = _PER_LAYER[0] + _PER_LAYER[1] * channels
        per_edge = _PER_EDGE[0] + _PER_EDGE[1] * channels
        return cls(layers * (per_layer + per_edge * edges), steps, cost)

    @property
    def saved(self) -> float:
        """Seconds that compiling is expected to save, its own cost not taken off."""
        return self.step * self.steps * COMPILED_SAVES

    @property
    def compiling_pays(self) -> bool:
        return self.saved > MARGIN * self.cost

    def __str__(self) -> str:
        return (
            f"{self.steps} steps ahead, expected to take {self.step * self.steps:.0f} s fused; "
            f"compiling is expected to cost {self.cost:.0f} s and to save {self.saved:.0f} s: "
            f"{'worth it' if self.compiling_pays else 'not done'}"
        )


def _size(model: torch.nn.Module) -> tuple[int, int]:
    """(layers, channels) of a MACE model, as its first layer has them."""
    layers = getattr(model, "interactions", ())
    irreps = getattr(layers[0], "hidden_irreps", None) if len(layers) else None
    return max(1, len(layers)), max((mul for mul, _ in irreps), default=1) if irreps else 128
