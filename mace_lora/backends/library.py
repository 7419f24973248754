"""The compiled C++ of `csrc/`, built once per machine by the compiler that is there."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

from mace_lora.errors import MaceLoraError
from mace_lora.files import whole_file

_SOURCES = ("common.cpp", "convolution.cpp", "contraction.cpp", "pairs.cpp", "silu.cpp")
# Reassociation lets sums over channels be vectors; NaN and infinity keep their meaning.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)


class NoCompiler(MaceLoraError, RuntimeError):
    """No C++ compiler, or one that can't build the kernels."""


def cache_folder() -> Path:
    """Where compiled code is kept between runs: $MACE_LORA_CACHE, or ~/.cache/mace_lora.

    Where that can't be written to, a folder of this process alone, removed at its end.
    """
    named = os.environ.get("MACE_LORA_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(named) if named else Path(base) / "mace_lora"
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return _passing_folder(folder, str(error))


@functools.cache
def _passing_folder(instead_of: Path, reason: str) -> Path:
    logging.warning(
        f"{instead_of} can't be written to ({reason}): what is compiled is not kept for the next "
        "run. Set MACE_LORA_CACHE to a folder that can"
    )
    folder = tempfile.mkdtemp(prefix="mace_lora-")  # its own: what lies in /tmp could be anyone's
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def compiler() -> str:
    """The C++ compiler: $CXX, g++ or clang++.

    Raises:
        NoCompiler: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise NoCompiler("no C++ compiler (g++ or clang++) is installed")


def load() -> ctypes.CDLL:
    """The library of the kernels, from the cache or built now (some seconds).

    Raises:
        NoCompiler: there is no compiler, it fails, or there is no place for what it makes.
    """
    found = tried()
    if isinstance(found, str):
        raise NoCompiler(found)
    return found


@functools.cache
def tried() -> ctypes.CDLL | str:
    """The library, or why there is none: a compiler that fails is asked once, not for each model
    that predicts."""
    try:
        return _made()
    except NoCompiler as error:
        return str(error)


def _made() -> ctypes.CDLL:
    folder = resources.files("mace_lora.backends").joinpath("csrc")
    source = "\n".join(folder.joinpath(name).read_text() for name in _SOURCES)
    key = hashlib.sha256("\n".join([source, *_FLAGS, compiler(), _processor()]).encode())
    path = cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
    try:
        if not path.exists():
            _build(source, path)
        return ctypes.CDLL(str(path))
    except OSError as error:  # disk full, a folder from which nothing may be run, ...
        raise NoCompiler(
            f"the kernels can't be built or loaded in {path.parent}: {error}"
        ) from error


def _build(source: str, path: Path) -> None:
    text = path.with_suffix(f".{os.getpid()}.cpp")
    try:
        text.write_text(source)
        for extra in (["-march=native", "-fopenmp"], ["-march=native"], []):
            with whole_file(path) as temporary:
                command = [compiler(), *_FLAGS, *extra, str(text), "-o", str(temporary)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    return
            path.unlink(missing_ok=True)
    finally:
        text.unlink(missing_ok=True)
    raise NoCompiler(f"{compiler()} can't build the kernels: {done.stderr.strip()[-300:]}")


def _processor() -> str:
    """What -march=native depends on: one folder may serve machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
