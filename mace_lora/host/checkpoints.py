"""Upstream's checkpoints, told apart by run and stage."""

from __future__ import annotations

from typing import Any, Protocol


class _Stage(Protocol):
    stage_two: bool


def make_checkpoint_handler(original: type, session: _Stage) -> type:
    """Upstream's CheckpointHandler, which also tells `session` which stage it loads.

    Upstream loads the file with the highest epoch number under the run's tag, so that an older and
    longer run of the same name is saved as the new result. Here, what this run has written comes
    first; and a checkpoint that doesn't fit the model is an error, never loaded in part.
    """

    class Checkpoints(original):  # type: ignore[misc, valid-type]
        def __init__(self, *positional: Any, **keywords: Any) -> None:
            super().__init__(*positional, **keywords)
            self.written: dict[bool, str] = {}

        def save(self, state: Any, epochs: int, keep_last: bool = False) -> None:
            super().save(state, epochs, keep_last)
            start = self.io.swa_start
            self.written[start is not None and epochs >= start] = self.io.old_path

        def load_latest(
            self, state: Any, swa: bool | None = False, device: Any = None, strict: bool = True
        ) -> int | None:
            session.stage_two = bool(swa)
            if bool(swa) in self.written:
                return self.load(state, self.written[bool(swa)], strict=True, device=device)
            return super().load_latest(state, swa=swa, device=device, strict=True)

    return Checkpoints
