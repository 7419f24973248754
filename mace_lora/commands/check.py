"""Whether files of labelled frames are what they are taken for, before anything is trained.

Keys and the flags that they need; units and signs of energies, forces, stresses and virials, found
by comparing them with what the base model predicts; duplicates, frames in two files, outliers, net
forces, mixed periodicity, isolated atoms, offsets between files, heads and types of frames. Errors,
with which training would be wrong, give exit code 1; doubts are for you to judge.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mace_lora.commands import common
from mace_lora.errors import ConfigError
from mace_lora.frames.units import HELP, Units
from mace_lora.parsing import ExistingFile
from mace_lora.printing import Data
from mace_lora.upstream.known import ExistingModel

if TYPE_CHECKING:
    import torch

    from mace_lora.check.compared import Compared
    from mace_lora.check.files import Looked
    from mace_lora.check.findings import Finding

EXAMPLES = """\
  mace_lora check train.xyz test.xyz --base mini
  mace_lora check train.xyz --base mini --units=energy=Hartree,forces=Hartree/Bohr
  mace_lora check train.xyz valid.xyz --base mini --output check.html --json
"""
MOST_FRAMES, MOST_ATOMS, LEAST_FRAMES = 50, 3000, 12  # of a file, that the base model predicts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=ExistingFile, help="labelled frames, in extended xyz"
    )
    parser.add_argument("--base", required=True, type=ExistingModel, help=common.BASE_HELP)
    parser.add_argument("--units", help=HELP)
    parser.add_argument("--output", help="a page to write, with histograms: an .html file")
    parser.add_argument("--head", help="the head of the base model, where it has several")
    common.add_data_arguments(parser)
    parser.add_argument(
        "--virials_key",
        default="REF_virials",
        help="name of the virials in the files (default: REF_virials)",
    )
    common.add_trust(parser)


def run(options: argparse.Namespace) -> Data:
    units = Units.parse(options.units)
    units.check_named(options.files)
    _refuse_stored(options.files)
    if options.output:
        common.check_folder(options.output, "output")
    from mace_lora.check.files import look
    from mace_lora.check.findings import ERROR
    from mace_lora.model.description import check_head

    model = common.load(options.base, "base", trust=options.trust)
    check_head(model, options.head, "--head")
    asked = {**common.keys(options), "virials": options.virials_key}
    looked = [look(str(p), asked, units.factors(str(p)), model) for p in options.files]
    compared = _compare(looked, model, options.head)
    findings = _findings(looked, compared)
    data = {
        "base": str(options.base),
        "output": options.output,
        "files": [file.facts for file in looked if file.facts],
        "findings": [vars(finding) for finding in findings],
        "flags": _flags(looked),
        "units": _units(findings, options.files),
        "problems": [str(finding) for finding in findings if finding.severity == ERROR],
    }
    if options.output:
        from mace_lora.check.page import write

        write(Path(options.output), data, looked, compared)
    return data


def _refuse_stored(paths: list[str]) -> None:
    for path in paths:
        if Path(path).is_dir() or path.endswith((".h5", ".hdf5", ".lmdb", ".aselmdb")):
            raise ConfigError(
                f"{path}: HDF5 and LMDB are not looked at here; give the files that they were "
                "written from, in extended xyz"
            )


def _compare(looked: list[Looked], model: torch.nn.Module, head: str | None) -> dict[str, Compared]:
    """By path a sample of each file with what the base model predicts."""
    from mace_lora.check.compared import compare, sample

    found = {}
    for file in looked:
        if file.frames is not None:
            chosen = sample(file.frames.configurations, MOST_FRAMES, MOST_ATOMS, LEAST_FRAMES)
            values = compare(file.frames, chosen, model, head)
            if values is not None:
                found[file.path] = values
    return found


def _findings(looked: list[Looked], compared: dict[str, Compared]) -> list[Finding]:
    """All of them, errors first."""
    from mace_lora.check import sets, units
    from mace_lora.check.findings import DOUBT, ERROR

    found = [finding for file in looked for finding in file.findings]
    factors = {file.path: file.frames.factors for file in looked if file.frames is not None}
    mistaken = [
        finding
        for path, values in compared.items()
        for finding in units.findings(path, values, factors[path])
    ]
    found += mistaken
    found += sets.findings([file.frames for file in looked if file.frames is not None])
    if not mistaken:
        found += sets.offsets(list(compared.items()))
    return sorted(
        found, key=lambda finding: -2 * (finding.severity == ERROR) - (finding.severity == DOUBT)
    )


def _flags(looked: list[Looked]) -> str:
    """The flags of keys, where all files need the same; else each has its own in `files`."""
    flags = {file.facts["flags"] for file in looked if file.facts}
    return flags.pop() if len(flags) == 1 else ""


def _units(findings: list[Finding], paths: list[str]) -> str:
    """`--units=...` for all that was found; a part names its file where it isn't about all."""
    parts: dict[str, list[str]] = {}
    for finding in findings:
        if finding.units:
            parts.setdefault(finding.units, []).append(finding.path)
    found = []
    for part, where in parts.items():
        everywhere = len(where) == len(paths)
        found += [part] if everywhere else [f"{Path(path).name}:{part}" for path in where]
    return f"--units={','.join(found)}" if found else ""


def text(data: Data) -> str:
    from mace_lora.check.findings import DOUBT, text_of

    lines = []
    for file in data["files"]:
        shown = ", ".join(f"{name} {n}" for name, n in file["compositions"].items())
        if file["n_compositions"] > len(file["compositions"]):
            shown += f", ... ({file['n_compositions']} compositions)"
        atoms = "-".join(map(str, dict.fromkeys(file["atoms"])))
        lines.append(f"{file['path']}: {file['frames']} frames of {atoms} atoms: {shown}")
        labels = ", ".join(f"{label} of {n}" for label, n in file["labels"].items())
        lines.append(f"  labels: {labels or 'none'}; keys: {', '.join(file['keys'])}")
        if file["flags"]:
            lines.append(f"  flags: {file['flags']}")
    lines += [f"{finding['severity']}: {text_of(finding)}" for finding in data["findings"]]
    doubts = sum(finding["severity"] == DOUBT for finding in data["findings"])
    lines.append(f"{len(data['problems'])} errors, {doubts} doubts")
    paste = " ".join(flag for flag in (data["flags"], data["units"]) if flag)
    if paste:
        lines.append(f"to paste into mace_run_train: {paste}")
    if data["output"]:
        lines.append(f"all of this with histograms: {data['output']}")
    return "\n".join(lines)
