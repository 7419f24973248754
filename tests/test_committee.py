"""Committees: trained by one command, calibrated, used by the calculator and to choose frames."""

from __future__ import annotations

import json
from dataclasses import replace

import ase.io
import numpy as np
import pytest
from helpers.adapter_folders import make_adapter
from helpers.frames import ethanol
from helpers.running import here, run_command, tool_fails, tool_prints

from mace_lora import MaceLoraCalculator, finetune
from mace_lora.commands.select import choose
from mace_lora.errors import ArtefactError, ConfigError
from mace_lora.model import committee
from mace_lora.results import spread
from mace_lora.results.labelled import LabelledFrames, Values


def drawn(width: float, n: int = 4000, members: int = 5) -> tuple[LabelledFrames, list[Values]]:
    """Members around a truth: each atom has a scale of its own, the error is `width` spreads."""
    random = np.random.default_rng(0)
    scale = random.uniform(0.1, 1.0, (n, 3))
    forces = [scale * random.normal(size=(n, 3)) for _ in range(members)]
    none = np.full((n, 3, 3), np.nan)
    made = [Values(f[:, 0], f, none) for f in forces]
    error = width * scale * random.normal(size=(n, 3))
    truth = np.mean(forces, axis=0) + error
    atoms = [ethanol("test", 1)[0]] * n
    labels = Values(truth[:, 0], truth, none)
    return LabelledFrames("t", atoms, labels, np.ones(n), np.array(["none"] * n)), made


def test_factors_make_deviations_as_large_as_errors():
    frames, members = drawn(3.0)
    found = spread.factors(frames, members)
    judged = spread.reliability(frames, members, found)["forces"]
    assert found["forces"] > 3.0  # five members: their deviation scatters itself
    assert judged.coverage[0] == pytest.approx(0.68, abs=0.01)
    assert 0.85 < judged.coverage[1] < 1.0
    assert 0.2 < judged.correlation < 0.8


def test_missing_labels_are_left_out():
    frames, members = drawn(1.0, n=50)
    none = replace(frames.labels, energy=np.full(50, np.nan))
    found = spread.factors(replace(frames, labels=none), members)
    assert found["energy"] == 1.0
    judged = spread.reliability(replace(frames, labels=none), members, found)
    assert list(judged) == ["forces"]
    with pytest.raises(ConfigError, match="2 members or more"):
        spread.factors(frames, members[:1])


@pytest.fixture
def folder(base, tmp_path):
    place = tmp_path / "water_committee"
    members = [make_adapter(base, place / f"member_{i}", seed=i) for i in range(3)]
    factors = {"energy": 2.0, "forces": 3.0}
    committee.write(place, committee.Committee(tuple(members), factors), {})
    return place


def test_the_calculator_gives_calibrated_deviations(base, frames, folder):
    atoms = frames[0].copy()
    atoms.calc = MaceLoraCalculator(base, folder)
    atoms.get_potential_energy()
    alone = []
    for i in range(3):
        single = frames[0].copy()
        single.calc = MaceLoraCalculator(base, folder / f"member_{i}")
        alone.append((single.get_potential_energy(), single.get_forces()))
    energies, forces = zip(*alone, strict=True)
    assert atoms.get_potential_energy() == pytest.approx(np.mean(energies), rel=1e-12)
    std = atoms.calc.results["energy_std"]
    assert std == pytest.approx(2.0 * np.std(energies, ddof=1), rel=1e-6)
    wanted = 3.0 * np.std(forces, axis=0, ddof=1)
    assert np.allclose(atoms.calc.results["forces_std"], wanted, rtol=1e-6)
    atoms.calc.set_adapter(folder / "member_0")
    atoms.get_potential_energy()
    assert "energy_std" not in atoms.calc.results


def test_a_broken_committee_is_named(base, folder):
    (folder / committee.FILE).write_text("{}")
    with pytest.raises(ArtefactError, match=r"committee\.json can't be read"):
        MaceLoraCalculator(base, folder)


def test_worthwhile_frames_differ():
    """Of two equal frames of high score one is taken, then one that is farther."""
    features = np.array([[0.0], [0.0], [5.0], [1.0]])
    assert choose(np.array([3.0, 2.9, 1.0, 1.0]), features, 3) == [0, 2, 3]


def test_frames_of_a_pool_are_ranked(base_file, folder, tmp_path, capsys):
    ase.io.write(tmp_path / "pool.xyz", ethanol("test", 6))
    flags = ["--base", base_file, "--adapter", folder, "--number", 3]
    out = tmp_path / "next.xyz"
    data = json.loads(
        tool_prints(capsys, "select", tmp_path / "pool.xyz", *flags, "--output", out, "--json")
    )
    chosen = [row["frame"] for row in data["chosen"]]
    assert len(set(chosen)) == 3
    assert data["chosen"][0]["force_std"] == max(row["force_std"] for row in data["chosen"])
    written = ase.io.read(out, index=":")
    pool = ase.io.read(tmp_path / "pool.xyz", index=":")
    assert all(
        np.allclose(a.positions, pool[i].positions) for a, i in zip(written, chosen, strict=True)
    )
    alone = ["--base", base_file, "--adapter", folder / "member_0"]
    assert "is no committee" in tool_fails("select", tmp_path / "pool.xyz", *alone)


@pytest.mark.slow
def test_one_command_trains_them(tmp_path, foundation, small_data):
    """With bootstrap and validation frames split off, then used from Python."""
    done = run_command(
        "--name=run",
        f"--foundation_model={foundation}",
        *(f"--{part}_file={small_data[part]}" for part in ("train", "test")),
        *("--valid_fraction=0.3", "--lora=True", "--max_num_epochs=1", "--batch_size=2"),
        *("--members=2", "--bootstrap=True"),
        cwd=tmp_path,
    )
    assert "On test frames, forces: rank correlation" in done.stdout
    folder = tmp_path / "run_committee"
    found = committee.read(folder)
    assert len(found.members) == 2
    assert found.factors["forces"] > 0
    assert len(ase.io.read(folder / "valid.xyz", index=":")) == 3
    drawn_frames = [ase.io.read(folder / f"train_{i}.xyz", index=":") for i in (1, 2)]
    assert [len(f) for f in drawn_frames] == [7, 7]
    atoms = ase.io.read(small_data["test"])
    atoms.calc = MaceLoraCalculator(foundation, folder)
    atoms.get_forces()
    assert atoms.calc.results["forces_std"].shape == (9, 3)


def test_members_need_frames_in_xyz_files(tmp_path, small_data, foundation):
    (tmp_path / "train.h5").touch()
    files = ["--train_file=train.h5", f"--valid_file={small_data['valid']}"]
    flags = [*files, f"--foundation_model={foundation}", "--name=a", "--lora=True"]
    assert "an .xyz file is needed" in here(tmp_path, *flags, "--members=2")
    assert "--bootstrap is for committees" in here(tmp_path, *flags, "--bootstrap=True")
    with pytest.raises(ConfigError, match="members has no place here"):
        finetune(foundation, small_data["train"], members=2)
