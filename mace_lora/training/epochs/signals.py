"""SIGTERM and SIGUSR1, which batch systems send some time before they kill."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# EX_TEMPFAIL of sysexits.h: not done, run it again. A batch script can requeue on it.
EXIT_CODE = 75
_WATCHED = tuple(s for s in ("SIGTERM", "SIGUSR1") if hasattr(signal, s))


class StopRequest:
    """Whether a signal has asked the run to stop, and whether it may finish its step first.

    While `waiting()` is entered a signal is only noted. At any other time (data are read, the
    result is written) there is nothing to finish, and the program ends with EXIT_CODE at once.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._waits = False

    def __bool__(self) -> bool:
        return self.name is not None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time in which somebody looks at this request between two steps."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextlib.contextmanager
    def receiving(self) -> Iterator[StopRequest]:
        """Take the signals, in the main thread; what was there before is restored."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [getattr(signal, name) for name in _WATCHED]
        before = {number: signal.signal(number, self._received) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.name = signal.Signals(number).name
        if not self._waits:
            logging.warning(
                f"{self.name} outside training: leaving with exit code {EXIT_CODE}; "
                "the last checkpoint, if there is one, holds all training so far"
            )
            raise SystemExit(EXIT_CODE)
