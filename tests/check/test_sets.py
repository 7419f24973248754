"""What is odd in sets of frames: each kind is found with its frames, and good sets are quiet."""

from __future__ import annotations

from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from helpers.frames import DATA, ethanol

from mace_lora.check import sets
from mace_lora.check.compared import compare
from mace_lora.frames.keys import DEFAULTS
from mace_lora.frames.reading import XyzFrames
from mace_lora.upstream import loading


@pytest.fixture
def read(tmp_path):
    """Files of frames, read as training reads them."""

    def get(*files: list[ase.Atoms]) -> list[XyzFrames]:
        found = []
        for i, frames in enumerate(files):
            path = str(tmp_path / f"{i}.xyz")
            ase.io.write(path, frames, format="extxyz")
            found.append(XyzFrames(path, DEFAULTS))
        return found

    return get


def found(files: list[XyzFrames]) -> dict[str, tuple[int, ...]]:
    """Frames by what is found of them."""
    return {finding.what: finding.frames for finding in sets.findings(files)}


@pytest.mark.parametrize("frames", [lambda: ethanol("train", 50), lambda: ethanol("train", 2)])
def test_good_sets_are_quiet(read, frames):
    assert found(read(frames(), ethanol("test", 20))) == {}


def test_molecules_of_many_kinds_are_quiet(read):
    assert found(read(ase.io.read(DATA / "mini_holdout.xyz", ":"))) == {}


def test_duplicates(read):
    frames = [*ethanol("train", 20), *ethanol("train", 3)]
    frames[-1].info["REF_energy"] += 1.0
    assert found(read(frames)) == {"duplicates": (20, 21), "contradiction": (22,)}


def test_frames_in_two_files(read):
    test = [*ethanol("test", 5), *ethanol("train", 30)[7:9]]
    files = read(ethanol("train", 30), test)
    assert found(files) == {"overlap": (5, 6)}
    (finding,) = sets.findings(files)
    assert "frame 5 is its frame 7" in finding.why
    assert Path(finding.path).name == "1.xyz"


def test_outliers(read):
    frames = ethanol("train", 40)
    frames[7].info["REF_energy"] += 20.0
    frames[9].arrays["REF_forces"][0] += [100, 0, 0]
    frames[9].arrays["REF_forces"][1] -= [100, 0, 0]
    assert found(read(frames)) == {"outliers, energy": (7,), "outliers, forces": (9,)}


def test_a_frame_far_from_all_others(read):
    frames = ethanol("train", 40)
    frames[5].positions *= 2.0
    assert found(read(frames)) == {"far from all others": (5,)}


def test_net_forces(read):
    frames = ethanol("train", 5)
    frames[3].arrays["REF_forces"][:, 0] += 1.0
    assert found(read(frames)) == {"net forces": (3,)}


def test_mixed_periodicity(read):
    frames = ethanol("train", 5)
    frames[2].set_cell([20, 20, 20])
    frames[2].pbc = True
    assert found(read(frames)) == {"mixed periodicity": (2,)}


def test_atoms_alone(read):
    atoms = [ase.Atoms("H", info={"REF_energy": -13.6}), ase.Atoms("C", info={"REF_energy": -1e3})]
    atoms[1].info["config_type"] = "IsolatedAtom"
    severities = {f.frames: f.severity for f in sets.findings(read([*atoms, *ethanol("train", 3)]))}
    assert severities == {(0,): "doubt", (1,): "told"}


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_offsets_between_files(read, shift):
    model, shifted = loading.load("mini"), ethanol("test", 10)
    for frame in shifted:
        frame.info["REF_energy"] += shift * len(frame)
    files = read(ethanol("train", 10), shifted)
    compared = [(file.path, compare(file, range(10), model)) for file in files]
    findings = list(sets.offsets(compared))
    assert len(findings) == (shift > 0)
    for finding in findings:
        assert Path(finding.path).name == "1.xyz"
        assert np.isclose(float(finding.why.split()[2]), shift, atol=0.05)


@pytest.mark.parametrize("key", ["head", "config_type"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_offsets_within_a_file(read, key, shift):
    model, frames = loading.load("mini"), ethanol("train", 20)
    for i, frame in enumerate(frames):
        frame.info[key] = "r2scan" if i % 3 == 0 else "pbe"
        frame.info["REF_energy"] += shift * len(frame) * (i % 3 == 0)
    (file,) = read(frames)
    findings = list(sets.offsets([(file.path, compare(file, range(20), model))]))
    assert len(findings) == (shift > 0)
    for finding in findings:
        assert finding.frames == tuple(range(0, 20, 3))
        assert f"{key}=r2scan lie 0.5" in finding.why
        assert f"{key}=pbe" in finding.why
