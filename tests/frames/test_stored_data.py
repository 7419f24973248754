"""HDF5 files of mace-torch's own preparation, and LMDB: checked before training, trained on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
import torch
from helpers.frames import ethanol
from helpers.running import here, results


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, small_data) -> Path:
    """train/, val/, test/ and statistics.json, as mace_prepare_data writes them."""
    folder = tmp_path_factory.mktemp("prepared")
    command = [sys.executable, "-m", "mace.cli.preprocess_data", "--num_process=1", "--r_max=4.0"]
    command += [f"--{part}_file={path}" for part, path in small_data.items()]
    command += ["--atomic_numbers=[1, 6, 8]", "--E0s=average", "--compute_statistics", "--seed=1"]
    subprocess.run([*command, "--h5_prefix=./"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def flags(foundation) -> list[str]:
    files = ["--train_file=train", "--valid_file=val/val_0.h5", "--test_dir=test"]
    files.append("--statistics_file=statistics.json")
    rest = ["--batch_size=5", "--max_num_epochs=1", "--lr=0.01", "--seed=1"]
    return ["--name=run", "--lora=True", f"--foundation_model={foundation}", *files, *rest]


@pytest.fixture
def folder(tmp_path, prepared) -> Path:
    return shutil.copytree(prepared, tmp_path / "run")


def replace(path: Path, frame: int, name: str, value) -> None:
    with h5py.File(path, "r+") as file:
        group = file[f"config_batch_0/config_{frame}"]
        del group[name]
        if value is not None:
            group[name] = value


def test_a_run_from_hdf5_and_its_continuation(folder, flags):
    """mace-torch can't read the E0s that its own preparation writes with numpy 2."""
    assert "np.float64" in (folder / "statistics.json").read_text() or np.__version__ < "2"
    assert here(folder, *flags) == ""
    assert here(folder, *flags, "--max_num_epochs=2", "--restart_latest") == ""
    assert [r["mode"] for r in results(folder)] == ["eval", "opt", "opt"] * 2 + ["eval"]
    energies = torch.load(folder / "run.model", weights_only=False).atomic_energies_fn
    assert energies.atomic_energies.flatten()[0].item() == pytest.approx(-616.05, abs=0.01)


@pytest.mark.parametrize(
    ("file", "frame", "name", "value", "expected"),
    [
        ("train/train_0.h5", 3, "properties/energy", np.nan, "frame 3: energy holds NaN"),
        ("val/val_0.h5", 2, "properties/forces", np.full((9, 3), np.inf), "frame 2: forces holds"),
        ("test/Default__0.h5", 1, "properties/energy", np.nan, "frame 1: energy holds NaN"),
        ("train/train_0.h5", 4, "properties/forces", np.zeros((9, 2)), "forces of shape (9, 2)"),
        ("train/train_0.h5", 4, "properties/energy", np.zeros(2), "energy of shape (2,)"),
        ("train/train_0.h5", 4, "positions", np.zeros((9, 3)), "frame 4 has atoms 0 and"),
        ("train/train_0.h5", 4, "positions", np.zeros((8, 3)), "frame 4 has positions of shape"),
        ("train/train_0.h5", 5, "positions", None, "frame 5 can't be read: KeyError"),
        ("train/train_0.h5", 6, "cell", np.diag([9, 9, np.nan]), "frame 6 has a cell that is not"),
        ("val/val_0.h5", 0, "atomic_numbers", [16] + [1] * 8, "frame 0 holds S (16); this run"),
    ],
)
def test_frames_that_cannot_be_right(folder, flags, file, frame, name, value, expected):
    """File and frame are named, and nothing has been trained."""
    replace(folder / file, frame, name, value)
    error = here(folder, *flags)
    assert error.startswith(f"error: {file}, frame {frame}")
    assert expected in error
    assert results(folder) == []


def test_labels_that_no_frame_has(folder, flags):
    for frame in range(10):
        replace(folder / "train/train_0.h5", frame, "properties/energy", "None")
    error = here(folder, *flags)
    assert "train/train_0.h5 has no energy (there are " in error
    assert "mace_prepare_data has the flag --energy_key" in error


@pytest.mark.parametrize("content", [b"no HDF5", None])
def test_files_that_are_none(folder, flags, content):
    path = folder / "val/val_0.h5"
    path.write_bytes(path.read_bytes()[:-5000] if content is None else content)
    error = here(folder, *flags)
    assert "val/val_0.h5 can't be read" in error or "val/val_0.h5, frame" in error


def test_files_that_mace_torch_would_not_read(folder, flags, small_data):
    """It ignores the first two in silence, and fails for the others with errors of its own."""
    assert "--test_dir alone" in here(folder, *flags, f"--test_file={small_data['test']}")
    xyz = [f"--{part}_file={path}" for part, path in small_data.items()]
    error = here(folder, *flags, *xyz, "--test_file=test/Default__0.h5")
    assert "--test_file=test/Default__0.h5: mace-torch takes HDF5 from" in error
    assert "such a --valid_file" in here(folder, *flags, f"--valid_file={small_data['valid']}")
    (folder / "nothing").mkdir()
    error = here(folder, *flags, "--train_file=nothing")
    assert error == "error: --train_file=nothing: a folder without HDF5 or LMDB files"


def test_elements_must_be_given(folder, flags):
    flags = [f for f in flags if "statistics" not in f]
    assert "give --statistics_file" in here(folder, *flags)
    flags.append("--atomic_numbers=[1, 6, 8, 16]")
    error = here(folder, *flags, "--E0s=foundation")
    assert "include S (16); the foundation model knows H (1), C (6)" in error


def test_lmdb(tmp_path, flags):
    """Written as fairchem's databases are; mace-torch prints what is wrong and goes on with it."""
    tools = pytest.importorskip("mace.tools.fairchem_dataset.lmdb_dataset_tools")
    from ase.calculators.singlepoint import SinglePointCalculator

    def write(name: str, spoilt: bool) -> None:
        with tools.LMDBDatabase(str(tmp_path / name)) as database:
            for i, frame in enumerate(ethanol("train", 6)):
                labels = {"energy": frame.info["REF_energy"], "forces": frame.arrays["REF_forces"]}
                frame.positions[4] = frame.positions[2 if spoilt and i == 4 else 4]
                plain = ase.Atoms(frame.numbers, frame.positions)
                plain.calc = SinglePointCalculator(plain, **labels)
                database.write(plain)

    for name, spoilt in (("one.aselmdb", False), ("two.aselmdb", True), ("three.aselmdb", False)):
        write(name, spoilt)
    flags = [f for f in flags if not f.startswith(("--train", "--valid", "--test", "--stat"))]
    flags += ["--atomic_numbers=[1, 6, 8]", "--E0s=foundation", "--valid_file=three.aselmdb"]
    error = here(tmp_path, *flags, "--train_file=two.aselmdb")
    assert error.startswith("error: two.aselmdb, frame 4 has atoms 2 and 4 on one spot")
    assert here(tmp_path, *flags, "--train_file=one.aselmdb") == ""
    assert (tmp_path / "run.model").exists()


def test_charge_and_spin_in_lmdb(tmp_path, flags, build):
    """Under fairchem's names, in the labels of the model itself: the first loss is 0."""
    tools = pytest.importorskip("mace.tools.fairchem_dataset.lmdb_dataset_tools")
    from ase.calculators.singlepoint import SinglePointCalculator
    from mace.calculators import MACECalculator

    model = build("charge_spin")
    torch.save(model, tmp_path / "omol.model")
    with tools.LMDBDatabase(str(tmp_path / "data.aselmdb")) as database:
        for frame, charge in zip(ethanol("train", 3), (0, -1, 1), strict=True):
            plain = ase.Atoms(frame.numbers, frame.positions)
            plain.info |= {"charge": charge, "spin": 1 + abs(charge)}
            plain.calc = MACECalculator(models=[model], default_dtype="float64")
            labels = {"energy": plain.get_potential_energy(), "forces": plain.get_forces()}
            plain.calc = SinglePointCalculator(plain, **labels)
            data, plain.info = plain.info, {}  # ASE has another meaning for info["charge"] in rows
            database.write(plain, data=data)
    shutil.copy(tmp_path / "data.aselmdb", tmp_path / "valid.aselmdb")
    flags = [f for f in flags if f.startswith(("--lora", "--name", "--seed", "--max"))]
    flags += ["--atomic_numbers=[1, 6, 8]", "--E0s=foundation", "--foundation_model=omol.model"]
    flags += ["--train_file=data.aselmdb", "--valid_file=valid.aselmdb"]
    assert here(tmp_path, *flags, "--batch_size=3", "--default_dtype=float64") == ""
    assert results(tmp_path)[0]["loss"] == pytest.approx(0, abs=1e-12)


def test_hdf5_without_charges_says_so(tmp_path, folder, flags, build):
    """mace_prepare_data writes none."""
    torch.save(build("charge_spin"), folder / "omol.model")
    assert here(folder, *flags, "--foundation_model=omol.model", "--E0s=foundation") == ""
    said = (folder / "logs/run_run-1.log").read_text()
    assert "has no total charge: the model takes 0 for every frame" in said
    assert "has no total spin: the model takes 1 for every frame" in said
