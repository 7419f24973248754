"""What commands print: for people, for programs, and for readers who have seen enough."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Any, TypeAlias

from mace_lora.errors import WriteError

# The result of a command, as --json prints it
Data: TypeAlias = dict[str, Any]
_NOBODYS = (  # warnings that every run gives and that nobody can act on
    "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",  # set by mace-torch itself
    "The TorchScript type system doesn't support instance-level",  # e3nn
    "'torch.load' received a zip file that looks like a TorchScript archive",
    "'pin_memory' argument is set as true",  # mace-torch's default, harmless without a GPU
)


def ignore_warnings() -> None:
    """Add filters for warnings of other packages that nobody can act on."""
    for message in _NOBODYS:
        warnings.filterwarnings("ignore", message=message)


def printable() -> None:
    """Let a terminal without Å or a bar's blocks show question marks, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(text: str, end: str = "\n") -> None:
    """Print to standard output; in silence where the reader has gone (`| head`).

    Raises:
        WriteError: there is no room for it.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
    except OSError as error:
        raise WriteError(f"the result can't be printed: {error.strerror}") from None
