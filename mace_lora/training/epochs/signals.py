"""SIGTERM and SIGUSR1, which batch systems send some time before they kill, and Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# EX_TEMPFAIL of sysexits.h: not done, run it again. A batch script can requeue on it.
EXIT_CODE = 75
# What shells take for Ctrl-C: nobody is to run it again
INTERRUPTED = 130
CTRL_C = "Ctrl-C"
_HEARD = b"\nCtrl-C: finishing this step, then writing a checkpoint; once more ends at once\n"
_NAMES = {"SIGTERM": "SIGTERM", "SIGUSR1": "SIGUSR1", "SIGINT": CTRL_C}
_WATCHED = {getattr(signal, s): name for s, name in _NAMES.items() if hasattr(signal, s)}


class StopRequest:
    """Whether a signal has asked the run to stop, and whether it may finish its step first.

    While `waiting()` is entered a signal is only noted. At any other time (data are read, the
    result is written) there is nothing to finish, and the program ends with `exit_code` at once;
    so it does at Ctrl-C where a stop was asked for before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._waits = False
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return self.name is not None

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.name == CTRL_C else EXIT_CODE

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
        # a shell has Ctrl-C ignored in what it runs in the background
        numbers = [n for n in _WATCHED if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._received) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and os.getpid() != self._process:
            return  # a worker that loads data: the run itself says what becomes of it
        name, asked_before = _WATCHED[number], self.name
        self.name = name
        if not self._waits or (asked_before and name == CTRL_C):
            when = "once more" if self._waits else "outside training"
            logging.warning(
                f"{name} {when}: leaving with exit code {self.exit_code}; "
                "the last checkpoint, if there is one, holds all training up to it"
            )
            raise SystemExit(self.exit_code)
        if name == CTRL_C:  # the log may be in use at this moment
            with contextlib.suppress(OSError):
                os.write(2, _HEARD)
