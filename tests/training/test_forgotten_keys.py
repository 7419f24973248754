"""Keys that a user forgot: a run takes the evident ones and says so, or names the flags to give."""

from __future__ import annotations

from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.frames import ethanol
from helpers.running import here, results
from mace.calculators import MACECalculator

FLAGS = ("--name=run", "--lora=True", "--batch_size=2", "--max_num_epochs=1", "--seed=1")
FLAGS = (*FLAGS, "--E0s=foundation", "--default_dtype=float64", "--foundation_model=base.model")


def labelled(model: torch.nn.Module, frames: list[ase.Atoms]) -> list[ase.Atoms]:
    """Frames with the model's own labels as ASE writes them: the first loss is then 0."""
    for frame in frames:
        frame.calc = MACECalculator(models=[model], default_dtype="float64")
        found = {"energy": frame.get_potential_energy(), "forces": frame.get_forces()}
        del frame.arrays["REF_forces"]
        frame.info.pop("REF_energy")
        frame.calc = SinglePointCalculator(frame, **found)
    return frames


def under(frames: list[ase.Atoms], energy: str, forces: str) -> list[ase.Atoms]:
    """The same labels under names that are not ASE's."""
    for frame in frames:
        frame.info[energy] = frame.calc.results["energy"]
        frame.arrays[forces] = frame.calc.results["forces"]
        frame.calc = None
    return frames


@pytest.fixture
def train(base, tmp_path):
    """Write files and train on them; the error, or "" where there is none."""

    def run(model: torch.nn.Module, files: dict[str, list[ase.Atoms]], *flags: str) -> str:
        torch.save(model, tmp_path / "base.model")
        for part, frames in files.items():
            ase.io.write(tmp_path / f"{part}.xyz", frames, format="extxyz")
        named = [] if "--heads" in " ".join(flags) else [f"--{p}_file={p}.xyz" for p in files]
        return here(tmp_path, *FLAGS, *named, *flags)

    return run


def first_losses(folder: Path) -> list[float]:
    """Validation losses before training, one for each head."""
    return [r["loss"] for r in results(folder) if r["mode"] == "eval" and r["epoch"] is None]


def log(folder: Path) -> str:
    return (folder / "logs/run_run-1.log").read_text()


def test_both_keys_forgotten_in_all_files(base, train, tmp_path):
    """The test file has mace-torch's keys: each file is read as it is."""
    files = {part: labelled(base, ethanol(part, 3)) for part in ("train", "valid", "test")}
    under(files["test"], "REF_energy", "REF_forces")
    assert train(base, files) == ""
    assert first_losses(tmp_path) == pytest.approx([0.0], abs=1e-12)
    for part in ("train", "valid"):
        expected = f"{part}.xyz has no REF_energy and REF_forces: taken is energy from 'energy'"
        assert expected in log(tmp_path)
    assert "test.xyz has no" not in log(tmp_path)
    assert "(--energy_key=energy --forces_key=forces)" in log(tmp_path)


def test_keys_of_each_head(base, train, tmp_path):
    files = {part: labelled(base, ethanol(part, 3)) for part in ("train", "valid")}
    for part in ("train", "valid"):
        frames = under(labelled(base, ethanol(part, 3)), "dft_energy", "dft_forces")
        ase.io.write(tmp_path / f"{part}_b.xyz", frames)
    heads = {
        "a": {"train_file": "train.xyz", "valid_file": "valid.xyz"},
        "b": {"train_file": "train_b.xyz", "valid_file": "valid_b.xyz"},
    }
    error = train(base, files, f"--heads={heads}")
    assert "train_b.xyz has no energy under the key 'REF_energy'" in error
    assert "add --energy_key=dft_energy --forces_key=dft_forces" in error
    heads["b"] |= {"energy_key": "dft_energy", "forces_key": "dft_forces"}
    # as YAML gives them: a table, where mace-torch reads a text
    numbers = [1, 6, 7, 8]
    energies = dict(zip(numbers, base.atomic_energies_fn.atomic_energies[0].tolist(), strict=True))
    heads["a"]["E0s"] = energies
    assert train(base, files, f"--heads={heads}") == ""
    assert first_losses(tmp_path)[-2:] == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("energy", ["-4209.7d0", "-4209.7 eV"])
def test_labels_that_are_texts(base, train, energy):
    files = {part: labelled(base, ethanol(part, 3)) for part in ("train", "valid")}
    under(files["train"], "REF_energy", "REF_forces")
    files["train"][1].info["REF_energy"] = energy
    error = train(base, files)
    assert "train.xyz, frame 1" in error
    assert f"energy (key 'REF_energy') holds '{energy}'" in error


def test_a_text_that_says_none_is_a_gap(base, train, tmp_path):
    files = {part: labelled(base, ethanol(part, 3)) for part in ("train", "valid")}
    under(files["valid"], "REF_energy", "REF_forces")
    files["valid"][1].info["REF_energy"] = "None"
    assert train(base, files) == ""
    assert first_losses(tmp_path) == pytest.approx([0.0], abs=1e-12)
    assert "1 of 3 frames have no energy" in log(tmp_path)


def test_names_with_an_at(base, train, tmp_path):
    files = {f"{part}@300": labelled(base, ethanol(part, 3)) for part in ("train", "valid")}
    named = [f"--{part}_file={part}@300.xyz" for part in ("train", "valid")]
    for part, frames in files.items():
        ase.io.write(tmp_path / f"{part}.xyz", frames, format="extxyz")
    assert train(base, {}, *named) == ""
    assert first_losses(tmp_path) == pytest.approx([0.0], abs=1e-12)


# ---------------------------------------------------------------------- charge and spin


@pytest.fixture
def omol(build) -> torch.nn.Module:
    return build("charge_spin")


@pytest.fixture
def charged(omol) -> dict[str, list[ase.Atoms]]:
    """Frames of several charges and spins, under the names of MACECalculator."""
    files = {}
    for part in ("train", "valid"):
        frames = ethanol(part, 3)
        for frame, charge, spin in zip(frames, (0, -1, 1), (1, 2, 2), strict=True):
            frame.info |= {"charge": charge, "spin": spin}
        files[part] = labelled(omol, frames)
        assert np.ptp([f.calc.results["energy"] for f in files[part]]) > 1e-3
    return files


def test_charge_and_spin_are_found(omol, charged, train, tmp_path):
    """Neutral singlets would be wrong by more than this, and nothing would say so."""
    assert train(omol, charged) == ""
    assert first_losses(tmp_path) == pytest.approx([0.0], abs=1e-12)
    assert "the model reads one: taken is 'charge' (--total_charge_key=charge)" in log(tmp_path)
    assert "(--total_spin_key=spin)" in log(tmp_path)
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    frame = charged["valid"][1]
    frame.calc = MACECalculator(models=[merged], default_dtype="float64")
    charged_up = frame.get_potential_energy()
    frame.info["charge"] = 1
    assert abs(frame.get_potential_energy() - charged_up) > 1e-3


def test_charge_under_other_names(omol, charged, train, tmp_path):
    for frame in (f for frames in charged.values() for f in frames):
        frame.info["Q"] = frame.info.pop("charge")
        frame.info["charge_state"] = frame.info["Q"]
    error = train(omol, charged)
    assert "train.xyz has no total charge under the key 'total_charge'" in error
    assert "add --total_charge_key=charge_state" in error
    assert train(omol, charged, "--total_charge_key=Q") == ""
    assert first_losses(tmp_path)[-1:] == pytest.approx([0.0], abs=1e-12)


def test_frames_without_a_charge_are_told(omol, charged, train, tmp_path):
    for frame in charged["train"]:
        del frame.info["charge"]
    charged["valid"][1].info.pop("spin")
    assert train(omol, charged) == ""
    said = log(tmp_path)
    assert "train.xyz has no total charge (key 'total_charge'): the model takes 0 for" in said
    assert "valid.xyz: 1 of 3 frames, frame 1 the first, have no total spin (key 'spin')" in said


def test_a_charge_that_the_model_does_not_know(omol, charged, train):
    charged["train"][2].info["charge"] = 7
    error = train(omol, charged)
    assert "train.xyz, frame 2: total charge (key 'charge') is 7: the model knows -2 to 2" in error
