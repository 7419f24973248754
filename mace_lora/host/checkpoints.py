"""Upstream's checkpoints, told apart by run and stage, and never loaded in part."""

from __future__ import annotations

import os
import sys
from typing import Any, Protocol


class _Stage(Protocol):
    stage_two: bool


def make_checkpoint_handler(original: type, session: _Stage) -> type:
    """Upstream's CheckpointHandler with three differences.

    - It tells `session` which stage it loads.
    - What this run has written comes first. Upstream loads the file with the highest epoch number
      under the run's tag, so that an older and longer run of the same name is saved as the result.
    - A checkpoint that is broken or doesn't fit the model ends the run. Upstream catches every
      exception around a restart and then starts from the beginning; leaving the program is the one
      thing that it doesn't catch.
    """

    class Checkpoints(original):  # type: ignore[misc, valid-type]
        def __init__(self, *positional: Any, **keywords: Any) -> None:
            super().__init__(*positional, **keywords)
            self.written: dict[bool, str] = {}

        def save(self, state: Any, epochs: int, keep_last: bool = False) -> None:
            # the new file first: upstream removes the old one before it writes
            old, self.io.old_path = self.io.old_path, None
            super().save(state, epochs, keep_last)
            new, start = self.io.old_path, self.io.swa_start
            self.written[start is not None and epochs >= start] = new
            if old and old != new and not self.io.keep and not keep_last and os.path.exists(old):
                os.remove(old)

        def load_latest(
            self, state: Any, swa: bool | None = False, device: Any = None, strict: bool = True
        ) -> int | None:
            session.stage_two = bool(swa)
            path = self.written.get(bool(swa)) or self.io._get_latest_checkpoint_path(swa=swa)
            if path is None:
                return None
            try:
                return self.load(state, path, strict=True, device=device)
            except Exception as error:
                sys.exit(
                    f"error: checkpoint {path} can't be continued from by this run: {_short(error)}"
                    "\nIt was written with another adapter, rank, targets or base model, or is "
                    "damaged. Give the flags of that run, or another --name, or remove the file."
                )

    return Checkpoints


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 400 else text[:400] + " ..."
