"""The fast calculator is MACECalculator, to the rounding of float64: whatever moves in between."""

from __future__ import annotations

from copy import deepcopy

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from helpers.adapter_folders import make_adapter
from mace.calculators import MACECalculator

from mace_lora import MaceLoraCalculator, load_adapter, load_foundation, merge
from mace_lora.backends import library
from mace_lora.errors import ConfigError
from mace_lora.upstream.calculating import calculator
from mace_lora.upstream.neighbours import Neighbours

KEYS = ("energy", "free_energy", "forces", "stress", "energies", "node_energy")


def crystal() -> ase.Atoms:
    atoms = bulk("C", "diamond", a=3.6, cubic=True)
    atoms.symbols[:4] = ["H", "O", "H", "C"]
    atoms.rattle(0.1, seed=1)
    return atoms


def slab() -> ase.Atoms:
    atoms = crystal()
    atoms.pbc = (True, True, False)
    return atoms


FRAMES = {"molecule": lambda: molecule("CH3CH2OH"), "crystal": crystal, "slab": slab}


def apart(one, other, atoms: ase.Atoms) -> float:
    """The largest difference of any result, relative to the largest value of that result."""
    for each in (one, other):
        each.calculate(atoms.copy())
    assert set(one.results) == set(other.results)
    pairs = [(np.asarray(one.results[k]), np.asarray(other.results[k])) for k in KEYS]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def theirs(*models: torch.nn.Module, **settings) -> MACECalculator:
    return MACECalculator(models=list(map(deepcopy, models)), default_dtype="float64", **settings)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("name", ["residual", "plain_mace", "density_zbl_agnesi", "mini"])
def test_results_are_those_of_macecalculator(build, name, frame):
    model = load_foundation("mini", dtype=torch.float64) if name == "mini" else build(name)
    atoms = FRAMES[frame]()
    ours = MaceLoraCalculator(model, default_dtype="float64")
    assert apart(ours, theirs(model), atoms) < 1e-10


def test_a_file_of_any_model(build, tmp_path):
    torch.save(build("high_order"), tmp_path / "my.model")
    ours = MaceLoraCalculator(tmp_path / "my.model")
    assert apart(ours, MACECalculator(str(tmp_path / "my.model")), crystal()) < 1e-10


def test_single_precision(build):
    """The two differ from float64 by as much as from each other."""
    model = build("residual").float()
    ours = MaceLoraCalculator(model)
    ours.calculate(crystal())
    exact = theirs(model)
    exact.calculate(crystal())
    forces, expected = ours.results["forces"], exact.results["forces"]
    assert forces.dtype == np.float32
    assert np.abs(forces - expected).max() < 1e-4 * np.abs(expected).max()


def test_heads_dipoles_and_atomic_stresses(build):
    model = build("two_heads_biased_readout")
    ours, other = (MaceLoraCalculator(model, head=f"head{i}") for i in range(2))
    assert apart(ours, theirs(model, head="head0"), crystal()) < 1e-10
    assert apart(other, theirs(model, head="head0"), crystal()) > 1e-6
    wanted = {"compute_atomic_stresses": True}
    ours, own = (
        MaceLoraCalculator(model, head="head0", **wanted),
        theirs(model, head="head0", **wanted),
    )
    assert apart(ours, own, crystal()) < 1e-10
    assert np.allclose(ours.results["stresses"], own.results["stresses"], rtol=1e-10, atol=1e-12)
    dipoles = {"model_type": "DipoleMACE"}
    ours, own = MaceLoraCalculator(build("dipoles"), **dipoles), theirs(build("dipoles"), **dipoles)
    for each in (ours, own):
        each.calculate(molecule("CH3CH2OH"))
    assert np.abs(own.results["dipole"]).max() > 1e-6
    assert np.allclose(ours.results["dipole"], own.results["dipole"], rtol=1e-10, atol=1e-12)


def test_descriptors_and_second_derivatives(build):
    model, atoms = build("residual"), molecule("CH3CH2OH")
    ours, own = MaceLoraCalculator(model), theirs(model)
    ours.calculate(atoms)
    atoms.positions += 0.01
    for method in ("get_descriptors", "get_hessian"):
        found, expected = getattr(ours, method)(atoms), getattr(own, method)(atoms)
        assert np.abs(found - expected).max() < 1e-10 * np.abs(expected).max()


def test_a_committee_on_its_way(base, tmp_path):
    folders = [make_adapter(base, tmp_path / str(i), seed=i) for i in range(2)]
    members = [merge(load_adapter(base, folder)) for folder in folders]
    ours, own = MaceLoraCalculator(base, folders, default_dtype="float64"), theirs(*members)
    atoms = crystal()
    for seed in range(3):
        atoms.rattle(0.05, seed=seed)
        assert apart(ours, own, atoms) < 1e-10
        for key in ("energy_var", "forces_comm", "stress_var"):
            assert np.allclose(ours.results[key], own.results[key], rtol=1e-9, atol=1e-14)
    ours.set_adapter(folders[0])
    assert apart(ours, theirs(members[0]), atoms) < 1e-10


# ---------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("start", FRAMES)
def test_a_list_is_kept_while_atoms_move_less_than_the_skin(build, start):
    """A walk of small steps, in which atoms come and go at the cutoff."""
    model, atoms = build("residual"), FRAMES[start]()
    made = calculator([deepcopy(model)], skin=0.5, default_dtype="float64")
    lists, own = Neighbours(made.r_max, 0.5), theirs(model)
    counts = set()
    for seed in range(12):
        atoms.rattle(0.03, seed=seed)
        counts.add(lists.of(atoms).edges.shape[1])
        assert apart(made, own, atoms) < 1e-10
    assert 1 < lists.made < 12
    assert start == "molecule" or len(counts) > 1


def test_what_makes_a_list_anew(build):
    """Another cell or periodicity, atoms wrapped into the cell, others in their place; no skin."""
    model, atoms = build("residual"), crystal()
    made, own = calculator([deepcopy(model)], default_dtype="float64"), theirs(model)
    apart(made, own, atoms)
    strained, open_, wrapped, others = (atoms.copy() for _ in range(4))
    strained.set_cell(1.02 * atoms.cell)
    open_.pbc = False
    wrapped.positions += [0.9, 0, 0]
    wrapped.wrap()
    others.symbols[0] = "O"
    for changed in (strained, open_, atoms, wrapped, others, others[:5], atoms):
        assert apart(made, own, changed) < 1e-10
    lists = Neighbours(4.0, skin=0.0)
    for seed in range(3):
        atoms.rattle(1e-6, seed=seed)
        lists.of(atoms)
    assert lists.made == 3


def test_pairs_are_those_within_the_cutoff():
    """Counted by hand: a row of atoms 1 A apart, in a cell of four."""
    row = ase.Atoms("H4", [[i, 0, 0] for i in range(4)], cell=[4, 9, 9], pbc=[True, False, False])
    pairs = Neighbours(2.5, skin=1.0).of(row)
    assert pairs.edges.shape[1] == 4 * 4  # two neighbours on either side
    vectors = row.positions[pairs.edges[1]] - row.positions[pairs.edges[0]] + pairs.shifts
    assert sorted(vectors[:, 0]) == pytest.approx([-2] * 4 + [-1] * 4 + [1] * 4 + [2] * 4)
    alone = Neighbours(2.5, skin=1.0).of(ase.Atoms("H"))
    assert alone.edges.shape == (2, 0)


def test_a_skin_is_a_length(base):
    for skin in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"skin=.*0 or more"):
            MaceLoraCalculator(base, skin=skin)


# ---------------------------------------------------------------------------- elsewhere


def test_without_a_compiler_results_are_the_same(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    library.tried.cache_clear()
    try:
        with pytest.raises(library.NoCompiler):
            library.load()
        model = build("residual")
        assert apart(MaceLoraCalculator(model), theirs(model), crystal()) < 1e-10
    finally:
        library.tried.cache_clear()


def test_padded_graphs_stay_those_of_macecalculator(build):
    model, padding = build("residual"), {"pad_num_atoms": 12, "pad_num_edges": 3000}
    ours = MaceLoraCalculator(model, **padding)
    assert apart(ours, theirs(model, **padding), crystal()) < 1e-10
