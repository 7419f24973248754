"""Models that read a charge and a spin: in the calculator and in commands, never neutral unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from helpers.adapter_folders import make_adapter
from helpers.frames import ethanol
from helpers.running import tool_fails, tool_prints
from mace.calculators import MACECalculator

from mace_lora import MaceLoraCalculator
from mace_lora.errors import DataError


@pytest.fixture
def base(build) -> torch.nn.Module:
    return build("charge_spin")


@pytest.fixture
def charged(base) -> list[ase.Atoms]:
    """Three frames, labelled by the model itself through MACECalculator."""
    frames = ethanol("train", 3)
    for frame, charge, spin in zip(frames, (0, -1, 1), (1, 2, 2), strict=True):
        frame.info = {"charge": charge, "spin": spin}
        frame.arrays.pop("REF_forces")
        frame.calc = MACECalculator(models=[base], default_dtype="float64")
        energy, forces = frame.get_potential_energy(), frame.get_forces()
        frame.calc = None
        frame.info["REF_energy"], frame.arrays["REF_forces"] = energy, forces
    return frames


def renamed(frames: list[ase.Atoms], **names: str) -> list[ase.Atoms]:
    for frame in frames:
        for name, new in names.items():
            frame.info[new] = frame.info.pop(name)
    return frames


def energies(calculator, frames: list[ase.Atoms]) -> list[float]:
    found = []
    for frame in frames:
        frame.calc = calculator
        found.append(frame.get_potential_energy())
        frame.calc = None
    return found


@pytest.mark.parametrize(
    "names",
    [{}, {"charge": "total_charge", "spin": "total_spin"}, {"spin": "multiplicity"}],
    ids=["charge", "total_charge", "multiplicity"],
)
def test_the_calculator_reads_charge_and_spin(base, charged, names):
    labels = [frame.info["REF_energy"] for frame in charged]
    assert np.ptp(labels) > 1e-3
    calculator = MaceLoraCalculator(base=base, default_dtype="float64")
    assert energies(calculator, renamed(charged, **names)) == pytest.approx(labels, abs=1e-10)


def test_the_calculator_with_keys_of_the_caller(base, charged):
    label = charged[1].info["REF_energy"]
    frames = renamed(charged, charge="Q", spin="M")
    keys = {"total_charge": "Q", "total_spin": "M"}
    calculator = MaceLoraCalculator(base=base, default_dtype="float64", info_keys=keys)
    assert energies(calculator, frames[1:2]) == pytest.approx([label], abs=1e-10)


def test_a_changed_charge_is_computed_again(base, charged, tmp_path):
    folder = make_adapter(base, tmp_path / "one")
    atoms = charged[0]
    atoms.calc = MaceLoraCalculator(base=base, adapter=folder, default_dtype="float64")
    neutral = atoms.get_potential_energy()
    atoms.info["step"] = 5  # nothing that a model reads
    assert not atoms.calc.calculation_required(atoms, ["energy"])
    atoms.info["charge"] = 1
    assert atoms.calc.calculation_required(atoms, ["energy"])
    charged_up = atoms.get_potential_energy()
    assert abs(charged_up - neutral) > 1e-3
    fresh = MaceLoraCalculator(base=base, adapter=folder, default_dtype="float64")
    assert energies(fresh, [atoms]) == [charged_up]


def test_charges_that_the_calculator_can_not_take(base, charged):
    calculator = MaceLoraCalculator(base=base)
    atoms = charged[0]
    atoms.info["charge"] = 3
    with pytest.raises(DataError, match=r"total charge .* is 3: the model knows -2 to 2"):
        energies(calculator, [atoms])
    atoms.info |= {"charge": 0, "total_charge": 1}
    with pytest.raises(DataError, match=r"total_charge and charge, which differ"):
        energies(calculator, [atoms])


def test_descriptors_and_hessian(base, charged, tmp_path):
    atoms = charged[1]
    own = MACECalculator(models=[base], default_dtype="float64")
    ours = MaceLoraCalculator(base=base, default_dtype="float64")
    assert np.allclose(ours.get_descriptors(atoms), own.get_descriptors(atoms), atol=1e-12)
    every = {"invariants_only": False, "num_layers": 1}
    expected = own.get_descriptors(atoms, **every)
    assert np.allclose(ours.get_descriptors(atoms, **every), expected, atol=1e-12)
    hessian = ours.get_hessian(atoms)
    assert hessian.shape == (3 * len(atoms), len(atoms), 3)
    assert np.allclose(hessian, own.get_hessian(atoms), atol=1e-12)
    before = ours.get_descriptors(atoms)
    ours.set_adapter(make_adapter(base, tmp_path / "one"))
    assert np.abs(ours.get_descriptors(atoms) - before).max() > 1e-3


@pytest.fixture
def files(base, tmp_path):
    """Write frames; flags of eval for the model and them."""

    def write(frames: list[ase.Atoms]) -> list[str]:
        torch.save(base, tmp_path / "omol.model")
        ase.io.write(tmp_path / "data.xyz", frames)
        return ["--model", tmp_path / "omol.model", "--data", tmp_path / "data.xyz"]

    return write


def error_of(capsys, flags: list[str | Path]) -> tuple[float, str]:
    """MAE of the energies (meV per atom), and what is said before."""
    data = json.loads(tool_prints(capsys, "eval", *flags, "--json"))
    return data["files"][0]["models"]["omol"][0]["mae"]["energy"], " ".join(data["said"])


def test_eval_takes_the_evident_key(capsys, files, charged):
    error, said = error_of(capsys, files(charged))
    assert error < 1e-6
    assert "--total_charge_key=charge" in said
    assert "--total_spin_key=spin" in said


def test_eval_with_keys(capsys, files, charged):
    flags = files(renamed(charged, charge="Q", spin="M"))
    keys = ["--total_charge_key", "Q", "--total_spin_key", "M"]
    error, said = error_of(capsys, [*flags, *keys])
    assert error < 1e-6
    assert said == ""
    error, said = error_of(capsys, [*flags, *keys[:2]])
    assert error > 1
    assert "no total spin (key 'total_spin'): the model takes 1 for every frame" in said


def test_eval_of_frames_whose_charge_can_not_be_told(files, charged):
    text = tool_fails("eval", *files(renamed(charged, charge="charge_of_cell")))
    assert "data.xyz has no total charge under the key 'total_charge'" in text
    assert "add --total_charge_key=charge_of_cell" in text


def test_extract_measures_with_charges(capsys, base, files, charged, tmp_path):
    flags = files(charged)
    torch.save(base, tmp_path / "full.model")
    names = ["--base", flags[1], "--finetuned", tmp_path / "full.model", *flags[2:]]
    data = json.loads(tool_prints(capsys, "extract", *names, "--output", tmp_path / "a", "--json"))
    assert {name: e["energy"] < 1e-6 for name, e in data["errors"].items()} == {
        "base": True,
        "fine-tuned": True,
        "adapter": True,
    }
    assert "--total_charge_key=charge" in " ".join(data["said"])
