"""eval on files as people have them: other keys, gaps, constraints, slabs, heads, odd names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from helpers.adapter_folders import make_adapter
from helpers.running import tool_fails, tool_prints
from mace.calculators import MACECalculator

from mace_lora import load_adapter, merge


def crystals(n: int = 3) -> list[ase.Atoms]:
    frames = []
    for i in range(n):
        atoms = bulk("C", "diamond", a=3.6, cubic=True)
        atoms.rattle(0.1, seed=i)
        atoms.symbols[:2] = ["H", "O"]
        frames.append(atoms)
    return frames


def predicted(model: torch.nn.Module, atoms: ase.Atoms, head: str | None = None) -> dict[str, Any]:
    """Energy, forces and stress (3 x 3) of a frame through MACECalculator."""
    atoms = atoms.copy()
    atoms.calc = MACECalculator(models=[model], default_dtype="float64", head=head)
    return {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(apply_constraint=False),
        "stress": atoms.get_stress(voigt=False),
    }


@pytest.fixture
def labelled(base) -> list[ase.Atoms]:
    """Crystals under mace-torch's keys, labelled by the model itself: it has no error on them."""
    frames = crystals()
    for atoms in frames:
        found = predicted(base, atoms)
        atoms.info |= {"REF_energy": found["energy"], "REF_stress": found["stress"].ravel()}
        atoms.arrays["REF_forces"] = found["forces"]
    return frames


@pytest.fixture
def evaluate(base_file, tmp_path, capsys) -> Callable[..., dict[str, Any]]:
    """Write frames, evaluate the base model on them; the result as data."""

    def run(frames: list[ase.Atoms], *flags: object, name: str = "data.xyz") -> dict[str, Any]:
        if frames:
            ase.io.write(tmp_path / name, frames, format="extxyz")
        where = ["--model", base_file, "--data", tmp_path / name]
        return json.loads(tool_prints(capsys, "eval", *where, *flags, "--json"))

    return run


def errors(data: dict[str, Any]) -> dict[str, float]:
    """MAE by quantity over all frames of the first file, for the base model."""
    return data["files"][0]["models"]["base"][0]["mae"]


NOTHING = {q: pytest.approx(0, abs=1e-4) for q in ("energy", "forces", "stress")}


def test_the_models_own_labels_leave_no_error(evaluate, labelled):
    data = evaluate(labelled)
    assert errors(data) == NOTHING
    assert data["said"] == []
    assert data["heads"] == {}


def under_ases_names(atoms: ase.Atoms) -> ase.Atoms:
    """As ASE writes a frame with a calculator: energy=... stress=..., a column called forces."""
    found = {
        "energy": atoms.info.pop("REF_energy"),
        "forces": atoms.arrays.pop("REF_forces"),
        "stress": atoms.info.pop("REF_stress").reshape(3, 3).ravel()[[0, 4, 8, 5, 2, 1]],
    }
    atoms.calc = SinglePointCalculator(atoms, **found)
    return atoms


def test_both_keys_forgotten(evaluate, labelled):
    data = evaluate([under_ases_names(atoms) for atoms in labelled])
    assert errors(data) == NOTHING
    (said,) = data["said"]
    assert "--energy_key=energy --forces_key=forces --stress_key=stress" in said


def test_other_keys_are_named_with_flags(base_file, labelled, tmp_path):
    for atoms in labelled:
        atoms.info = {"dft_energy": atoms.info["REF_energy"]}
        atoms.arrays["dft_forces"] = atoms.arrays.pop("REF_forces")
    ase.io.write(tmp_path / "data.xyz", labelled)
    text = tool_fails("eval", "--model", base_file, "--data", tmp_path / "data.xyz")
    assert "no energies under 'REF_energy' and no forces under 'REF_forces'" in text
    assert "add --energy_key=dft_energy --forces_key=dft_forces" in text


@pytest.mark.parametrize("fault", ["gap", "None"])
def test_frames_without_a_label_count_nowhere(evaluate, labelled, fault):
    """A mean that took their energies as 0 would be off by thousands."""
    del labelled[0].info["REF_energy"], labelled[2].info["REF_stress"]
    del labelled[1].arrays["REF_forces"]
    if fault == "None":
        labelled[0].info["REF_energy"] = "None"
    assert errors(evaluate(labelled)) == NOTHING


@pytest.mark.parametrize("text", ["-4209.7d0", "-4209.7 eV"])
def test_labels_that_are_texts(base_file, labelled, tmp_path, text):
    labelled[1].info["REF_energy"] = text
    ase.io.write(tmp_path / "data.xyz", labelled)
    said = tool_fails("eval", "--model", base_file, "--data", tmp_path / "data.xyz")
    assert "data.xyz, frame 1: energy (key 'REF_energy')" in said
    assert text in said


def test_forces_of_fixed_atoms_count(evaluate, labelled):
    for atoms in labelled:
        atoms.set_constraint(FixAtoms([0, 1, 2]))
        under_ases_names(atoms)
    assert np.abs(labelled[0].calc.results["forces"][:3]).max() > 1e-3
    data = evaluate(labelled)
    assert errors(data)["forces"] == NOTHING["forces"]


def strained_energy(model: torch.nn.Module, atoms: ase.Atoms, strain: np.ndarray) -> float:
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return predicted(model, atoms)["energy"]


@pytest.mark.parametrize("pbc", [(True, True, False), (True, False, False)])
def test_stress_of_slabs_and_wires(base, evaluate, labelled, pbc):
    """By finite differences of the energy, per volume of the frame's own cell."""
    atoms = labelled[0]
    atoms.pbc = pbc
    found = predicted(base, atoms)
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = found["energy"], found["forces"]
    stress = np.zeros((3, 3))
    for i in range(3):
        for j in range(i, 3):
            strain = np.zeros((3, 3))
            strain[i, j] += 5e-5
            strain[j, i] += 5e-5
            ends = [strained_energy(base, atoms, sign * strain) for sign in (1, -1)]
            stress[i, j] = stress[j, i] = (ends[0] - ends[1]) / 2e-4
    atoms.info["REF_stress"] = (stress / atoms.get_volume()).ravel()
    assert np.abs(atoms.info["REF_stress"]).max() > 1e-3
    assert errors(evaluate([atoms]))["stress"] < 1e-3


def test_six_components_are_those_of_the_matrix(evaluate, labelled):
    for atoms in labelled:
        atoms.info["REF_stress"] = atoms.info["REF_stress"][[0, 4, 8, 5, 2, 1]]
    assert errors(evaluate(labelled))["stress"] == NOTHING["stress"]


def test_a_name_with_an_at(evaluate, labelled):
    """ASE would look for a file called water, and take the rest for frames to choose."""
    assert errors(evaluate(labelled, name="water@300.xyz")) == NOTHING


@pytest.fixture
def two_heads(base, tmp_path) -> Path:
    return make_adapter(base, tmp_path / "two", heads=("a", "b"))


@pytest.fixture
def of_heads(base, two_heads, labelled) -> list[ase.Atoms]:
    """Frames whose energies are those of heads b, a and b of the adapter, which they name."""
    merged = merge(load_adapter(base, two_heads))
    for atoms, head in zip(labelled, "bab", strict=True):
        atoms.info["REF_energy"] = predicted(merged, atoms, head)["energy"]
        atoms.info["head"] = head
    return labelled


def of_adapter(data: dict[str, Any]) -> float:
    return data["files"][0]["models"]["two"][0]["mae"]["energy"]


def test_a_head_that_only_the_adapter_has(evaluate, of_heads, two_heads):
    """The base model, which has one head, predicts with that; heads a and b are 1 eV apart."""
    flags = ["--adapter", two_heads, "--head"]
    data = evaluate(of_heads[::2], *flags, "b")
    assert of_adapter(data) == pytest.approx(0, abs=1e-6)
    assert data["heads"] == {"base": ["Default"], "two": ["b"]}
    assert of_adapter(evaluate([], *flags, "a")) > 900
    assert of_adapter(evaluate(of_heads[1:2], *flags, "a")) == pytest.approx(0, abs=1e-6)


def test_heads_that_the_frames_name(evaluate, of_heads, two_heads):
    data = evaluate(of_heads, "--adapter", two_heads)
    assert of_adapter(data) == pytest.approx(0, abs=1e-6)
    assert data["heads"]["two"] == ["a", "b"]
    for atoms in of_heads:
        atoms.info["level"] = atoms.info.pop("head")
    data = evaluate(of_heads, "--adapter", two_heads, "--head_key", "level")
    assert of_adapter(data) == pytest.approx(0, abs=1e-6)


def test_several_heads_and_none_is_named(base_file, of_heads, two_heads, tmp_path):
    del of_heads[1].info["head"]
    ase.io.write(tmp_path / "data.xyz", of_heads)
    flags = ["--model", base_file, "--adapter", two_heads, "--data", tmp_path / "data.xyz"]
    text = tool_fails("eval", *flags)
    assert "two has several heads, a, b: choose one with --head=b" in text
    assert "no model has such a head; known: Default, a, b" in tool_fails(
        "eval", *flags, "--head", "c"
    )
