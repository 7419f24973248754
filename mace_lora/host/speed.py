"""Where a run of upstream's training script computes: steps and evaluations, by the chosen way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from mace_lora.host import upstream
from mace_lora.step.choice import choose


class Speed:
    """Our functions for what upstream computes again and again.

    Args:
        name: the value of `--step`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.way = choose(name)

    def substitutes(self) -> dict[str, Any]:
        """Our functions by key of `upstream.NAMES`."""
        return {
            "take_step": self.take_step,
            "step_of_lbfgs": self.step_of_lbfgs,
            "evaluate": self.evaluate,
            "evaluate_at_the_end": self.evaluate,
        }

    @contextlib.contextmanager
    def active(self, model: torch.nn.Module) -> Iterator[None]:
        """`model` computes by the chosen way meanwhile; its effective weights are computed once."""
        if isinstance(model, DistributedDataParallel):
            model = model.module
        with self.way.active(model), parametrize.cached():
            yield

    def take_step(self, model: torch.nn.Module, *rest: Any, **keywords: Any) -> Any:
        """Upstream's step on one batch."""
        with self.active(model):
            return upstream.original("take_step")(model, *rest, **keywords)

    def step_of_lbfgs(self, model: torch.nn.Module, **keywords: Any) -> Any:
        """Upstream's step of LBFGS, which calls the model many times, with changing weights."""
        original = upstream.original("step_of_lbfgs")
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        with self.way.active(inner):
            return original(model=model, **keywords)

    def evaluate(self, model: torch.nn.Module, *rest: Any, **keywords: Any) -> Any:
        """Upstream's evaluation of a data set."""
        with self.active(model):
            return upstream.original("evaluate")(model, *rest, **keywords)
