"""Results are written whole or not at all, and a full disk is told from a fault of the program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from mace_lora.errors import MaceLoraError, WriteError
from mace_lora.files import whole_file
from mace_lora.upstream import names as upstream

File = str | Path | IO[bytes]
# What the world outside can do to a file: full, over quota, over the size limit, no permission
_OUTSIDE = {ENOSPC, EDQUOT, EFBIG, EACCES, EPERM, EROFS, EIO}
_REMEDY = (
    "Nothing that existed was harmed, and training up to the last checkpoint is safe: free some "
    "space or fix the folder, then repeat the command with --restart_latest"
)


def reason(error: Exception) -> str:
    """Why a write failed; torch gives the line of its own source where one was cut short."""
    if "inline_container" in str(error) or "iostream" in str(error):
        return "writing was cut short, as by a full disk, a quota or a limit of file size"
    return str(error)


@contextlib.contextmanager
def write_errors(path: str | Path | None = None) -> Iterator[None]:
    """Errors of writing come out of this block as WriteError, in words.

    Args:
        path: what is written in this block, and nothing else is done; None: OSErrors alone are
            explained, as far as they come from the file system.

    Raises:
        WriteError: in the place of what a failed write raised.
    """
    try:
        yield
    except MaceLoraError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if path is None and getattr(error, "errno", None) not in _OUTSIDE:
            raise
        name = path or getattr(error, "filename", None) or "a file"
        raise WriteError(f"{name} can't be written: {reason(error)}. {_REMEDY}") from error


def save_whole(obj: object, f: File, *rest: object, **keywords: object) -> None:
    """`torch.save`, but a file that is named is written whole or not at all."""
    _whole(upstream.original("save"), obj, f, *rest, **keywords)


def jit_save_whole(m: object, f: File, *rest: object, **keywords: object) -> None:
    """`torch.jit.save`, but a file that is named is written whole or not at all."""
    _whole(upstream.original("jit_save"), m, f, *rest, **keywords)


def _whole(
    save: Callable[..., None], obj: object, f: File, *rest: object, **keywords: object
) -> None:
    if not isinstance(f, (str, Path)):
        save(obj, f, *rest, **keywords)
        return
    with write_errors(f), whole_file(f) as temporary:
        save(obj, str(temporary), *rest, **keywords)
