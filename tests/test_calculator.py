"""Living with adapters in Python: switching, disabling, combining, and the ASE calculator."""

from __future__ import annotations

import pickle

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from helpers.adapter_folders import make_adapter
from mace.calculators import MACECalculator

from mace_lora import (
    AdapterConfig,
    MaceLoraCalculator,
    adapter_parameters,
    combine_adapters,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    print_trainable_parameters,
    set_adapter,
    unload,
)
from mace_lora.adapters.registry import METHODS
from mace_lora.errors import ArtefactError, ConfigError, DataError, NotMergeable
from mace_lora.model.injection import adapters
from mace_lora.testing import outputs, randomise_, worst


@pytest.fixture
def crystal() -> ase.Atoms:
    """A distorted periodic crystal, so that stress means something."""
    atoms = bulk("C", "diamond", a=3.6, cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.symbols[:4] = ["H", "O", "H", "C"]
    return atoms


@pytest.mark.parametrize("method", METHODS)
def test_disabled_unloaded_and_switched(base, frames, tmp_path, method):
    one = make_adapter(base, tmp_path / "one", method)
    two = make_adapter(base, tmp_path / "two", "lora", seed=1, shift=0.5, rank=2)
    model = load_adapter(base, one)
    adapted = outputs(model, frames)
    start = outputs(unload(load_adapter(base, one)), frames)
    assert worst(adapted, start) > 1e-6
    with disable_adapter(model):
        assert worst(outputs(model, frames), start) == 0
    assert worst(outputs(model, frames), adapted) == 0

    weights = {n: p for n, p in model.named_parameters() if "original" in n or "ungated" in n}
    set_adapter(model, two)
    assert worst(outputs(model, frames), outputs(load_adapter(base, two), frames)) == 0
    assert worst(outputs(model, frames), adapted) > 1e-6
    assert {id(p) for p in weights.values()} <= {id(p) for p in model.parameters()}
    set_adapter(model, one)
    assert worst(outputs(model, frames), adapted) == 0
    plain = unload(model)
    assert not list(adapters(plain))
    assert worst(outputs(plain, frames), start) == 0
    assert all(p.requires_grad for p in plain.parameters())


def test_switching_to_an_adapter_that_does_not_fit_changes_nothing(base, frames, tmp_path):
    one = make_adapter(base, tmp_path / "one")
    other = make_adapter(base, tmp_path / "other", elements=(1, 6))
    model = load_adapter(base, one)
    before = outputs(model, frames)
    with pytest.raises(ArtefactError, match=r"elements \[1, 6\].* load_adapter"):
        set_adapter(model, other)
    assert worst(outputs(model, frames), before) == 0


def test_a_scaled_merge_lies_between_start_and_adapter(base, frames, tmp_path):
    folder = make_adapter(base, tmp_path / "one", "dora")
    start = unload(load_adapter(base, folder))
    full = merge(load_adapter(base, folder))
    none = merge(load_adapter(base, folder), scale=0.0)
    assert worst(outputs(none, frames), outputs(start, frames)) == 0
    half = merge(load_adapter(base, folder), scale=0.5)
    for w, a, b in zip(half.parameters(), start.parameters(), full.parameters(), strict=True):
        assert torch.allclose(w, (a + b) / 2, rtol=1e-12, atol=1e-14)


def test_switching_between_adapters_for_fewer_elements(base, frames, tmp_path):
    """Their runs started from a smaller model than the base."""
    one = make_adapter(base, tmp_path / "one", elements=(1, 6, 8))
    two = make_adapter(base, tmp_path / "two", seed=1, shift=0.5, elements=(1, 6, 8))
    model = load_adapter(base, one)
    before = outputs(model, frames)
    set_adapter(model, two)
    assert worst(outputs(model, frames), outputs(load_adapter(base, two), frames)) == 0
    assert worst(outputs(model, frames), before) > 1e-6


def test_combination(base, frames, tmp_path):
    """Of linear updates, with weights; against sums of weights, computed apart."""
    one = make_adapter(base, tmp_path / "one", shift=1.0)
    two = make_adapter(base, tmp_path / "two", "elora", seed=1, shift=3.0)
    combined = combine_adapters(base, {one: 0.25, two: 0.75})
    start = unload(load_adapter(base, one))
    parts = [merge(load_adapter(base, folder)) for folder in (one, two)]
    for w, s, a, b in zip(*(m.parameters() for m in (combined, start, *parts)), strict=True):
        assert torch.allclose(w, s + 0.25 * (a - s) + 0.75 * (b - s), rtol=1e-12, atol=1e-14)
    energies = [m.atomic_energies_fn.atomic_energies for m in (combined, *parts)]
    assert torch.allclose(energies[0], 0.25 * energies[1] + 0.75 * energies[2], rtol=1e-14)
    alone = combine_adapters(base, {one: 1.0})
    assert worst(outputs(alone, frames), outputs(parts[0], frames)) < 1e-12


def test_combinations_that_make_no_sense(base, tmp_path):
    one = make_adapter(base, tmp_path / "one", shift=1.0)
    two = make_adapter(base, tmp_path / "two", seed=1)
    with pytest.raises(ConfigError, match="nothing to combine"):
        combine_adapters(base, {})
    with pytest.raises(ConfigError, match="a finite number, found 'much'"):
        combine_adapters(base, {one: "much"})
    with pytest.raises(ConfigError, match="differ in atomic_energies"):
        combine_adapters(base, {one: 1.0, two: -1.0})
    few = make_adapter(base, tmp_path / "few", elements=(1, 6))
    with pytest.raises(ArtefactError, match="can't be combined"):
        combine_adapters(base, {one: 1.0, few: 1.0})
    gated = make_adapter(base, tmp_path / "gated", "mmea")
    with pytest.raises(NotMergeable):
        combine_adapters(base, {one: 1.0, gated: 1.0})


def test_counts(model, capsys):
    inject(model, AdapterConfig.create("lora"))
    print_trainable_parameters(model)
    trainable = sum(p.numel() for p in adapter_parameters(model).values())
    total = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / total:.2f}\n"
    )


def test_adapter_parameters_feed_an_optimiser(model, frames):
    inject(model, AdapterConfig.create("lora"))
    randomise_(model)
    before = outputs(model, frames)
    optimiser = torch.optim.SGD(adapter_parameters(model).values(), lr=1.0)
    for parameter in adapter_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    assert worst(before, outputs(model, frames)) > 1e-6


def results(calculator, atoms: ase.Atoms) -> dict[str, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = calculator
    return {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(),
        "stress": atoms.get_stress(),
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.allclose(one[k], other[k], rtol=1e-10, atol=1e-10) for k in one)


@pytest.mark.parametrize("method", METHODS)
def test_the_calculator_is_macecalculator_on_the_merged_model(base, crystal, tmp_path, method):
    folder = make_adapter(base, tmp_path / "one", method)
    merged = merge(load_adapter(base, folder), keep_gates=True)
    expected = results(MACECalculator(models=[merged], default_dtype="float64"), crystal)
    assert np.abs(expected["stress"]).max() > 1e-6
    calculator = MaceLoraCalculator(base=base, adapter=folder, default_dtype="float64")
    assert same(results(calculator, crystal), expected)
    calculator.set_adapter(None)
    bare = results(calculator, crystal)
    assert same(bare, results(MACECalculator(models=[base], default_dtype="float64"), crystal))
    assert not same(bare, expected)
    calculator.set_adapter(str(folder))
    assert same(results(calculator, crystal), expected)


def test_the_same_atoms_are_computed_again_after_a_switch(base, crystal, tmp_path):
    one = make_adapter(base, tmp_path / "one")
    crystal.calc = MaceLoraCalculator(base=base, adapter=one, default_dtype="float64")
    adapted = crystal.get_potential_energy()
    crystal.calc.set_adapter(None)
    assert crystal.get_potential_energy() != adapted


def test_the_base_is_read_once(foundation, tmp_path, build):
    base = build("foundation").float()
    folder = make_adapter(base, tmp_path / "one")
    path = tmp_path / "base.model"
    torch.save(base, path)
    calculator = MaceLoraCalculator(base=str(path), adapter=folder)
    water = molecule("H2O")
    water.calc = calculator
    water.get_potential_energy()
    path.unlink()
    calculator.set_adapter(make_adapter(base, tmp_path / "two", elements=(1, 8)))
    water.get_potential_energy()


def test_a_committee_has_mean_and_variance(base, crystal, tmp_path):
    folders = [make_adapter(base, tmp_path / str(i), seed=i) for i in range(3)]
    calculator = MaceLoraCalculator(base=base, adapter=folders, default_dtype="float64")
    mean = results(calculator, crystal)
    single = []
    for folder in folders:
        member = MaceLoraCalculator(base=base, adapter=folder, default_dtype="float64")
        single.append(results(member, crystal))
    assert mean["energy"] == pytest.approx(np.mean([s["energy"] for s in single]), abs=1e-10)
    assert calculator.results["energy_var"] == pytest.approx(np.var([s["energy"] for s in single]))
    spread = calculator.results["forces_comm"].var(axis=0)
    assert np.allclose(spread, np.var([s["forces"] for s in single], axis=0))
    assert spread.max() > 0
    few = make_adapter(base, tmp_path / "few", elements=(1, 6))
    with pytest.raises(ConfigError, match="can't be a committee"):
        calculator.set_adapter([folders[0], few])
    with pytest.raises(ConfigError, match="without adapters"):
        calculator.set_adapter([])


def test_an_element_that_the_adapter_does_not_know(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "a", elements=(1, 6))
    water = molecule("H2O")
    water.calc = MaceLoraCalculator(base=base, adapter=adapter)
    with pytest.raises(DataError, match="the model knows H C, the atoms hold O too"):
        water.get_potential_energy()
    water.calc.set_adapter(None)
    assert np.isfinite(water.get_potential_energy())


def test_a_calculator_travels_to_other_processes(base, frames, tmp_path):
    """Pickled with its atoms, as pools of workers do."""
    atoms = frames[0].copy()
    atoms.calc = MaceLoraCalculator(base, make_adapter(base, tmp_path / "one"))
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    there = pickle.loads(pickle.dumps(atoms))
    there.calc.reset()
    assert there.get_potential_energy() == pytest.approx(energy, rel=1e-12)
    assert np.allclose(there.get_forces(), forces, rtol=1e-10, atol=1e-10)
