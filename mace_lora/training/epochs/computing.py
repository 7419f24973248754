"""Where a run of upstream's script computes: steps and evaluations, by the chosen backend."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from mace_lora.backends.base import Backend
from mace_lora.backends.choice import choose
from mace_lora.training.epochs.order import ShareOfBatches
from mace_lora.training.epochs.sizes import Limit
from mace_lora.upstream import names as upstream
from mace_lora.upstream.answers import Answers
from mace_lora.upstream.types import Dataset, Loader, Metrics, Number

# Of one step: the loss, and what is logged
Stepped = tuple[Number, dict[str, Number]]


class Computing:
    """Our functions for what upstream computes again and again.

    Args:
        name: the value of `--step`.
        at_the_end: to which the data sets are added that are evaluated at the end, with errors.
        limit: of batches by size, those of the evaluations at the end.
        answers: where what is predicted then is remembered.
    """

    def __init__(
        self,
        name: str,
        at_the_end: list[tuple[Dataset, Mapping[str, float]]] | None = None,
        limit: Limit | None = None,
        answers: Answers | None = None,
    ) -> None:
        self._limit = limit
        self._answers = answers or Answers()
        self._name = name
        self._at_the_end = [] if at_the_end is None else at_the_end
        self._backend: Backend | None = None

    def substitutes(self) -> dict[str, object]:
        """Our functions by key of `substitutions.ROWS`."""
        return {
            "take_step": self.take_step,
            "step_of_lbfgs": self.step_of_lbfgs,
            "evaluate": self.evaluate,
            "evaluate_at_the_end": self.evaluate_at_the_end,
        }

    def backend(self, model: torch.nn.Module) -> Backend:
        """What computes this run, chosen when it is first asked for."""
        if self._backend is None:
            self._backend = choose(self._name, _inner(model))
        return self._backend

    def settle(self, model: torch.nn.Module, before: str = "") -> str:
        """Choose how the run computes, before its first step.

        Args:
            model: with its adapters.
            before: what an earlier part of this run was computed by, "" for none.

        Returns:
            The name of the backend, for a later part of this run.
        """
        name = self.backend(model).name
        if before not in ("", name):
            logging.info(
                f"This run began with --step={before} and goes on in {name}: as if it had not been "
                "interrupted up to rounding, not bit for bit"
            )
        return name

    # ------------------------------------------------------------------ steps and evaluations

    def take_step(
        self, model: torch.nn.Module, *, loss_fn: Callable[..., torch.Tensor], **keywords: object
    ) -> Stepped:
        """Upstream's step on one batch."""
        if not isinstance(model, DistributedDataParallel):  # which waits for all that has gradients
            loss_fn = partial(_loss_of, loss_fn, [p for p in model.parameters() if p.requires_grad])
        with self.active(model):
            done: Stepped = upstream.original("take_step")(model=model, loss_fn=loss_fn, **keywords)
            return done

    def step_of_lbfgs(self, model: torch.nn.Module, **keywords: object) -> Stepped:
        """Upstream's step of LBFGS, which calls the model with changing weights."""
        with self.active(model, constant_weights=False):
            done: Stepped = upstream.original("step_of_lbfgs")(model=model, **keywords)
            return done

    def evaluate(
        self, model: torch.nn.Module, *rest: object, **keywords: object
    ) -> tuple[float, Metrics]:
        """Upstream's evaluation of a data set."""
        with self.active(model):
            found: tuple[float, Metrics] = upstream.original("evaluate")(model, *rest, **keywords)
            return found

    def evaluate_at_the_end(
        self, model: torch.nn.Module, *rest: object, data_loader: Loader, **keywords: object
    ) -> tuple[float, Metrics]:
        """The same, for mace-torch's tables of errors."""
        if not isinstance(data_loader.batch_sampler, ShareOfBatches):  # a validation set has it
            ShareOfBatches.of(data_loader, limit=self._limit)
        with self._answers.listening(_inner(model)):
            loss, found = self.evaluate(model, *rest, data_loader=data_loader, **keywords)
        numbers = {k: float(v) for k, v in found.items() if isinstance(v, (int, float))}
        self._at_the_end.append((data_loader.dataset, numbers))
        return loss, found

    @contextlib.contextmanager
    def active(self, model: torch.nn.Module, *, constant_weights: bool = True) -> Iterator[None]:
        """The backend computes meanwhile, the model's effective weights only once."""
        backend = self.backend(model)
        keep = constant_weights and backend.caches_weights
        cached = parametrize.cached() if keep else contextlib.nullcontext()
        with backend.active(_inner(model)), cached:
            yield


def _loss_of(
    loss_fn: Callable[..., torch.Tensor], parameters: list[torch.nn.Parameter], **given: object
) -> torch.Tensor:
    """The loss, whose gradients by positions, which nobody reads, are not computed."""
    loss = loss_fn(**given)

    def backward() -> None:
        del loss.__dict__["backward"]
        torch.autograd.backward(loss, inputs=parameters)

    loss.__dict__["backward"] = backward
    return loss


def _inner(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
