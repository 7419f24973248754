"""Which backend a model gets: the one that was asked for, or else the first that can serve it.

What "auto" stands for follows from the model, the device and what is installed, never from measured
times: two runs of one kind on one machine compute alike, to the last digit.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from mace_lora.backends.base import Backend, CannotServe
from mace_lora.backends.registry import AUTO, BACKENDS, get_backend

if TYPE_CHECKING:
    import torch


def choose(name: str, model: torch.nn.Module) -> Backend:
    """The backend called `name`; another one, with the reason in the log, where it can't serve.

    Args:
        name: a value of `--step`.
        model: what is to be computed.

    Raises:
        ConfigError: no backend has this name.
        CannotServe: no backend at all can serve.
    """
    backend, reasons = _first(name, model, lambda candidate: get_backend(candidate)())
    _say(name, backend, reasons)
    return backend


def serving(model: torch.nn.Module) -> Backend:
    """What `model` predicts with: the first backend that can serve it, without a word.

    One and the same for all predictions of a process, with what it has made of each model.

    Raises:
        CannotServe: no backend at all can serve.
    """
    return _first(AUTO, model, _kept)[0]


@functools.cache
def _kept(name: str) -> Backend:
    return get_backend(name)()


def _first(
    name: str, model: torch.nn.Module, make: Callable[[str], Backend]
) -> tuple[Backend, dict[str, CannotServe]]:
    """The first backend that can serve, and why those before it can't."""
    asked = [] if name == AUTO else [name]
    usual = [n for n in BACKENDS if n not in asked and not get_backend(n).experimental]
    reasons: dict[str, CannotServe] = {}
    for candidate in (*asked, *usual):
        backend = make(candidate)
        try:
            backend.check(model)
        except CannotServe as reason:
            reasons[candidate] = reason
            continue
        return backend, reasons
    raise CannotServe("; ".join(f"{n}: {reason}" for n, reason in reasons.items()))


def _say(name: str, backend: Backend, reasons: dict[str, CannotServe]) -> None:
    if name == AUTO:
        why = [f"{n} can't serve this run: {reason}" for n, reason in reasons.items()]
        logging.info("; ".join([f"--step={AUTO}: {backend.name}", *why]))
    elif name in reasons:
        logging.warning(
            f"--step={name} can't serve this run, which goes on in {backend.name}: {reasons[name]}"
        )
    elif backend.experimental:
        logging.warning(f"--step={name} is experimental: compare its losses with --step=eager")
