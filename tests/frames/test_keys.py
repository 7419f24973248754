"""Keys that were forgotten: the evident one is taken and told, others are named with flags."""

from __future__ import annotations

import io

import ase
import ase.io
import numpy as np
import pytest

from mace_lora.errors import DataError
from mace_lora.frames import keys
from mace_lora.frames.labels import labels
from mace_lora.upstream.inputs import Input

CHARGE = Input("total_charge", "total_charge", 0.0, lowest=-100, highest=100)
SPIN = Input("total_spin", "total_spin", 1.0, lowest=0, highest=100)
INPUTS = {"total_charge": CHARGE, "total_spin": SPIN}


def read(header: str, columns: str = "", values: str = "", n: int = 2) -> list[ase.Atoms]:
    """Frames of hydrogen as ASE reads them from extended xyz."""
    line = f"2\n{header} Properties=species:S:1:pos:R:3{columns}\n"
    atoms = "".join(f"H 0 0 {i} {values}\n" for i in range(2))
    return ase.io.read(io.StringIO((line + atoms) * n), index=":", format="extxyz")


def find(frames, **asked: str) -> keys.Keys:
    return keys.find("a.xyz", frames, {**keys.DEFAULTS, **asked})


def test_ase_keys_are_evident():
    frames = read("energy=-2.5", ":forces:R:3", "1 2 3")
    found = find(frames)
    assert found.names["energy"] == "energy"
    assert found.names["forces"] == "forces"
    assert found.names["stress"] == "REF_stress"
    assert found.said == (
        "a.xyz has no REF_energy and REF_forces: taken is energy from 'energy', forces from "
        "'forces' (--energy_key=energy --forces_key=forces)",
    )
    values = labels(frames[0], found.names)
    assert values["energy"] == -2.5
    assert np.array_equal(values["forces"], [[1, 2, 3], [1, 2, 3]])


def test_the_second_key_is_evident_where_the_first_is_ases():
    frames = read("energy=-2.5", ":forces:R:3", "1 2 3")
    assert find(frames, energy="energy").names["forces"] == "forces"


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("REF_energy=-2.5", ":REF_forces:R:3"),  # nothing is missing
        ("REF_energy=-2.5", ":forces:R:3"),  # forces of another method?
        ("dft_energy=-2.5", ":dft_forces:R:3"),  # not ASE's names
        ("energy_per_atom=-2.5", ":velocities:R:3"),
    ],
)
def test_nothing_is_guessed(header, columns):
    found = find(read(header, columns, "1 2 3"))
    assert found.names == keys.DEFAULTS
    assert not found.said


def test_two_keys_that_may_be_the_energy():
    frames = read("energy=-2.5 dft_energy=-3.5", ":forces:R:3", "1 2 3")
    assert find(frames).names["energy"] == "REF_energy"
    text = keys.remedy(frames, {"energy": "REF_energy"})
    assert "the file has dft_energy, energy, forces" in text
    assert "add --energy_key=energy (energy may also be 'dft_energy')" in text
    same = read("energy=-2.5 dft_energy=-2.5", ":forces:R:3", "1 2 3")
    assert find(same).names["energy"] == "energy"


def test_flags_to_paste():
    frames = read("dft_energy=-2.5 charge=0", ":dft_force:R:3", "1 2 3")
    text = keys.remedy(frames, {"energy": "REF_energy", "forces": "REF_forces"})
    assert text == (
        "the file has charge, dft_energy, dft_force; if that is what is meant, add "
        "--energy_key=dft_energy --forces_key=dft_force"
    )
    bare = read('note="nothing"')
    text = keys.remedy(bare, {"energy": "E", "forces": "F"})
    assert text == "the file has note; name the right ones with --energy_key and --forces_key"


def test_a_stress_is_evident_where_there_is_a_volume():
    stress = 'stress="1 0 0 0 2 0 0 0 3" energy=1 free_energy=1'
    assert find(read(stress)).names["stress"] == "REF_stress"
    crystal = read(f'{stress} Lattice="5 0 0 0 5 0 0 0 5"')
    assert find(crystal).names["stress"] == "stress"
    assert keys.find("a.xyz", crystal, keys.DEFAULTS, ["energy"]).names["stress"] == "REF_stress"


def find_inputs(frames, **asked: str) -> keys.Keys:
    return keys.find("a.xyz", frames, {**keys.DEFAULTS, **asked}, inputs=INPUTS)


@pytest.mark.parametrize("spin", ["spin", "multiplicity", "total_spin"])
@pytest.mark.parametrize("charge", ["charge", "total_charge"])
def test_charge_and_spin_are_evident(charge, spin):
    found = find_inputs(read(f"REF_energy=1 {charge}=-1 {spin}=2"))
    assert (found.names["total_charge"], found.names["total_spin"]) == (charge, spin)
    told = " ".join(found.said)
    assert (f"--total_charge_key={charge}" in told) == (charge == "charge")
    assert (f"--total_spin_key={spin}" in told) == (spin != "total_spin")


def test_neutral_frames_need_no_key():
    for header in ("", "charge=0 spin=1"):
        found = find_inputs(read(f"REF_energy=1 {header}"))
        assert found.names == keys.DEFAULTS
        assert not found.said


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("charge=1 net_charge=2", "add --total_charge_key=charge or --total_charge_key=net_charge"),
        ("charge_of_cell=1", "add --total_charge_key=charge_of_cell"),
        ("charge=1 spin=0", "the multiplicity 2S + 1 is needed"),
    ],
)
def test_what_may_be_a_charge_or_spin_is_not_passed_over(header, expected):
    with pytest.raises(DataError, match="has no total") as error:
        find_inputs(read(f"REF_energy=1 {header}"))
    assert expected in str(error.value)


def test_a_wrong_key_of_the_charge():
    with pytest.raises(DataError, match=r"under the key 'Q'.*add --total_charge_key=charge"):
        find_inputs(read("REF_energy=1 charge=1 spin=1"), total_charge="Q")
