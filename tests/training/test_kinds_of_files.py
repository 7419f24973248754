"""Files as people have them: isolated atoms, types that are numbers, some labels alone, HDF5."""

from __future__ import annotations

import argparse
import ast
import logging
from pathlib import Path

import ase
import ase.io
import h5py
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.frames import ethanol
from mace import data as mace_data
from mace.data.utils import load_from_xyz, save_configurations_as_HDF5
from mace.tools.scripts_utils import get_dataset_from_xyz

from mace_lora.errors import ConfigError, DataError
from mace_lora.frames import stored
from mace_lora.training.data import Data
from mace_lora.upstream import library, predicting
from mace_lora.upstream import names as upstream

E0S = {1: -13.6, 6: -1029.0, 8: -2042.0}


def flags(loss: str = "weighted", **others: object) -> argparse.Namespace:
    weights = dict.fromkeys(("energy_weight", "forces_weight", "stress_weight"), 1.0)
    more = {"loss": loss, "r_max": 4.0, "model": "MACE", "device": "cpu"}
    return argparse.Namespace(**{**weights, **more, **others})


def keys(own: bool = False) -> mace_data.KeySpecification:
    specification = mace_data.KeySpecification.from_defaults()
    if own:
        specification.info_keys |= {"energy": "energy", "stress": "stress"}
        specification.arrays_keys |= {"forces": "forces"}
    return specification


def with_own_keys(frame: ase.Atoms) -> ase.Atoms:
    labels = {"energy": frame.info.pop("REF_energy"), "forces": frame.arrays.pop("REF_forces")}
    frame.calc = SinglePointCalculator(frame, **labels)
    return frame


def isolated(energies: dict[int, float | None], own: bool) -> list[ase.Atoms]:
    atoms = [ase.Atoms([z], info={"config_type": "IsolatedAtom"}) for z in energies]
    for atom, energy in zip(atoms, energies.values(), strict=True):
        if energy is not None and own:
            atom.calc = SinglePointCalculator(atom, energy=energy, forces=np.zeros((1, 3)))
        elif energy is not None:
            atom.info["REF_energy"] = energy
    return atoms


@pytest.mark.parametrize("own", [False, True], ids=["REF keys", "ASE's keys"])
def test_e0s_of_isolated_atoms(tmp_path, own):
    """mace-torch finds none under ASE's keys, and takes 0."""
    frames = [with_own_keys(f) if own else f for f in ethanol("train", 3)]
    ase.io.write(tmp_path / "a.xyz", [*isolated(E0S, own), *frames])
    path = str(tmp_path / "a.xyz")
    found, frames = Data(flags()).load_xyz(path, keys(own), extract_atomic_energies=True)
    assert found == E0S
    assert [len(f.atomic_numbers) for f in frames] == [9, 9, 9]
    data = Data(flags())
    _, frames = data.load_xyz(
        path, keys(own), extract_atomic_energies=True, keep_isolated_atoms=True
    )
    assert len(frames) == 6
    assert data.load_xyz(path, keys(own))[0] == {}  # validation and test


def test_an_isolated_atom_without_an_energy_is_refused(tmp_path):
    ase.io.write(tmp_path / "a.xyz", [*ethanol("train", 2), *isolated({1: -13.6, 6: None}, False)])
    with pytest.raises(DataError, match=r"a.xyz, frame 3 is an isolated atom .* without an energy"):
        Data(flags()).load_xyz(str(tmp_path / "a.xyz"), keys(), extract_atomic_energies=True)


def test_types_that_are_numbers_are_weighted_and_tested(tmp_path):
    frames = ethanol("train", 4)
    for frame, kind in zip(frames, ("liquid", 300, True, 1.5), strict=True):
        frame.info["config_type"] = kind
    ase.io.write(tmp_path / "a.xyz", frames)
    weights = {"liquid": 2.0, "300": 5.0, True: 0.5}
    with upstream.substituted(Data(flags()).substitutes()):
        collections, _ = get_dataset_from_xyz(
            work_dir=str(tmp_path),
            train_path=str(tmp_path / "a.xyz"),
            valid_path=str(tmp_path / "a.xyz"),
            test_path=[str(tmp_path / "a.xyz")],
            valid_fraction=0.1,
            key_specification=keys(),
            config_type_weights=weights,
        )
    assert [frame.weight for frame in collections.train] == [2.0, 5.0, 0.5, 1.0]
    kinds = [name for name, _ in collections.tests]
    assert kinds == ["liquid_Default", "300_Default", "T_Default", "1.5_Default"]


def without(frames: list[ase.Atoms], *names: str) -> list[ase.Atoms]:
    for frame in frames:
        for name in names:
            frame.info.pop(name, None)
            frame.arrays.pop(name, None)
    return frames


def load(folder: Path, frames: list[ase.Atoms], args: argparse.Namespace, data=None) -> Data:
    ase.io.write(folder / "a.xyz", frames)
    data = data or Data(args)
    data.load_xyz(str(folder / "a.xyz"), keys(), extract_atomic_energies=True)
    return data


def test_forces_alone_are_trained_on(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for args in (flags("forces_only"), flags(energy_weight=0.0)):
        load(tmp_path, without(ethanol("train", 3), "REF_energy"), args).refuse_missing_labels()
    assert not caplog.records


def test_a_label_that_no_training_frame_has_is_refused(tmp_path):
    data = load(tmp_path, without(ethanol("train", 3), "REF_energy"), flags())
    with pytest.raises(DataError, match=r"a.xyz has no energy .*--energy_weight=0"):
        data.refuse_missing_labels()
    load(tmp_path, ethanol("train", 3), flags(), data)  # another file has it
    data.refuse_missing_labels()


def test_a_file_with_something_like_the_label_is_refused_at_once(tmp_path):
    frames = ethanol("train", 3)
    for frame in frames:
        frame.info["dft_energy"] = frame.info.pop("REF_energy")
    with pytest.raises(DataError, match=r"no energy .*dft_energy.*--energy_key"):
        load(tmp_path, frames, flags())


def test_a_stress_of_zero_in_a_molecule_is_a_placeholder(tmp_path, caplog):
    frames = ethanol("train", 3)
    for frame in frames:
        frame.info["REF_stress"] = np.zeros(6)
        frame.cell = np.eye(3) * 20
    load(tmp_path, frames, flags("stress"))
    assert "in 3 frames that are not periodic the stress is exactly 0" in caplog.text


# ------------------------------------------------------------------ HDF5


@pytest.fixture
def hdf5(tmp_path) -> Path:
    """Five frames, the second without an energy, as `mace_prepare_data` writes them from a file
    with ASE's own keys: the gap has weight 1."""
    frames = [with_own_keys(frame) for frame in ethanol("train", 5)]
    del frames[1].calc.results["energy"]
    ase.io.write(tmp_path / "a.xyz", frames)
    _, configurations = load_from_xyz(str(tmp_path / "a.xyz"), keys(own=True))
    assert configurations[1].properties["energy"] is None
    assert configurations[1].property_weights["energy"] == 1.0
    (tmp_path / "test").mkdir()
    with h5py.File(tmp_path / "test/Default__0.h5", "w") as file:
        file.attrs["drop_last"] = True
        save_configurations_as_HDF5(configurations, 0, file)
    return tmp_path / "test/Default__0.h5"


def head(**others: object) -> argparse.Namespace:
    return argparse.Namespace(**{"head_name": "Default", "test_dir": None, **others})


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_gaps_in_hdf5_weigh_nothing(hdf5, folder, caplog):
    path = hdf5.parent if folder else hdf5
    data = Data(flags())
    settings = {"r_max": 4.0, "z_table": library.elements([1, 6, 8]), "heads": ["Default"]}
    with upstream.substituted(data.substitutes()):
        dataset = data.load_stored(file_path=str(path), head_config=head(), **settings)
        weights = [float(dataset[i].energy_weight) for i in range(5)]
        assert weights == [1.0, 0.0, 1.0, 1.0, 1.0]
        assert "1 of 5 frames have no energy, frame 1 the first" in caplog.text
        of_test = mace_data.HDF5Dataset(str(hdf5), **settings)  # as the script opens test sets
    assert float(of_test[1].energy_weight) == 0.0
    assert not of_test.drop_last


def test_test_files_of_the_preparation_are_found(hdf5):
    assert stored.test_files(str(hdf5.parent)) == [str(hdf5)]
    (hdf5.parent / "b_test.h5").touch()  # the name that mace-torch looks for
    assert stored.test_files(str(hdf5.parent)) == [str(hdf5.parent / "b_test.h5")]
    assert stored.test_files(None) == []


def settings_of_head(
    hdf5: Path, tmp_path: Path, E0s: str | None, base=None, oxygen: float = -3.0
) -> object:
    text = (
        f"{{np.int64(1): np.float64(-1.0), np.int64(6): -2.0, np.int64(8): np.float64({oxygen})}}"
    )
    numbers = '"mean": 0.0, "std": 1.0, "avg_num_neighbors": 8.0, "atomic_numbers": "[1, 6, 8]"'
    (tmp_path / "statistics.json").write_text(f'{{"atomic_energies": "{text}", {numbers}}}')
    files = {"train_file": str(hdf5), "valid_file": str(hdf5), "E0s": E0s}
    asked = {**files, "statistics_file": str(tmp_path / "statistics.json"), "key_specification": 0}
    names = "valid_fraction config_type_weights compute_avg_num_neighbors atomic_numbers mean std"
    rest = dict.fromkeys(
        (*names.split(), "avg_num_neighbors", "keep_isolated_atoms", "foundation_model_elements")
    )
    args = flags(**{**asked, **rest})
    return Data(args, lambda: base).head_config(asked, "Default", args)


def test_statistics_with_numbers_of_numpy(hdf5, tmp_path):
    found = settings_of_head(hdf5, tmp_path, None)
    assert found.E0s == "{1: -1.0, 6: -2.0, 8: -3.0}"
    assert found.atomic_numbers == "[1, 6, 8]"
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"--statistics_file=.*other.json can't be used"):
        stored.Statistics.read(str(tmp_path / "other.json"))


def test_statistics_of_frames_without_energies(hdf5, tmp_path):
    """mace_prepare_data writes nan for E0s where a frame lacks its energy."""
    nothing = float("nan")
    given = settings_of_head(hdf5, tmp_path, "foundation", oxygen=nothing)
    assert (given.E0s, given.atomic_numbers) == ("foundation", "[1, 6, 8]")
    with pytest.raises(ConfigError, match=r"no E0 of O \(8\).* give --E0s=estimated"):
        settings_of_head(hdf5, tmp_path, None, oxygen=nothing)


@pytest.mark.parametrize("E0s", ["foundation", "{1: -1.5, 6: -2.5, 8: -3.5}"])
def test_e0s_that_are_given_are_not_overruled_by_statistics(hdf5, tmp_path, E0s):
    assert settings_of_head(hdf5, tmp_path, E0s).E0s == E0s


def test_e0s_are_fitted_to_the_frames_of_hdf5(hdf5, tmp_path, build):
    """With E0s that are estimated the mean energy is right; the frame without one doesn't count."""
    base = build("foundation")
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        estimated = settings_of_head(hdf5, tmp_path, "estimated", base).E0s
        averaged = settings_of_head(hdf5, tmp_path, "average", base).E0s
    frames = ethanol("train", 5)
    energies = [f.info["REF_energy"] for i, f in enumerate(frames) if i != 1]
    counts = np.array([6, 2, 1])
    table = ast.literal_eval(averaged)
    assert counts @ [table[z] for z in (1, 6, 8)] == pytest.approx(np.mean(energies), abs=1e-6)
    table = ast.literal_eval(estimated)
    numbers = [int(z) for z in base.atomic_numbers]
    own = dict(zip(numbers, base.atomic_energies_fn.atomic_energies[0].tolist(), strict=True))
    shift = counts @ [table[z] - own[z] for z in (1, 6, 8)]
    kept = [f for i, f in enumerate(frames) if i != 1]
    found = predicting.predict(base, [predicting.frames_to_batch(kept, base)])["energy"]
    assert shift == pytest.approx(np.mean(energies) - found.mean().item(), abs=1e-6)
