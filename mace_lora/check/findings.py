"""What was found of files of frames: one sentence each, with the frames that it is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ERROR, DOUBT, TOLD = "ERROR", "doubt", "told"
_MOST_NAMED = 8


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        severity: ERROR: training would be wrong; DOUBT: look at it; TOLD: good to know.
        what: in a word or two.
        path: the file.
        why: in a sentence.
        frames: their numbers in the file, 0-based; empty where it is about all of them.
        remedy: what to do; "" where there is nothing to do.
        units: the part of `--units` that mends it, or "".
    """

    severity: str
    what: str
    path: str
    why: str
    frames: tuple[int, ...] = ()
    remedy: str = ""
    units: str = ""

    def __str__(self) -> str:
        return text_of(vars(self))


def text_of(finding: Mapping[str, Any]) -> str:
    """A Finding's attributes as a line."""
    place = finding["path"] + (f", {named(finding['frames'])}" if finding["frames"] else "")
    remedy = f": {finding['remedy']}" if finding["remedy"] else ""
    return f"{place}: {finding['what']}: {finding['why']}{remedy}"


def named(frames: Iterable[int]) -> str:
    """ "frame 3", or "frames 3, 7, ... (12 of them)"."""
    numbers = list(frames)
    if len(numbers) == 1:
        return f"frame {numbers[0]}"
    shown = ", ".join(map(str, numbers[:_MOST_NAMED]))
    return f"frames {shown}" + (
        f", ... ({len(numbers)} of them)" if len(numbers) > _MOST_NAMED else ""
    )
