"""The public originals of the data sets, downloaded once."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from mace_lora.errors import DataError
from mace_lora.files import whole_file
from reproduction.datasets import BOTNET, STAND_IN

RMD17_ARCHIVE = "https://figshare.com/ndownloader/files/23950376"
RMD17_PAGE = "https://doi.org/10.6084/m9.figshare.12672038"
BOTNET_FILES = "https://raw.githubusercontent.com/davkovacs/BOTNet-datasets/main"
BOTNET_PAGE = "https://github.com/davkovacs/BOTNet-datasets"
# A model that MACE's authors trained on SPICE in 2022: 15 elements, 150,800 parameters
SPICE2022_FILE = "MACE_SPICE.model"
SPICE2022_PAGE = "https://github.com/ACEsuit/mace/tree/1c0e4e87/tests/test_openmm"
SPICE2022 = (
    "https://raw.githubusercontent.com/ACEsuit/mace/1c0e4e8742292641ae874f3f77b091d58fb6e9f0"
    f"/tests/test_openmm/{SPICE2022_FILE}"
)
TIMEOUT = 60  # seconds without an answer


def originals(dataset: str, folder: Path) -> Path:
    """Download the originals of a data set to `folder` unless they are there; a `data_dir`.

    Raises:
        DataError: they can't be downloaded; says where to get them by hand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if dataset == "rmd17":
        _rmd17(folder)
        return folder
    name, train, tests = BOTNET[dataset]
    (folder / name).mkdir(exist_ok=True)
    files = [train, *tests.values(), *([STAND_IN[1]] if dataset == "3bpa" else [])]
    for file in files:
        download(f"{BOTNET_FILES}/{name}/{file}", folder / name / file, BOTNET_PAGE)
    return folder


def _rmd17(folder: Path) -> None:
    if (folder / "rmd17").exists():
        return
    archive = folder / "rmd17.tar.bz2"
    download(RMD17_ARCHIVE, archive, RMD17_PAGE)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            with tarfile.open(archive) as content:
                content.extractall(temporary, filter="data")
            (Path(temporary) / "rmd17").rename(folder / "rmd17")  # the archive's own top folder
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{archive} can't be unpacked: {error}; remove it and try again") from error


def download(url: str, path: Path, page: str) -> None:
    """One file, whole or not at all; nothing where it is there.

    Raises:
        DataError: with `page`, where a person finds the file.
    """
    if path.exists():
        return
    print(f"Downloading {url}", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, whole_file(path) as temporary:
            with open(temporary, "wb") as file:
                shutil.copyfileobj(answer, file)
            length = answer.headers.get("Content-Length")
            if length is not None and int(length) != temporary.stat().st_size:
                raise OSError(f"{temporary.stat().st_size} of {length} bytes came")
    except OSError as error:  # URLError and timeouts are among them
        raise DataError(
            f"{url} can't be downloaded ({error}). Get it from {page} by hand, put it in place as "
            f"{path}, and try again; or give a folder of ready files with --data_dir"
        ) from error
