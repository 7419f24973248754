"""The command eval, as a user runs it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from helpers.adapter_folders import make_adapter
from helpers.running import tool_fails as failure
from helpers.running import tool_prints as run
from mace.calculators import MACECalculator

from mace_lora import load_adapter, merge
from mace_lora.results.labelled import LabelledFrames, Values
from mace_lora.results.pictures import parity


@pytest.fixture
def labelled(tmp_path) -> Path:
    """Molecules and a crystal with stress, of two configuration types, with labels of a model."""
    frames = []
    rng = np.random.default_rng(0)
    for i in range(4):
        atoms = bulk("C", "diamond", a=3.6, cubic=True)
        atoms.rattle(0.1, seed=i)
        atoms.symbols[:2] = ["H", "O"]
        atoms.info |= {"REF_energy": rng.normal(), "config_type": "ab"[i % 2]}
        atoms.info["REF_stress"] = rng.normal(size=6)
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
        frames.append(atoms)
    ase.io.write(tmp_path / "data.xyz", frames)
    return tmp_path / "data.xyz"


def by_hand(path: Path, data: Path) -> dict[str, float]:
    """MAE in meV over all frames, frame by frame through ASE."""
    differences = {"energy": [], "forces": [], "stress": []}
    for atoms in ase.io.read(data, index=":"):
        labels = dict(atoms.info), atoms.arrays["REF_forces"]
        atoms.calc = MACECalculator(str(path), default_dtype="float64")
        energy = atoms.get_potential_energy() - labels[0]["REF_energy"]
        differences["energy"].append(energy / len(atoms))
        differences["forces"] += list((atoms.get_forces() - labels[1]).ravel())
        stress = atoms.get_stress() - np.asarray(labels[0]["REF_stress"])
        differences["stress"] += list(stress[[0, 1, 2, 3, 3, 4, 4, 5, 5]])  # a full 3 x 3 matrix
    return {q: 1e3 * float(np.abs(d).mean()) for q, d in differences.items()}


def test_errors_are_those_of_macecalculator(capsys, base_file, labelled):
    data = json.loads(run(capsys, "eval", "--model", base_file, "--data", labelled, "--json"))
    rows = data["files"][0]["models"]["base"]
    assert rows[0]["mae"] == pytest.approx(by_hand(base_file, labelled), rel=1e-9)
    groups = [r for r in rows if r["part"] == "group"]
    assert [g["name"] for g in groups] == ["a", "b"]
    mean = np.mean([g["mae"]["energy"] for g in groups])
    assert mean == pytest.approx(rows[0]["mae"]["energy"])
    elements = {r["name"]: r for r in rows if r["part"] == "element"}
    assert {n: r["count"] for n, r in elements.items()} == {"H": 4, "C": 24, "O": 4}
    squares = sum(r["count"] * r["rmse"]["forces"] ** 2 for r in elements.values()) / 32
    assert squares**0.5 == pytest.approx(rows[0]["rmse"]["forces"])


def test_adapters_side_by_side_with_a_second_file_and_a_picture(
    capsys, base, base_file, frames, labelled, tmp_path
):
    one = make_adapter(base, tmp_path / "one")
    two = make_adapter(base, tmp_path / "two", "mmea", seed=1)
    ase.io.write(tmp_path / "other.xyz", frames)
    picture = tmp_path / "parity.png"
    flags = ["--model", base_file, "--adapter", one, two, "--data", labelled]
    flags += ["--forgetting", tmp_path / "other.xyz", "--picture", picture]
    data = json.loads(run(capsys, "eval", *flags, "--json"))
    first, second = (file["models"] for file in data["files"])
    assert list(first) == list(second) == ["base", "one", "two"]
    assert len({rows[0]["mae"]["forces"] for rows in first.values()}) == 3
    merged = merge(load_adapter(base, one))
    torch.save(merged, tmp_path / "merged.model")
    expected = by_hand(tmp_path / "merged.model", labelled)
    assert first["one"][0]["mae"] == pytest.approx(expected, rel=1e-9)
    from matplotlib.image import imread

    image = imread(picture)
    assert min(image.shape[:2]) > 500
    assert image[..., :3].std() > 0.05  # something is drawn
    text = run(capsys, "eval", *flags, "--metric", "rmse")
    assert "forces, RMSE in meV/Å" in text
    assert max(len(line) for line in text.splitlines() if line[0] == "|") <= 100


def test_frames_that_not_every_model_knows(capsys, base, base_file, labelled, tmp_path):
    few = make_adapter(base, tmp_path / "few", elements=(1, 6))
    flags = ["--model", base_file, "--adapter", few, "--data", labelled]
    assert "4 of 4 frames of data.xyz are left out: not every model knows O" in failure(
        "eval", *flags
    )
    frames = ase.io.read(labelled, index=":")
    frames[0].symbols[1] = "H"
    ase.io.write(labelled, frames)
    data = json.loads(run(capsys, "eval", *flags, "--json"))
    assert data["files"][0]["frames"] == 1
    assert "3 of 4 frames" in data["left_out"][0]


def test_fitted_e0s(capsys, base_file, labelled):
    """Labels of the model itself plus a number per atom have no error left."""
    frames = ase.io.read(labelled, index=":")
    for i, atoms in enumerate(frames):
        atoms.symbols[2 : 2 + i] = "H"  # the numbers of H and C differ, or they could not be told
        atoms.calc = MACECalculator(str(base_file), default_dtype="float64")
        energy = atoms.get_potential_energy()
        atoms.calc = None
        atoms.info["REF_energy"] = energy + 7.0 * sum(atoms.numbers == 1) - 3.0 * len(atoms)
    ase.io.write(labelled, frames)
    flags = ["--model", base_file, "--data", labelled]

    def error(*more: str) -> float:
        data = json.loads(run(capsys, "eval", *flags, *more, "--json"))
        return data["files"][0]["models"]["base"][0]["mae"]["energy"]

    assert error() > 100
    assert error("--fit_e0s") < 1e-4


def test_bad_data(base_file, labelled, tmp_path):
    flags = ["--model", base_file, "--data"]
    assert "no such file" in failure("eval", *flags, tmp_path / "no.xyz")
    (tmp_path / "empty.xyz").write_text("")
    assert "Empty file" in failure("eval", *flags, tmp_path / "empty.xyz")
    text = failure("eval", *flags, labelled, "--energy_key", "E", "--forces_key", "F")
    assert "no energies under 'E'" in text
    assert "REF_energy, REF_forces, REF_stress" in text
    assert "--batch_size=0" in failure("eval", *flags, labelled, "--batch_size", "0")
    missing = failure("eval", *flags, labelled, "--picture", tmp_path / "no" / "p.png")
    assert "there is no folder" in missing


def test_what_is_taken_for_something_else_is_told(base, base_file, labelled, tmp_path):
    folder = make_adapter(base, tmp_path / "a", elements=(1, 6))
    text = failure("eval", "--model", folder, "--data", labelled)
    assert "an adapter goes to --adapter" in text
    flags = ["--data", labelled, "--model", base_file, "--adapter", base_file]
    assert "is a file; an adapter is a directory" in failure("eval", *flags)
    flags = ["--model", base_file, "--adapter", folder, "--output"]
    assert "is for H C N O and" in failure("unmerge", *flags, tmp_path / "s.model")
    flags[0] = "--base"
    assert "the name of a file is needed" in failure("merge", *flags, tmp_path)


def test_a_head_that_the_model_does_not_have(base_file, labelled):
    """It was taken for the last head without a word."""
    flags = ["--model", base_file, "--data", labelled, "--head", "Defualt"]
    assert "--head=Defualt: no model has such a head" in failure("eval", *flags)


def test_a_model_with_other_e0s_does_not_squeeze_the_others(tmp_path):
    """Its energies, hundreds of eV away, left nothing to see of the first model's."""
    energies = np.linspace(-1.0, 1.0, 41)
    unknown = np.full((41, 3, 3), np.nan)
    labels = Values(energies, np.full((41, 3), np.nan), unknown)
    atoms = [ase.Atoms("H")] * 41
    frames = LabelledFrames("frames", atoms, labels, np.ones(41, dtype=int), np.full(41, "none"))
    far = replace(labels, energy=energies + 400.0)
    parity([(frames, {"one": labels, "two": far})], tmp_path / "p.png")
    from matplotlib.image import imread

    image = imread(tmp_path / "p.png")[..., :3]
    blue = (image[..., 2] - image[..., 0]) > 0.15
    rows, columns = np.nonzero(blue[:, image.shape[1] // 2 :])  # right of the legend
    assert np.ptp(rows) > image.shape[0] / 4
    assert np.ptp(columns) > image.shape[1] / 4
