"""What of mace-torch's log is shown on the terminal; its log files keep all of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from mace_lora.upstream import names

# Of the lines before training: what was found, and nothing that ours say better
_FACTS = (
    *("MACE version:", "Using CPU", "CUDA version:", "Processes:"),
    *("Using foundation model", "Using Polar foundation model"),
    *("Total number of configurations:", "DRY RUN"),
)
# Warnings that are false with an adapter, or about a default that harms nobody
_FALSE = (
    "System is rank deficient",  # where it is, E0s are chosen with care, and ours says which
    "Validation batch size",
    "Merging LoRA weights",  # of any method, and ours says how well
)
_FILE_ONLY = "log_file_only"


def to_file(text: str) -> None:
    """Log what is too long for the terminal."""
    logging.info(text, extra={_FILE_ONLY: True})


class Terminal:
    """The terminal of one run.

    Before training it shows warnings, our lines and a few of mace-torch's; then all but those that
    are false here. mace-torch's "Done" comes before our last lines, and is nowhere logged.

    Args:
        replay: whether there is a head `pt_head`.
    """

    def __init__(self, replay: Callable[[], bool]) -> None:
        self._replay = replay
        self._training = False
        self._mace = Path(names.module("mace").__path__[0])

    def set_up(
        self, level: int | str, tag: str | None, directory: str | None, rank: int | None
    ) -> None:
        """In the place of mace-torch's function that makes the handlers of its log."""
        before = logging.root.handlers[:]
        names.original("setup_logger")(level=level, tag=tag, directory=directory, rank=rank)
        for handler in logging.root.handlers:
            if handler not in before:
                handler.addFilter(self._is_not_done)
                if not isinstance(handler, logging.FileHandler):
                    handler.addFilter(self._shows)
        if directory is not None:
            logging.info(f"The whole log is in {Path(directory) / f'{tag}.log'}")

    def then(self, train: Callable[..., None]) -> Callable[..., None]:
        """The function `train`, from whose call on mace-torch's lines are shown."""

        def training(**keywords: object) -> None:
            self._training = True
            train(**keywords)

        return training

    def _is_mace_torchs(self, record: logging.LogRecord) -> bool:
        return self._mace in Path(record.pathname).parents

    def _is_not_done(self, record: logging.LogRecord) -> bool:
        return not (self._is_mace_torchs(record) and record.getMessage() == "Done")

    def _shows(self, record: logging.LogRecord) -> bool:
        if not self._is_mace_torchs(record):
            return not hasattr(record, _FILE_ONLY)
        text = record.getMessage()
        if text.startswith(_FALSE):
            return False
        if text.startswith("Skipping evaluation for heads: ['pt_head']"):
            return self._replay()
        return self._training or record.levelno >= logging.WARNING or text.startswith(_FACTS)
