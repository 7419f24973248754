"""One frame's labels: the numbers of the file, whatever key, form and constraints it has."""

from __future__ import annotations

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, Hookean

from mace_lora.errors import DataError
from mace_lora.frames import labels

FORCES = np.array([[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]])
STRESS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
MATRIX = np.array([[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]])
ASE_KEYS = {name: name for name in ("energy", "forces", "stress", "dipole", "charges")}


def carbon_monoxide() -> ase.Atoms:
    return ase.Atoms("CO", [[0, 0, 0], [0, 0, 1.1]], cell=[4, 4, 4], pbc=True)


def computed(**results) -> ase.Atoms:
    atoms = carbon_monoxide()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


@pytest.mark.parametrize("format", ["extxyz", "traj", "json"])
def test_forces_of_fixed_atoms_are_those_of_the_file(tmp_path, format):
    atoms = computed(energy=-3.0, forces=FORCES)
    atoms.set_constraint(FixAtoms([0]))
    ase.io.write(tmp_path / "file", atoms, format=format)
    read = ase.io.read(tmp_path / "file", format=format)
    assert len(read.constraints) == 1
    assert np.abs(read.get_forces()[0]).max() == 0  # what mace-torch takes
    np.testing.assert_array_equal(labels.labels(read, ASE_KEYS)["forces"], FORCES)


def test_other_constraints_change_nothing(tmp_path):
    """A spring adds to the energy and the forces that ASE gives."""
    atoms = computed(energy=-3.0, forces=FORCES)
    atoms.set_constraint(Hookean(0, 1, k=5.0, rt=0.5))
    assert atoms.get_potential_energy() != -3.0
    found = labels.labels(atoms, ASE_KEYS)
    assert found["energy"] == -3.0
    np.testing.assert_array_equal(found["forces"], FORCES)


def test_labels_that_a_frame_lacks_are_absent():
    assert labels.labels(computed(energy=-3.0), ASE_KEYS).keys() == {"energy"}
    assert labels.labels(computed(forces=FORCES), ASE_KEYS).keys() == {"forces"}
    assert labels.labels(carbon_monoxide(), ASE_KEYS) == {}
    assert labels.labels(carbon_monoxide(), labels.DEFAULT_KEYS) == {}
    written = carbon_monoxide()
    written.info["REF_energy"] = "None"  # as ASE writes what is None
    assert labels.labels(written, labels.DEFAULT_KEYS) == {}


@pytest.mark.parametrize("value", [STRESS, MATRIX, MATRIX.ravel(), list(STRESS)], ids=str)
@pytest.mark.parametrize("label", ["stress", "virials"])
def test_six_numbers_nine_and_a_matrix_are_the_same(label, value):
    atoms = carbon_monoxide()
    atoms.info[f"REF_{label}"] = value
    np.testing.assert_array_equal(labels.labels(atoms, labels.DEFAULT_KEYS)[label], MATRIX)


def test_the_stress_of_ase_is_the_same_matrix(tmp_path):
    ase.io.write(tmp_path / "file.xyz", computed(energy=0.0, stress=STRESS))
    read = ase.io.read(tmp_path / "file.xyz")
    np.testing.assert_array_equal(labels.labels(read, ASE_KEYS)["stress"], MATRIX)


def test_labels_in_columns_and_in_one_element_arrays():
    atoms = carbon_monoxide()
    atoms.info |= {"E": np.array([-3.0]), "mu": np.ones((1, 3))}
    atoms.arrays["q"] = np.array([[0.1], [-0.1]])
    found = labels.labels(atoms, {"energy": "E", "dipole": "mu", "charges": "q"})
    assert found["energy"].shape == ()
    assert found["dipole"].shape == (3,)
    assert found["charges"].shape == (2,)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("REF_energy", "-4209.7 eV", "energy (key 'REF_energy') holds '-4209.7 eV', where plain"),
        ("REF_energy", np.zeros(2), "energy (key 'REF_energy') of shape (2,), expected () or (1,)"),
        ("REF_stress", np.zeros(4), "of shape (4,), expected (3, 3) or (9,) or (6,)"),
    ],
)
def test_labels_that_are_none(key, value, expected):
    atoms = carbon_monoxide()
    atoms.info[key] = value
    with pytest.raises(DataError) as error:
        labels.labels(atoms, labels.DEFAULT_KEYS)
    assert expected in str(error.value)


@pytest.mark.parametrize("text", ["liquid", "300", "T", "F", "1.5", "-2"])
def test_types_are_what_stands_in_the_file(tmp_path, text):
    """ASE makes numbers and truth values of some."""
    (tmp_path / "a.xyz").write_text(
        f"1\nconfig_type={text} Properties=species:S:1:pos:R:3\nH 0 0 0"
    )
    assert labels.type_of(ase.io.read(tmp_path / "a.xyz").info["config_type"]) == text


@pytest.mark.parametrize("value", [-1.0, np.nan, "much"])
def test_weights_that_are_none(value):
    atoms = carbon_monoxide()
    atoms.info["config_weight"] = value
    with pytest.raises(DataError, match="a number, 0 or more, is needed"):
        labels.weight(atoms, "config_weight")
    assert labels.weight(atoms, "config_energy_weight") == 1.0
