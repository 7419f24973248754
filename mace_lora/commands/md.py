"""Molecular dynamics with a model, and whether it is sound: nothing broken, no energy lost.

Writes a trajectory (.xyz, with energies and forces), a log (.csv) and a picture (.png). At constant
energy (nve) the verdict is on the drift of the total energy, at constant temperature (nvt, Langevin
with a friction of 0.01/fs) on whether the molecules hold. Velocities are drawn at --temperature.
Exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mace_lora.commands import common
from mace_lora.errors import ConfigError
from mace_lora.parsing import ExistingAdapter, ExistingFile
from mace_lora.printing import Data
from mace_lora.upstream.known import ExistingModel

if TYPE_CHECKING:
    import ase
    import torch

    from mace_lora.trust.simulation import Run, Sample, Settings

EXAMPLES = """\
  mace_lora md ethanol.model start.xyz
  mace_lora md mini start.xyz --adapter ethanol_adapter --ensemble nve --ps 5 --output ethanol
"""
FILES = (".xyz", ".csv", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=ExistingModel, help=common.BASE_HELP)
    parser.add_argument(
        "start", type=ExistingFile, help="atoms, in any format of ASE; the first frame is taken"
    )
    parser.add_argument("--adapter", type=ExistingAdapter, help="an adapter directory of the model")
    parser.add_argument(
        "--ensemble", choices=["nvt", "nve"], default="nvt", help="what is constant (default: nvt)"
    )
    parser.add_argument("--temperature", type=float, default=300.0, help="K (default: 300)")
    parser.add_argument("--ps", type=float, default=1.0, help="picoseconds (default: 1)")
    parser.add_argument("--timestep", type=float, default=0.5, help="fs (default: 0.5)")
    parser.add_argument(
        "--every", type=int, default=10, help="steps from one frame to the next (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument(
        "--output",
        default="md",
        help="the beginning of the names of the files that are written (default: md)",
    )
    parser.add_argument("--head", help="the head that predicts (default: last)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument(
        "--default_dtype",
        choices=["float32", "float64"],
        default="float64",
        help="float32 is faster; energies of large systems are conserved in float64 alone",
    )
    common.add_trust(parser)


def run(options: argparse.Namespace) -> Data:
    paths = _paths(options)
    _check_numbers(options)
    from mace_lora.api.calculator import MaceLoraCalculator
    from mace_lora.frames.reading import read_atoms
    from mace_lora.model.description import heads
    from mace_lora.results.pictures import dynamics
    from mace_lora.trust.checks import DRIFT
    from mace_lora.trust.simulation import Settings, problems

    (atoms,) = read_atoms(options.start, most=1)
    steps = options.every * max(1, round(1e3 * options.ps / options.timestep / options.every))
    settings = Settings(
        options.ensemble,
        options.temperature,
        steps,
        options.timestep,
        options.seed,
        options.every,
    )
    model = _model(options)
    head = options.head or heads(model)[-1]
    atoms.calc = MaceLoraCalculator(
        model, device=options.device, default_dtype=options.default_dtype, head=head
    )
    start = time.perf_counter()
    done = _simulated(atoms, settings, paths)
    seconds = time.perf_counter() - start
    title = f"{atoms.symbols}, {options.ensemble.upper()}, {Path(options.model).name}"
    columns = {name: done.column(name) for name in ("time_ps", "potential_eV", "total_eV")}
    columns["temperature_K"] = done.column("temperature_K")
    dynamics(columns, len(atoms), paths[".png"], title, settings.kelvin)
    return {
        "model": str(options.model),
        "adapter": options.adapter,
        "ensemble": options.ensemble,
        "atoms": len(atoms),
        "ps": done.length_ps,
        "steps": done.samples[-1].step,
        "seconds": seconds,
        "mean_temperature": done.mean_kelvin(),
        "drift": done.drift(),
        "limit": DRIFT,
        "files": [str(path) for path in paths.values()],
        "problems": problems(done, settings),
    }


def _paths(options: argparse.Namespace) -> dict[str, Path]:
    """The files to be written, by suffix."""
    paths = {suffix: Path(f"{options.output}{suffix}") for suffix in FILES}
    for path in paths.values():
        common.check_folder(str(path), "output")
        if path.exists():
            raise ConfigError(
                f"--output={options.output}: there is {path} already; remove it or choose "
                "another name"
            )
    return paths


def _check_numbers(options: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that make no dynamics."""
    for name, most in (("temperature", 1e5), ("ps", 1e6), ("timestep", 10.0), ("every", 1e6)):
        value = getattr(options, name)
        if not 0 < value <= most:
            raise ConfigError(f"--{name}={value}: a number above 0, at most {most:g}, is needed")
    if options.seed < 0:
        raise ConfigError(f"--seed={options.seed}: a whole number, 0 or more, is needed")


def _model(options: argparse.Namespace) -> torch.nn.Module:
    import torch

    from mace_lora.api.files import load_adapter
    from mace_lora.model.description import check_head
    from mace_lora.model.merging import merge
    from mace_lora.upstream.devices import check_device

    check_device(options.device, options.default_dtype)
    dtype = getattr(torch, options.default_dtype)
    model = common.load(options.model, "model", dtype, options.trust)
    if options.adapter:
        model = merge(load_adapter(model, options.adapter), keep_gates=True)
    check_head(model, options.head, "--head")
    return model


def _simulated(atoms: ase.Atoms, settings: Settings, paths: dict[str, Path]) -> Run:
    """The dynamics, its files growing meanwhile."""
    import ase.io
    from ase.calculators.singlepoint import SinglePointCalculator
    from tqdm import tqdm

    from mace_lora.trust.simulation import COLUMNS, simulate

    total = settings.steps // settings.every + 1
    with (
        paths[".xyz"].open("w", encoding="utf-8") as trajectory,
        paths[".csv"].open("w", encoding="utf-8", newline="") as log,
        tqdm(total=total, unit_scale=settings.every, unit="step", disable=None) as bar,
    ):
        rows = csv.writer(log)
        rows.writerow(COLUMNS)

        def written(atoms: ase.Atoms, sample: Sample) -> None:
            frame = _bare(atoms)
            frame.calc = SinglePointCalculator(
                frame, energy=sample.potential_eV, forces=atoms.get_forces()
            )
            frame.info["time_ps"] = sample.time_ps
            ase.io.write(trajectory, frame, format="extxyz")
            rows.writerow(dataclasses.astuple(sample))
            for file in (trajectory, log):
                file.flush()
            bar.update()

        return simulate(atoms, settings, written)


def _bare(atoms: ase.Atoms) -> ase.Atoms:
    """What is there now: labels of the first frame would be false. Charge and spin stay."""
    import ase

    from mace_lora.frames.keys import ALIASES

    frame = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    frame.set_momenta(atoms.get_momenta())
    inputs = {key for keys in ALIASES.values() for key in keys}
    frame.info = {key: value for key, value in atoms.info.items() if key in inputs}
    return frame


def text(data: Data) -> str:
    drift = data["drift"]
    lines = [
        f"{data['atoms']} atoms, {data['ensemble'].upper()}: {data['steps']} steps, "
        f"{data['ps']:.3f} ps, in {data['seconds']:.1f} s",
        f"mean temperature of the second half: {data['mean_temperature']:.0f} K",
    ]
    if data["ensemble"] == "nve":
        lines.append(
            "drift of the total energy: too short a run to tell"
            if drift is None
            else f"drift of the total energy: {drift:+.3g} meV per atom and ps "
            f"(limit {data['limit']:g})"
        )
    lines.append(
        f"not sound: {'; '.join(data['problems'])}" if data["problems"] else "sound: nothing broke"
    )
    lines.append(f"written: {', '.join(data['files'])}")
    return "\n".join(lines)
