"""Which way a run takes: the one that was asked for, or what pays for itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

from mace_lora.step.base import CannotServe, Way


def choose(name: str) -> Way:
    """The way called `name`; where it can't serve, eager."""
    if name == "eager":
        return Way()
    from mace_lora.step.fusing import Fused  # e3nn, which --help can do without

    return Chosen(Fused(), asked_for=name != "auto")


class Chosen(Way):
    """One way, and eager where it can't serve, with one line in the log that says why."""

    def __init__(self, way: Way, *, asked_for: bool) -> None:
        self.way = way
        self._asked_for = asked_for

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.way.name

    @contextlib.contextmanager
    def active(self, model: torch.nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.way.active(model))
            except CannotServe as reason:
                say = logging.warning if self._asked_for else logging.info
                say(
                    f"--step={self.way.name} can't serve this run, which goes on in eager: {reason}"
                )
                self.way = Way()
            yield
