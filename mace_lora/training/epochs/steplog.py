"""mace-torch's log of steps, which can do without waiting for the device at each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# Steps whose losses may lie on the device, unseen
MOST_UNSEEN = 50


class StepLog:
    """Stands in the place of mace-torch's logger: the same lines in the same order.

    A loss that is a tensor is not looked at until many have come together, or something else is
    logged, or `look` is called: then all are fetched at once.

    Args:
        logger: mace-torch's.
        judge: called with each loss that was looked at later, and with where in the run it was (the
            entry "where" of its metrics); may raise.
    """

    def __init__(self, logger: Any, judge: Callable[[float, Any], None]) -> None:
        self._logger = logger
        self._judge = judge
        self._unseen: list[dict[str, Any]] = []

    @property
    def path(self) -> str:
        """Of the file that is written."""
        return self._logger.path

    def log(self, metrics: dict[str, Any]) -> None:
        """One line."""
        if not torch.is_tensor(metrics.get("loss")):
            self.look()
            self._logger.log(metrics)
            return
        self._unseen.append(metrics)
        if len(self._unseen) >= MOST_UNSEEN:
            self.look()

    def look(self) -> None:
        """Fetch, judge and write what has not been seen yet."""
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return
        losses = torch.stack([m["loss"] for m in unseen]).cpu().numpy()
        for metrics, loss in zip(unseen, losses, strict=True):
            self._judge(float(loss), metrics.pop("where"))
            self._logger.log({**metrics, "loss": np.asarray(loss)})
