"""What commands print: for people, for programs, and for readers who have seen enough."""

from __future__ import annotations

import os
import sys

from mace_lora.errors import WriteError


def say(text: str) -> None:
    """Print to standard output; in silence where the reader has gone (`| head`).

    Characters that the terminal's encoding lacks (Å, bars) are printed as question marks.

    Raises:
        WriteError: there is no room for it.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
    except OSError as error:
        raise WriteError(f"the result can't be printed: {error.strerror}") from None
