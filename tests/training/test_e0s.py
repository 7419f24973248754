"""E0s that are solved again while a model learns."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest
import torch
from helpers.running import here, results

from mace_lora.training.epochs.e0s import smallest_change

FLAGS = (
    "--name=run",
    "--foundation_model=mini",
    "--lora=True",
    "--seed=1",
    "--default_dtype=float64",
)
FLAGS = (*FLAGS, "--batch_size=5", "--max_num_epochs=3", "--lr=0.02")


def test_one_composition_moves_by_the_smallest_change():
    """Ethanol alone: 1 meV per atom, spread as its atoms are."""
    counts = np.array([[6.0, 2.0, 1.0]] * 3)
    found = smallest_change(counts, np.full(3, 9e-3))
    assert counts[0] @ found == pytest.approx(9e-3)
    assert found == pytest.approx(9e-3 * counts[0] / (counts[0] @ counts[0]))


def test_compositions_that_determine_e0s_give_them_back():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 8, size=(40, 3)).astype(float)
    wanted = np.array([0.02, -0.1, 0.3])
    assert smallest_change(counts, counts @ wanted) == pytest.approx(wanted, abs=1e-12)


def test_elements_in_no_frame_stay():
    assert smallest_change(np.array([[2.0, 0.0, 1.0]]), np.array([0.3]))[1] == 0


def offset(folder, file: str) -> float:
    """Mean energy error per atom of the saved model on the frames of `file`, eV."""
    from mace.calculators import MACECalculator

    calculator = MACECalculator(model_paths=[str(folder / "run.model")], default_dtype="float64")
    errors = []
    for atoms in ase.io.read(file, ":"):
        wanted = atoms.info["REF_energy"]
        atoms.calc = calculator
        errors.append((atoms.get_potential_energy() - wanted) / len(atoms))
    return float(np.mean(errors))


@pytest.fixture
def flags(small_data):
    files = [f"--{part}_file={small_data[part]}" for part in ("train", "valid")]
    # forces alone count, so that nothing but E0s can put the energies right
    return [*FLAGS, *files, "--energy_weight=0", "--forces_weight=100"]


def test_the_saved_model_has_no_offset_on_its_training_frames(tmp_path, small_data, flags):
    assert here(tmp_path / "on", *flags, "--solve_e0s=True") == ""
    assert here(tmp_path / "off", *flags) == ""
    assert abs(offset(tmp_path / "on", small_data["train"])) < 1e-6
    assert abs(offset(tmp_path / "off", small_data["train"])) > 1e-4
    log = (tmp_path / "on/logs/run_run-1.log").read_text()
    assert "E0s were solved again at each validation" in log


def test_the_adapter_folder_holds_them_too(tmp_path, small_data, flags):
    from mace_lora import load_adapter, load_foundation

    assert here(tmp_path, *flags, "--solve_e0s=True") == ""
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    adapted = load_adapter(load_foundation("mini", dtype=torch.float64), tmp_path / "run_adapter")
    e0s = [m.atomic_energies_fn.atomic_energies.flatten() for m in (merged, adapted)]
    assert torch.equal(*e0s)


def test_e0s_that_were_given_stay(tmp_path, flags):
    given = "{1: -12.0, 6: -1026.0, 8: -2040.0}"
    assert here(tmp_path, *flags, "--solve_e0s=True", f"--E0s={given}") == ""
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    found = merged.atomic_energies_fn.atomic_energies.flatten().tolist()
    assert found == [-12.0, -1026.0, -2040.0]


def test_a_continued_run_has_the_same_e0s(tmp_path, flags):
    """Bit for bit: two epochs, then the third by --restart_latest."""
    more = [*flags, "--solve_e0s=True", "--ema", "--ema_decay=0.9"]
    assert here(tmp_path / "whole", *more) == ""
    assert here(tmp_path / "parts", *more, "--max_num_epochs=2") == ""
    assert here(tmp_path / "parts", *more, "--restart_latest", "--overwrite=True") == ""
    assert results(tmp_path / "whole")[-1] == results(tmp_path / "parts")[-1]
    e0s = [
        torch.load(tmp_path / part / "run.model", weights_only=False).atomic_energies_fn
        for part in ("whole", "parts")
    ]
    assert torch.equal(e0s[0].atomic_energies, e0s[1].atomic_energies)
