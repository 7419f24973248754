"""The comparison away from the training frames: its parts on models with known faults, its plan."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from helpers.frames import DATA, ethanol

from mace_lora import load_foundation
from mace_lora.errors import ConfigError, DataError
from mace_lora.trust import frames as asked

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import fetch_data  # noqa: E402
import reproduce  # noqa: E402
from reproduction import download, evaluation, foundation  # noqa: E402
from reproduction.transfer import (  # noqa: E402
    assess,
    command,
    dynamics,
    frames,
    measures,
    methods,
    plan,
    table,
)


@pytest.fixture(scope="module")
def mini() -> torch.nn.Module:
    return load_foundation("mini", dtype=torch.float64)


@pytest.fixture(scope="module")
def questions() -> frames.Questions:
    found = ethanol("test", 4)
    return frames.Questions(
        valid=ethanol("valid", 4),
        target=found,
        others={"ethanol": found},
        broad={"mild": asked.molecules([1, 8], 0.06)},
        dimers=asked.dimers([1, 8]),
        foreign=[asked.dimer(6, 8)],
        compressed=asked.compressed(found[:2]),
    )


def test_a_model_is_at_no_distance_from_itself(mini, questions):
    found = assess.compare(copy.deepcopy(mini), mini, questions)
    assert found["kept"]["mild"] == {"forces": 0.0, "energy": 0.0}
    for wall in (found["dimers"], found["foreign"], found["compressed"]):
        assert wall == {"forces": 0.0, "relative": 0.0, "holes": 0, "where": []}


def test_other_e0s_are_not_forgetting(mini, questions):
    """They show in absolute energies alone."""
    shifted = copy.deepcopy(mini)
    shifted.atomic_energies_fn.atomic_energies += 100.0
    before, after = (assess.compare(m, mini, questions) for m in (mini, shifted))
    assert after["kept"]["mild"]["energy"] == pytest.approx(0.0, abs=1e-6)
    assert after["dimers"]["holes"] == 0
    for name in ("forces", "energy"):
        assert after["target"][name] == pytest.approx(before["target"][name], rel=1e-6)
    change = after["target"]["energy_absolute"] - before["target"]["energy_absolute"]
    assert abs(change) == pytest.approx(1e5, rel=1e-6)


def test_errors_are_mean_absolute_ones(mini):
    """Labels at known distances from the predictions."""
    found = ethanol("test", 2)
    answers = evaluation.predictions(mini, found)
    for i, frame in enumerate(found):
        frame.info["REF_energy"] = answers.energy[i] + 9 * (0.010 + 0.002 * (-1) ** i)
        frame.arrays["REF_forces"] = answers.forces[9 * i : 9 * (i + 1)] + 0.05
    errors = measures.against_labels(mini, found)
    assert errors == pytest.approx({"forces": 50.0, "energy": 2.0, "energy_absolute": 10.0})


def test_sets_with_foreign_elements_are_named():
    sets = {"water": [Atoms("OH2")], "uracil": [Atoms("C4H4N2O2")]}
    fit, notes = frames.askable(sets, [1, 6, 8])
    assert list(fit) == ["water"]
    assert notes == ["uracil is left out: the model doesn't know N"]


def test_dynamics_lasts_with_a_good_model_and_breaks_with_a_bad_one(mini):
    frame = ethanol("test", 1)[0]
    lengths = dynamics.Lengths((500.0,), 1, langevin_ps=0.02, nve_ps=0.02)
    good = dynamics.simulate(mini, [frame], lengths)
    assert good["ps_500K"] == 0.02
    assert good["runs"] == [[500.0, 0, 0.02, ""]]
    assert 0 < good["nve_drift"] < 100
    bad = copy.deepcopy(mini)
    bad.scale_shift.scale *= -20.0  # every bond repels
    broken = dynamics.simulate(bad, [frame], lengths)
    assert broken["ps_500K"] < 0.02
    assert broken["runs"][0][3] in ("a bond broke", "too hot", "atoms collapsed")
    assert broken["nve_drift"] == float("inf")


def result(method: str, rate: float, valid: float, value: float, **changes: object) -> dict:
    errors = {"forces": value, "energy": value, "energy_absolute": value}
    wall = {"forces": value, "relative": value, "holes": 0, "where": []}
    return {
        **{"foundation": "mini", "system": "aspirin", "method": method, "variant": method},
        **{"title": method, "rate": rate, "steps": 500, "seed": 1, "notes": []},
        **{"baseline": method.startswith("full"), "trainable_parameters": 1234},
        **{"seconds_per_step": 0.1, "seconds": 50.0, "target": errors},
        **{"valid": {"forces": valid, "energy": valid}, "others": {"uracil": errors}},
        **{"kept": {"mild": errors, "strong": errors}, "dimers": wall},
        **{"foreign": None, "compressed": wall},
        **changes,
    }


def test_rates_are_chosen_by_validation_and_ratios_are_to_the_best_baseline():
    found = [
        result("full", 0.001, valid=9.0, value=1.0),  # lucky on the test frames
        result("full", 0.005, valid=5.0, value=20.0),
        result("full_other", 0.005, valid=5.0, value=10.0),
        result("full_diverged", 0.005, valid=float("nan"), value=float("nan")),
        result("lora", 0.005, valid=4.0, value=5.0),
        result("lora", 0.01, valid=float("nan"), value=1.0),
        result("full", 0.001, valid=3.0, value=40.0, system="ethanol"),
        result("lora", 0.01, valid=3.0, value=20.0, system="ethanol"),
    ]
    made = {row["method"]: row for row in table.rows(found)}
    assert made["full"]["rates"] == {"aspirin": 0.005, "ethanol": 0.001}
    assert made["full"]["means"]["target_forces"] == 30.0
    assert made["lora"]["ratios"]["target_forces"] == pytest.approx(0.5)
    assert made["full"]["ratios"]["wall_dimers"] == pytest.approx(np.sqrt(2.0))
    lines = table.markdown(list(made.values())).splitlines()
    assert lines[0] == "### mini, 500 steps"
    (row,) = (x for x in lines if x.startswith("| lora | 1,234"))
    assert row.startswith("| lora | 1,234 | aspirin 0.005, ethanol 0.01 | 12.5 | 12.5 |")


def test_seeds_are_averaged_before_a_rate_is_chosen():
    found = [
        result("full", 0.001, valid=1.0, value=1.0),
        result("full", 0.001, valid=9.0, value=1.0, seed=2),
        result("full", 0.005, valid=4.0, value=10.0),
        result("full", 0.005, valid=4.0, value=30.0, seed=2),
    ]
    (row,) = table.rows(found)
    assert row["rates"] == {"aspirin": 0.005}
    assert row["seeds"] == {"aspirin": [1, 2]}
    assert row["means"]["target_forces"] == 20.0


def test_every_method_is_planned_at_every_rate_from_the_same_start():
    options = command.parse(["--train", "ethanol", "--steps", "95", "--energy_weight=3"])
    settings = {(r.method.name, r.rate): r.settings for r in options.runs}
    assert len(settings) == 3 * len(methods.CANDIDATES)
    for (_, rate), found in settings.items():
        assert found["lr"] == rate
        assert found["max_num_epochs"] == 10
        assert found["foundation_model_elements"] is True
        assert (found["energy_weight"], found["forces_weight"]) == (3, 10.0)
    assert len({r.start for r in options.runs}) == 1
    assert settings["full", 0.001]["clip_grad"] == 1.0
    assert settings["upstream_rank4", 0.01]["ema_decay"] == 0.99
    assert settings["lora_rank16", 0.005]["lora_rank"] == 16
    assert settings["full_ours", 0.005]["schedule"] == "cosine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=ful"], "Did you mean 'full'"),
        (["--others=aspirine"], "Did you mean 'aspirin'"),
        (["--lr", "0.1"], "'--lr' is not understood"),
        (["--lr=0.1"], "--lr is said by --rates here"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        command.parse(arguments)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """The package's frames of ethanol as ready splits of rMD17."""
    folder = tmp_path_factory.mktemp("originals") / "rmd17" / "revised_ethanol"
    folder.mkdir(parents=True)
    for part in ("train", "valid", "test"):
        found = ase.io.read(DATA / f"ethanol_{part}.xyz", index=":10")
        ase.io.write(folder / f"{part}.xyz", found)
    return folder.parents[1]


def short(data_dir: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--train", "ethanol", "--others=ethanol", "--steps", "4", "--train_frames=10"),
        *("--test_frames=3", "--compressed_frames=1", "--md_ps=0.002", "--md_seeds=1"),
        *("--md_temperatures", "500", "--nve_ps=0.01", f"--data_dir={data_dir}", f"--out={out}"),
        *more,
    ]


@pytest.mark.slow
def test_the_whole_path(tmp_path, data_dir, monkeypatch, capsys):
    """All elements are kept, by mace-torch's program and by ours; what is done is not repeated."""
    arguments = short(data_dir, tmp_path, "--methods=full,lora_balanced", "--rates", "0.001")
    options = command.parse(arguments)
    assert command.carry_out(options, fetch_data.prepare) == []
    for run in options.runs:
        model = torch.load(run.folder / "run.model", weights_only=False)
        assert model.atomic_numbers.tolist() == [1, 6, 7, 8]
        found = json.loads((run.folder / "transfer.json").read_text())
        assert found["asked"]["molecules"] == "ethanol"
        start = foundation.load_foundation(run.start, dtype=torch.float64)
        energies = [m.atomic_energies_fn.atomic_energies for m in (model, start)]
        assert torch.allclose(*energies)
        valid = measures.against_labels(start, ethanol("valid", 10))["forces"]
        assert 0 < found["valid"]["forces"] < valid  # it has learnt something
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("mini/runs/**/*.json")}
    assert sum(p.name == "dynamics.json" for p in written) == 2

    monkeypatch.setattr(sys, "argv", ["reproduce.py", "transfer", *arguments])
    reproduce.main()
    assert {p: p.stat().st_mtime_ns for p in written} == written
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in printed
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(r["method"], r["rates"]) for r in rows] == [
        ("full", {"ethanol": 0.001}),
        ("lora_balanced", {"ethanol": 0.001}),
    ]


def test_a_start_keeps_the_e0s_of_elements_that_the_frames_do_not_hold(tmp_path, data_dir, mini):
    options = command.parse(short(data_dir, tmp_path, "--methods=full"))
    run = options.runs[0]
    fetch_data.prepare(run.system, data_dir, tmp_path / "data")
    plan.write_start(run, "mini")
    start = torch.load(run.start, weights_only=False)
    change = (start.atomic_energies_fn.atomic_energies - mini.atomic_energies_fn.atomic_energies)[0]
    assert change[2] == pytest.approx(0.0, abs=1e-9)  # N
    assert change[1].abs() > 1
    errors = measures.against_labels(start, ethanol("train", 10))
    assert errors["energy_absolute"] == pytest.approx(errors["energy"], rel=1e-3)


def test_spice2022_is_rebuilt_from_the_downloaded_file(tmp_path, mini):
    """Here another old model stands in for it."""
    original = tmp_path / download.SPICE2022_FILE
    torch.save(mini, original)
    path = fetch_data.prepare_spice2022(tmp_path, tmp_path / "out")
    rebuilt = torch.load(path, weights_only=False)
    for one, other in zip(mini.parameters(), rebuilt.parameters(), strict=True):
        assert torch.equal(one, other)
    original.unlink()
    assert fetch_data.prepare_spice2022(tmp_path, tmp_path / "out") == path  # made once
    with pytest.raises(DataError, match=r"holds no MACE_SPICE\.model"):
        fetch_data.prepare_spice2022(tmp_path, tmp_path / "again")
