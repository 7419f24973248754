"""Around each optimiser step: learning rates, gradients of several batches, dropout, protection.

mace-torch's `take_step` is called as it is, with some of its arguments in disguise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from mace_lora.model.injection import adapters
from mace_lora.training.options import COSINE, RunOptions
from mace_lora.upstream.types import Number

# mace-torch's `take_step`, or one like it: the loss, and what is logged of the step
Step = Callable[..., tuple[Number, dict[str, Number]]]
Gradients = dict[torch.nn.Parameter, torch.Tensor]


class Steps:
    """The steps of one run; the last of an epoch takes what is left of its batches.

    Args:
        options: of the run.
        steps_per_epoch: batches of an epoch.
        more: number of an optimiser step -> gradients that join the loss's.
    """

    def __init__(
        self,
        options: RunOptions,
        steps_per_epoch: int = 1,
        more: Callable[[int], Gradients] | None = None,
    ) -> None:
        self.options = options
        self.more = more
        self.steps_per_epoch = max(1, steps_per_epoch)
        self.epochs = 1  # of the whole run
        self.batches = 0  # in all
        self._drawing: list[torch.nn.Module] | None = None

    def begin(self, steps_per_epoch: int, done: int, epochs: int) -> None:
        """Training begins, or goes on after the `done` batches of an earlier part of this run."""
        self.steps_per_epoch = max(1, steps_per_epoch)
        self.batches, self.epochs = done, epochs

    def gradients_wait(self) -> bool:
        """Whether the optimiser has yet to move after the last batch: no moment to stop at."""
        return (self.batches % self.steps_per_epoch) % self.options.accumulate != 0

    def take(
        self,
        step: Step,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        **others: object,
    ) -> tuple[Number, dict[str, Number]]:
        """One batch: `step` is mace-torch's `take_step`, and the others are its arguments."""
        epoch, place = divmod(self.batches, self.steps_per_epoch)
        self.batches += 1
        first = place - place % self.options.accumulate
        size = min(self.options.accumulate, self.steps_per_epoch - first)
        last = place - first == size - 1
        per_epoch = math.ceil(self.steps_per_epoch / self.options.accumulate)
        number = epoch * per_epoch + place // self.options.accumulate
        more = self.more(number) if self.more is not None and last else {}
        part = number / (self.epochs * per_epoch)
        with self._scheduled(optimizer, part), self._dropout(model):
            held = _Held(optimizer, place == first, last, more)
            if size == 1:
                return step(model=model, optimizer=held, **others)
            return self._accumulate(partial(step, model=model), held, size, others)

    # ------------------------------------------------------------------ learning rates

    @contextmanager
    def _scheduled(self, optimiser: torch.optim.Optimizer, part: float) -> Iterator[None]:
        """The learning rates of a step before which this `part` of the run is done."""
        factor = (
            0.5 * (1 + math.cos(math.pi * min(part, 1.0)))
            if self.options.schedule == COSINE
            else 1.0
        )
        done = steps_done(optimiser) if self.options.warmup_steps else 0
        if done < self.options.warmup_steps:
            factor *= (done + 1) / self.options.warmup_steps
        rates = [group["lr"] for group in optimiser.param_groups]
        for group in optimiser.param_groups:
            group["lr"] = group["lr"] * factor
        try:
            yield
        finally:
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate

    # ------------------------------------------------------------------ dropout

    @contextmanager
    def _dropout(self, model: torch.nn.Module) -> Iterator[None]:
        """Adapters draw random numbers in training steps alone: mace-torch knows no modes."""
        if self._drawing is None:
            self._drawing = [adapter for _, adapter in adapters(model) if adapter.draws]
        for adapter in self._drawing:
            adapter.train()
        try:
            yield
        finally:
            for adapter in self._drawing:
                adapter.eval()

    # ------------------------------------------------------------------ accumulation

    def _accumulate(
        self, step: Step, held: _Held, size: int, others: dict[str, object]
    ) -> tuple[Number, dict[str, Number]]:
        """Gradients of several batches before the optimiser moves, as of one large batch."""
        loss_fn = cast(Callable[..., torch.Tensor], others["loss_fn"])
        others = {**others, "loss_fn": lambda pred, ref: loss_fn(pred=pred, ref=ref) / size}
        if not held.last:  # clipping and averages belong to the whole step
            others |= {"max_grad_norm": None, "ema": None}
        loss, metrics = step(optimizer=held, **others)
        return loss * size, {**metrics, "loss": metrics["loss"] * size}


@dataclass(frozen=True)
class _Held:
    """An optimiser that forgets gradients before the first of several batches alone, and moves
    after the last, with further gradients."""

    optimiser: torch.optim.Optimizer
    first: bool
    last: bool
    gradients: Gradients

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.first:
            self.optimiser.zero_grad(set_to_none)

    def step(self) -> None:
        if not self.last:
            return
        for parameter, gradient in self.gradients.items():
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
        self.optimiser.step()


def steps_done(optimiser: torch.optim.Optimizer) -> int:
    """How often `optimiser` has moved its parameters, from its own state: restarts keep it."""
    counts = [float(state["step"]) for state in optimiser.state.values() if "step" in state]
    counts += [float(group["k"]) for group in optimiser.param_groups if "k" in group]
    return int(max(counts, default=0))
