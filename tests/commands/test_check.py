"""`mace_lora check`, and the check and the units of a run."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from helpers.frames import DATA, ethanol
from helpers.running import here, results, tool_fails, tool_prints

from mace_lora.cli import main_tools
from mace_lora.frames.units import BOHR, HARTREE

TRAIN = str(DATA / "ethanol_train.xyz")
RUN = ("--name=run", "--lora=True", "--foundation_model=mini", "--batch_size=5", "--seed=1")
RUN = (*RUN, "--max_num_epochs=1", "--default_dtype=float64", "--E0s=estimated")
UNITS = "--units=energy=Hartree,forces=Hartree/Bohr"


def hartree(part: str, n: int) -> list[ase.Atoms]:
    frames = ethanol(part, n)
    for frame in frames:
        frame.info["REF_energy"] /= HARTREE
        frame.arrays["REF_forces"] = frame.arrays["REF_forces"] / (HARTREE / BOHR)
    return frames


def check(*flags: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main_tools(["check", *flags, "--base=mini"])
    return stop.value.code


@pytest.fixture
def mistaken(tmp_path) -> str:
    ase.io.write(tmp_path / "hartree.xyz", hartree("train", 20))
    return str(tmp_path / "hartree.xyz")


def test_good_files(capsys):
    said = tool_prints(capsys, "check", TRAIN, "--base=mini")
    assert "50 frames of 9 atoms: C2H6O 50" in said
    assert "0 errors, 0 doubts" in said
    assert "to paste" not in said


def test_mistaken_units(mistaken, tmp_path, capsys):
    page = tmp_path / "check.html"
    assert check(mistaken, "--json", f"--output={page}") == 1
    data = json.loads(capsys.readouterr().out)
    assert data["units"] == UNITS
    assert len(data["problems"]) == 2
    assert "data:image/png" in page.read_text(encoding="utf-8")
    assert "energy=Hartree" in page.read_text(encoding="utf-8")
    assert check(mistaken, data["units"]) == 0


def test_one_file_of_two_is_mistaken(mistaken, capsys):
    assert check(mistaken, TRAIN) == 1
    units = "--units=hartree.xyz:energy=Hartree,hartree.xyz:forces=Hartree/Bohr"
    assert f"to paste into mace_run_train: {units}" in capsys.readouterr().out
    assert check(mistaken, TRAIN, units) == 0  # the same frames in both are a doubt


def test_keys_and_their_flags(tmp_path, capsys):
    frames = ethanol("train", 5)
    for frame in frames:
        frame.info["dft_energy"] = frame.info.pop("REF_energy")
        frame.arrays["dft_forces"] = frame.arrays.pop("REF_forces")
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    said = tool_prints(capsys, "check", str(tmp_path / "a.xyz"), "--base=mini")
    assert "flags: --energy_key=dft_energy --forces_key=dft_forces" in said
    assert "to paste into mace_run_train: --energy_key=dft_energy" in said


def test_what_cannot_be_trained_on(tmp_path, capsys):
    frames = ethanol("train", 5)
    frames[3].arrays["REF_forces"][0, 0] = np.nan
    ase.io.write(tmp_path / "a.xyz", frames)
    assert check(str(tmp_path / "a.xyz")) == 1
    assert "frame 3: forces (key 'REF_forces') holds NaN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--units=energy=parsec"], "energy=parsec: known: Hartree"),
        (["--units=Hartree"], "<label>=<unit> is needed"),
        (["--units=other.xyz:energy=meV"], "no such file is read"),
        (["--output=no/such/folder.html"], "there is no folder"),
        (["--head=x"], "the model has no such head"),
        ([str(DATA)], "HDF5 and LMDB are not looked at here"),
    ],
)
def test_mistakes(flags, words):
    assert words in tool_fails("check", "--base=mini", *flags, TRAIN)


# ---------------------------------------------------------------------- in a run


@pytest.fixture
def files(tmp_path):
    """Files in Hartree, and the same in eV."""
    for part, n in (("train", 10), ("valid", 5)):
        ase.io.write(tmp_path / f"{part}.xyz", ethanol(part, n))
        ase.io.write(tmp_path / f"{part}_hartree.xyz", hartree(part, n))
    return tmp_path


def train(folder: Path, name: str, end: str, *flags: str) -> str:
    named = [f"--{part}_file=../{part}{end}.xyz" for part in ("train", "valid")]
    return here(folder / name, *RUN, *named, *flags)


def test_a_run_ends_before_it_begins(files):
    error = train(files, "a", "_hartree")
    assert "train_hartree.xyz: forces: in Hartree/Bohr" in error
    assert "forces=Hartree/Bohr" in error
    assert "--check=False" in error
    assert results(files / "a") == []


def test_units_of_a_run_give_the_same_training(files):
    assert train(files, "a", "_hartree", UNITS) == ""
    assert train(files, "b", "") == ""
    one, other = ([r["loss"] for r in results(files / name)] for name in ("a", "b"))
    assert one == pytest.approx(other, rel=1e-6)


def test_the_check_can_be_left_out(files):
    assert train(files, "a", "_hartree", "--check=False") == ""


def test_units_of_one_file(files):
    (files / "valid_hartree.xyz").write_bytes((files / "valid.xyz").read_bytes())
    error = train(files, "a", "_hartree", UNITS)
    assert "valid_hartree.xyz: forces: in eV/A already" in error
    units = UNITS.replace("energy", "train_hartree.xyz:energy")
    units = units.replace("forces", "train_hartree.xyz:forces")
    assert train(files, "b", "_hartree", units) == ""


def test_units_of_hdf5_are_refused(files):
    (files / "stored.h5").touch()
    stored = [f"--{flag}=../stored.h5" for flag in ("train_file", "valid_file")]
    error = train(files, "a", "", UNITS, *stored, "--atomic_numbers=[1, 6, 8]")
    assert "--units=energy=Hartree,forces=Hartree/Bohr and --train_file=../stored.h5" in error
