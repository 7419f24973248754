"""Say what is installed, what works and what doesn't, in plain words.

Versions of packages, whose mace_run_train is on the PATH, devices, kernels, and whether this
mace-torch can be hosted. Each problem comes with what to do; with one or more the exit code is 1.
"""

from __future__ import annotations

import argparse
import platform
import shutil
from importlib import import_module, metadata
from pathlib import Path

from mace_lora.printing import Data

EXAMPLES = """\
  mace_lora doctor
  mace_lora doctor --json
"""

PACKAGES = (
    *("mace-lora", "mace-torch", "torch", "e3nn", "cuequivariance-torch", "ase", "torch-ema"),
    *("h5py", "matscipy", "prettytable", "safetensors", "configargparse", "matplotlib", "numpy"),
    "shtab",
)
COMMAND = "mace_run_train"


def installed() -> dict[str, str | None]:
    """Version of each package that we need; None where it is missing."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def whose_command() -> tuple[str | None, bool]:
    """The `mace_run_train` on the PATH, and whether it is ours."""
    path = shutil.which(COMMAND)
    if path is None:
        return None, False
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return path, False
    return path, "mace_lora" in text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # there are none


def run(options: argparse.Namespace) -> Data:
    """Everything that the command prints; `problems` is empty where all is well."""
    del options
    versions = installed()
    problems = [f"{name} is not installed" for name, v in versions.items() if v is None]
    path, ours = whose_command()
    if path is None:
        problems.append(
            f"there is no {COMMAND} on the PATH: activate the environment, "
            "or use `python -m mace_lora train`"
        )
    elif not ours:
        problems.append(
            f"{path} is mace-torch's own command, without adapters (installing mace-torch after "
            "mace-lora takes it back): pip install --force-reinstall --no-deps mace-lora, "
            "or use `mace_lora train`"
        )
    cuda, cueq = _torch(problems), _cuequivariance()
    problems += _upstream()
    kernels = _kernels()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "command": path,
        "command_is_ours": ours,
        "cuda": cuda,
        "cuequivariance": cueq,
        "kernels": kernels,
        "problems": problems,
    }


def _torch(problems: list[str]) -> str:
    try:
        torch = import_module("torch")
    except Exception as error:  # a broken installation raises anything
        problems.append(f"torch can't be imported: {error}")
        return "unknown: torch can't be imported"
    if torch.cuda.is_available():
        return f"yes: {torch.cuda.get_device_name(0)} (CUDA {torch.version.cuda})"
    if torch.version.cuda is None:
        return "no: this is a CPU build of torch"
    return "no: torch is built for CUDA but finds no device"


def _cuequivariance() -> str:
    try:
        import_module("cuequivariance_torch")
    except Exception as error:
        return f"no: {error}"
    try:
        import_module("cuequivariance_ops_torch")
    except Exception:
        return "yes, without CUDA kernels (pip install cuequivariance-ops-torch-cu12 on a GPU)"
    return "yes, with CUDA kernels"


def _kernels() -> str:
    """Whether the fused kernels of the CPU can be had: they are compiled on first use."""
    try:
        library = import_module("mace_lora.backends.library")
        library.load()
        return f"yes: compiled with {library.compiler()}, kept in {library.cache_folder()}"
    except Exception as error:  # no compiler, no folder to write to, no torch
        return f"no, --step=auto is eager: {error}"


def _upstream() -> list[str]:
    try:
        upstream = import_module("mace_lora.upstream.names")
        found = [f"mace-torch: {line}" for line in upstream.problems()]
        if found:
            found.append(f"this version of mace-lora is tested with mace-torch {upstream.TESTED}")
        return found
    except Exception as error:
        return [f"mace-torch can't be imported: {error}"]


def text(found: Data) -> str:
    lines = [f"python {found['python']}"]
    lines += [f"  {name:<22} {version or 'missing'}" for name, version in found["versions"].items()]
    whose = "mace-lora's" if found["command_is_ours"] else "NOT mace-lora's"
    lines += [
        f"{COMMAND}: {found['command'] or 'not on the PATH'} ({whose})",
        f"CUDA: {found['cuda']}",
        f"cuequivariance: {found['cuequivariance']}",
        f"fused CPU kernels: {found['kernels']}",
    ]
    if not found["problems"]:
        return "\n".join([*lines, "No problems found."])
    return "\n".join([*lines, "Problems:", *(f"  - {problem}" for problem in found["problems"])])
