"""E0s of frames whose compositions leave some of them open."""

from __future__ import annotations

import logging
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from helpers.running import here, short_run

from mace_lora.frames.isolated_atoms import known_theories, settle

ETHANOL = np.array([6, 6, 8, 1, 1, 1, 1, 1, 1])
WATER, METHANE = np.array([8, 1, 1]), np.array([6, 1, 1, 1, 1])
DFT = {1: -13.6, 6: -1029.5, 8: -2042.0}  # eV, as of most functionals with all electrons
PBE = {1: -13.57, 6: -1027.26, 8: -2038.53}  # in def2-SVP, as rMD17
VALENCE = {1: -1.1, 6: -1.3, 8: -1.6}
URACIL = Path(__file__).parents[1] / "data" / "uracil.xyz"


def spread(e0s: dict[int, float], composition: np.ndarray) -> dict[int, float]:
    """What least squares makes of one composition, from nothing: the smallest numbers."""
    zs, n = np.unique(composition, return_counts=True)
    total = sum(e0s[int(z)] for z in composition)
    return {int(z): k * total / (n @ n) for z, k in zip(zs, n, strict=True)}


@pytest.mark.parametrize("composition", [ETHANOL, WATER, METHANE])
@pytest.mark.parametrize(
    ("labels", "theory"),
    [
        (DFT, "wB97X, all electrons"),
        (PBE, "PBE, all electrons"),
        (VALENCE, "PBE, valence electrons"),
    ],
)
def test_one_composition_follows_the_theory_of_its_labels(composition, labels, theory):
    """All E0s come within tenths of an eV of the labels' own; hundreds of eV without."""
    fitted = spread(labels, composition)
    choice = settle(fitted, {1: -10.7, 6: -48.8, 8: -102.5}, [composition] * 3)
    assert choice.theory == theory
    assert choice.determined == 1
    assert {z: choice.e0s[z] for z in fitted} == pytest.approx(
        {z: labels[z] for z in fitted}, abs=0.3
    )
    total = sum(labels[int(z)] for z in composition)
    assert sum(choice.e0s[int(z)] for z in composition) == pytest.approx(total, abs=1e-8)


def test_labels_of_the_foundations_theory_keep_its_energies():
    foundation = {1: -10.707, 6: -48.798, 8: -102.522}
    choice = settle(spread(foundation, ETHANOL), foundation, [ETHANOL])
    assert choice.theory == "the foundation model"
    assert choice.e0s == pytest.approx(foundation, abs=1e-9)


def test_what_the_frames_determine_is_least_squares():
    """All three elements: nothing is touched. Two compositions: both sums are kept."""
    fitted = {1: -5.0, 6: -7.0, 8: -9.0}
    whole = settle(fitted, DFT, [ETHANOL, WATER, METHANE])
    assert (whole.e0s, whole.theory, whole.determined) == (fitted, "", 3)
    two = settle(fitted, DFT, [ETHANOL, WATER])
    assert two.determined == 2
    for frame in (ETHANOL, WATER):
        sums = [sum(e0s[int(z)] for z in frame) for e0s in (two.e0s, fitted)]
        assert sums[0] == pytest.approx(sums[1])


def test_elements_in_no_frame_keep_theirs():
    fitted = {**spread(DFT, WATER), 6: -48.8, 9: -1.0}
    found = settle(fitted, DFT, [WATER]).e0s
    assert (found[6], found[9]) == (-48.8, -1.0)


def test_elements_in_no_frame_follow_the_theory_of_the_others():
    """A run that keeps them has one theory, as far as its table goes; else they keep theirs."""
    foundation = {1: -10.7, 6: -48.8, 8: -102.5, 9: -120.0, 14: -110.0}
    choice = settle(spread(PBE, WATER), foundation, [WATER], kept=foundation)
    table = known_theories()[choice.theory]
    assert choice.theory == "PBE, all electrons"
    assert {z: choice.e0s[z] for z in (6, 9)} == {z: table[z] for z in (6, 9)}
    assert (choice.followed, choice.foreign) == ([6, 9], [14])
    assert 14 not in choice.e0s  # and so the foundation model's
    of_its_own = settle(spread(foundation, WATER), foundation, [WATER], kept=foundation)
    assert of_its_own.theory == "the foundation model"
    assert not of_its_own.followed


@pytest.mark.slow
def test_a_run_that_keeps_all_elements(tmp_path, small_data, caplog):
    """Nitrogen, which ethanol lacks, has the theory that the others were given."""
    flags = short_run(small_data, "mini", "--max_num_epochs=1", "--E0s=estimated")
    with caplog.at_level(logging.INFO):
        assert here(tmp_path, *flags, "--foundation_filter_elements=False") == ""
    nitrogen = known_theories()["PBE, all electrons"][7]
    assert final_e0s(tmp_path)[7] == pytest.approx(nitrogen, abs=1e-4)
    assert f"Elements in no frame have those of its isolated atoms: N {nitrogen:.2f}" in caplog.text


def test_the_tables_tell_their_theories_apart():
    """H, C, N and O in each; all electrons by hundreds of eV below valence electrons."""
    tables = known_theories()
    assert all({1, 6, 7, 8} <= table.keys() for table in tables.values())
    assert tables["wB97X, all electrons"][6] < tables["PBE, valence electrons"][6] - 900


def test_a_theory_without_one_of_the_elements_is_passed_over():
    """Frames with Br can't follow a table that ends before it, however near the rest would be."""
    labels = {**PBE, 35: -70045.0}
    bromomethane = np.repeat([6, 1, 35], [1, 3, 1])
    foundation = {1: -10.7, 6: -48.8, 35: -110.0}
    choice = settle(spread(labels, bromomethane), foundation, [bromomethane])
    assert 35 not in known_theories()["PBE, all electrons"]
    assert choice.theory == "wB97M-D3(BJ), all electrons"


def final_e0s(folder: Path) -> dict[int, float]:
    model = torch.load(folder / "run.model", weights_only=False)
    energies = model.atomic_energies_fn.atomic_energies.double()
    rows = [
        dict(zip(model.atomic_numbers.tolist(), r.tolist(), strict=True))
        for r in energies.reshape(-1, len(model.atomic_numbers))
    ]
    return rows[-1]


@pytest.mark.slow
def test_a_run_on_ethanol_alone(tmp_path, small_data, foundation, caplog):
    """rMD17 is PBE with all electrons, `mini` GFN2-xTB: one eV per atom apart, not hundreds."""
    flags = short_run(small_data, "mini", "--max_num_epochs=1", "--E0s=estimated")
    with caplog.at_level(logging.INFO):
        assert here(tmp_path, *flags) == ""
    found = final_e0s(tmp_path)
    assert found == pytest.approx(PBE, abs=1.2)
    assert "The frames determine 1 of 3 E0s" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("where", ["--E0s", "frames"])
def test_isolated_atoms_of_the_user_win(tmp_path, small_data, where):
    given = {1: -13.5, 6: -1028.0, 8: -2041.0}
    files, e0s = dict(small_data), str(given)
    if where == "frames":
        e0s, files["train"] = "estimated", str(tmp_path / "train.xyz")
        kind = "IsolatedAtom"
        atoms = [
            ase.Atoms([z], info={"config_type": kind, "REF_energy": e}) for z, e in given.items()
        ]
        ase.io.write(files["train"], [*atoms, *ase.io.read(small_data["train"], ":")])
    flags = short_run(files, "mini", "--max_num_epochs=1", f"--E0s={e0s}")
    assert here(tmp_path, *flags) == ""
    assert final_e0s(tmp_path) == given


@pytest.mark.slow
def test_heads_of_different_elements(tmp_path, small_data):
    """Each head by its own frames."""
    heads = {
        "ethanol": {"train_file": small_data["train"], "valid_file": small_data["valid"]},
        "uracil": {"train_file": str(URACIL), "valid_file": str(URACIL)},
    }
    heads = {name: {**head, "E0s": "estimated"} for name, head in heads.items()}
    files = ("--train_file", "--valid_file", "--test_file")
    flags = [f for f in short_run(small_data, "mini") if not f.startswith(files)]
    assert here(tmp_path, *flags, f"--heads={heads}", "--max_num_epochs=1") == ""
    model = torch.load(tmp_path / "run.model", weights_only=False)
    rows = model.atomic_energies_fn.atomic_energies.double()
    assert model.atomic_numbers.tolist() == [1, 6, 7, 8]
    by_head = dict(zip(model.heads, rows.tolist(), strict=True))
    assert by_head["uracil"] == pytest.approx([-13.57, -1027.26, -1482.11, -2038.53], abs=2)
    h, c, _, o = by_head["ethanol"]
    assert [h, c, o] == pytest.approx(list(PBE.values()), abs=1.2)
