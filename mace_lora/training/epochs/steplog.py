"""mace-torch's log of steps, which can do without waiting for the device at each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from mace_lora.upstream.types import Logger, Metrics

# Losses that may wait on the device
MOST_WAITING = 50


class StepLog:
    """Stands in the place of mace-torch's logger: the same lines in the same order.

    A loss that is a tensor is not fetched until many have come together, or something else is
    logged, or `flush` is called: then all are fetched at once.

    Args:
        logger: mace-torch's.
        judge: called with each loss that is fetched later, and with where in the run it was (the
            entry "where" of its metrics); may raise.
    """

    def __init__(
        self, logger: Logger, judge: Callable[[float, tuple[int, int, list[int]]], None]
    ) -> None:
        self._logger = logger
        self._judge = judge
        self._waiting: list[Metrics] = []

    @property
    def path(self) -> str:
        """Of the file that is written."""
        return self._logger.path

    def log(self, metrics: Metrics) -> None:
        """One line."""
        if not torch.is_tensor(metrics.get("loss")):
            self.flush()
            self._logger.log(metrics)
            return
        self._waiting.append(metrics)
        if len(self._waiting) >= MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Fetch, judge and write what waits."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        losses = torch.stack([cast(torch.Tensor, m["loss"]) for m in waiting]).cpu().numpy()
        for metrics, loss in zip(waiting, losses, strict=True):
            where = cast(tuple[int, int, list[int]], metrics.pop("where"))
            self._judge(float(loss), where)
            self._logger.log({**metrics, "loss": np.asarray(loss)})
