"""What every way to compute a step has in common."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import ClassVar

import torch

from mace_lora.errors import MaceLoraError


class CannotServe(MaceLoraError, RuntimeError):
    """A way can't compute this model on this machine; the message says why."""


class Way:
    """Eager: the model as it is. The other ways derive from this one.

    Class facts:
        name: its value of `--step`.
        caches_weights: effective weights may be kept from one call of the model to the next, as
            long as no parameter changes.
    """

    name: ClassVar[str] = "eager"
    caches_weights: ClassVar[bool] = True

    def active(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """The model computes this way for the length of a block, with the same results.

        Raises:
            CannotServe: on entering, with the model untouched.
        """
        return contextlib.nullcontext()


def draws(model: torch.nn.Module) -> bool:
    """Whether a module says that it draws random numbers in training: dropout of adapters."""
    return any(getattr(module, "draws", False) is True for module in model.modules())


def modules_of(model: torch.nn.Module) -> tuple[Hashable, ...]:
    """Changes when adapters are injected into `model` or merged, or when it is cast or moved."""
    parameter = next(model.parameters())
    return parameter.dtype, parameter.device, *(id(module) for module in model.modules())
