"""A committee in a folder: one adapter per member, and the factors that calibrate its spread."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mace_lora.errors import ArtefactError
from mace_lora.files import whole_file

FILE = "committee.json"


@dataclass(frozen=True)
class Committee:
    """What a folder holds.

    Attributes:
        members: adapter directories.
        factors: by which standard deviations of "energy" and "forces" are multiplied.
    """

    members: tuple[Path, ...]
    factors: Mapping[str, float]


def is_one(folder: str | Path | None) -> bool:
    """Whether this is the folder of a committee."""
    return folder is not None and (Path(folder) / FILE).is_file()


def read(folder: str | Path) -> Committee:
    """
    Raises:
        ArtefactError: the folder holds no committee, or its file is broken.
    """
    path = Path(folder) / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        members = tuple(Path(folder) / name for name in content["members"])
        factors = {name: float(content["factors"][name]) for name in ("energy", "forces")}
    except FileNotFoundError:
        raise ArtefactError(f"no {path}: is {folder} the folder of a committee?") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} can't be read: {type(error).__name__}: {error}") from None
    return Committee(members, factors)


def write(folder: str | Path, committee: Committee, facts: Mapping[str, object]) -> None:
    """Write the file of a committee whose members lie in `folder`; `facts` are for people."""
    content = {
        "members": [member.name for member in committee.members],
        "factors": dict(committee.factors),
        **facts,
    }
    with whole_file(Path(folder) / FILE) as new:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
