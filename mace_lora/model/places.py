"""Where an adapter is: a directory, a zip file of one, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mace_lora.errors import ArtefactError

_HUB = re.compile(r"^hf:/+(?P<name>[^/@]+/[^/@]+)(@(?P<revision>.+))?$")


def on_hub(place: str | Path) -> bool:
    """Whether this is the address of a repository, `hf://owner/name` or `hf://owner/name@tag`."""
    return str(place).startswith("hf:/")


def resolved(place: str | Path) -> str | Path:
    """One and the same name for a place, however it is written."""
    return str(place) if on_hub(place) else Path(place).resolve()


@contextmanager
def directory(place: str | Path, files: Sequence[str]) -> Iterator[Path]:
    """The directory with the files of an adapter, for as long as the block lasts.

    Args:
        place: a directory, which is taken as it is; a .zip file, of which these files alone are
            unpacked; or `hf://owner/name`, with `@revision` or without.
        files: names of the adapter's files.

    Raises:
        ArtefactError: no such place, or it holds no adapter.
    """
    if on_hub(place):
        yield _downloaded(str(place), files)
    elif Path(place).suffix == ".zip" and Path(place).is_file():
        with tempfile.TemporaryDirectory(prefix="mace_lora_") as folder:
            _unpack(Path(place), Path(folder), files)
            yield Path(folder)
    elif Path(place).is_file():
        raise ArtefactError(
            f"{place} is a file; an adapter is a directory with {files[0]} in it, or a .zip of one"
        )
    else:
        yield Path(place)


def _unpack(archive: Path, folder: Path, files: Sequence[str]) -> None:
    try:
        with zipfile.ZipFile(archive) as packed:
            for file in files:
                inside = [n for n in packed.namelist() if n.rpartition("/")[2] == file]
                if len(inside) != 1:
                    raise ArtefactError(
                        f"{archive} holds {len(inside)} files {file}, where one adapter has one"
                    )
                (folder / file).write_bytes(packed.read(inside[0]))
    except (zipfile.BadZipFile, OSError) as error:
        raise ArtefactError(f"{archive} can't be read: {error}") from None


def _downloaded(place: str, files: Sequence[str]) -> Path:
    found = _HUB.match(place)
    if found is None:
        raise ArtefactError(f"{place}: hf://owner/name or hf://owner/name@revision is needed")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ArtefactError(
            f"{place}: huggingface_hub is not installed, which downloads it: pip install "
            "huggingface_hub; or download the folder by hand and give its path"
        ) from None
    try:
        folder = snapshot_download(
            found["name"], revision=found["revision"], allow_patterns=[*files, "README.md"]
        )
    except Exception as error:  # of the network, of the hub, of access
        raise ArtefactError(
            f"{place} can't be downloaded: {type(error).__name__}: {str(error)[:200]}; is the name "
            "right, and are you online?"
        ) from None
    return Path(folder)
