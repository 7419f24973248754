"""Reproduction of published tables: the plan, and the whole path on a few frames."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.calculators.singlepoint
import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from helpers.frames import DATA
from helpers.running import run_program

from mace_lora.errors import ConfigError, FoundationModelError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import reproduce  # noqa: E402
from reproduction import datasets, foundation, protocol, tables  # noqa: E402
from reproduction.evaluation import load_model, predictions  # noqa: E402

ETHANOL = datasets.System("rmd17", "ethanol")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """The package's frames of ethanol, laid out as ready splits of rMD17."""
    folder = tmp_path_factory.mktemp("originals")
    (folder / "rmd17" / "revised_ethanol").mkdir(parents=True)
    for part in ("train", "valid", "test"):
        frames = ase.io.read(DATA / f"ethanol_{part}.xyz", index=":10")
        ase.io.write(folder / "rmd17" / "revised_ethanol" / f"{part}.xyz", frames)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rmd17", "aspirin"], "name what to run with --adapter"),
        (["rmd17", "aspirin", "--adapter=mmae"], "Did you mean 'mmea'"),
        (["rmd17", "aspirin", "--adapter=lora", "--lr", "0.1"], "'--lr' is not understood"),
        (["acac", "--adapter=lora", "--only=nothing"], "no run has this in its path"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        reproduce.plan(*reproduce.parse(arguments))


def plan(*arguments: str) -> dict[str, dict]:
    """The settings of every planned run by its method."""
    planned = reproduce.plan(*reproduce.parse(list(arguments)))
    return {run.method.name: run.settings for run in planned.runs}


def test_the_published_protocol_is_what_is_run():
    found = plan("3bpa", "--adapter=full,mmea,lora", "--lora_rank=8", "--device=cuda")
    for settings in found.values():
        expected = {"lr": 0.005, "energy_weight": 1.0, "forces_weight": 1000.0, "batch_size": 5}
        expected |= {"max_num_epochs": 500, "scheduler_patience": 5, "ema_decay": 0.995}
        expected |= {"start_swa": 400, "default_dtype": "float64", "device": "cuda"}
        expected |= {"foundation_model": "medium_off"}
        assert {k: settings[k] for k in expected} == expected
    assert "adapter" not in found["full"]
    assert found["mmea"]["mmea_rank"] == 32
    assert found["mmea"]["mmea_std"] == 0.001
    assert found["lora"]["lora_rank"] == 8
    assert "lora_rank" not in found["mmea"]


def test_a_budget_of_steps():
    found = plan("rmd17", "aspirin", "--adapter=lora", "--steps=95")["lora"]
    assert found["max_num_epochs"] == 10  # of 10 batches each
    assert found["start_swa"] == 8
    found = plan("acac", "--adapter=lora", "--steps=500", "--lr=0.1", "--eval_interval=3")["lora"]
    assert found["max_num_epochs"] == 6  # of 90
    assert (found["lr"], found["eval_interval"]) == (0.1, 3)


def test_from_scratch_has_the_architecture_of_the_foundation_model():
    settings = protocol.architecture("mini")
    assert settings["hidden_irreps"] == "32x0e+32x1o"
    assert settings["num_cutoff_basis"] == 5
    assert "foundation_model" not in plan("acac", "--adapter=scratch", "--foundation_model=mini")


def result(system: str, method: str, seed: int, forces: float) -> dict:
    errors = {"energy_mae": 2 * forces, "forces_mae": forces, "frames": 9}
    return {
        **{"dataset": "rmd17", "system": system, "method": method, "title": method, "seed": seed},
        **{"run": f"{method}-n50-seed{seed}", "foundation_model": "mini", "train_frames": 50},
        **{"steps": 500, "trainable_parameters": 1234, "forgetting": None},
        "errors": {"stage_one": {"MD": errors}},
    }


def test_several_systems_stand_side_by_side():
    """A line per method with means over seeds, the lowest of each column in bold."""
    found = [
        *(result("aspirin", "full", seed, forces) for seed, forces in ((1, 20.0), (2, 24.0))),
        *(result("ethanol", "full", 1, 10.0), result("aspirin", "lora", 1, 21.0)),
    ]
    lines = tables.markdown(tables.rows(found)).splitlines()
    assert lines[lines.index("### All systems") + 2 :][:4] == [
        "| meV / meV/Å | trained parameters | aspirin MD (MAE) | ethanol MD (MAE) |",
        "|---|---|---|---|",
        "| full | 1,234 | 44.0 / 22.0 | **20.0** / **10.0** |",
        "| lora | 1,234 | **42.0** / **21.0** |  |",
    ]
    assert "### All systems" not in tables.markdown(tables.rows(found[:2]))


def command(data_dir: Path, out: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "scripts" / "reproduce.py"), "rmd17", "ethanol"),
        *("--foundation_model=mini", f"--data_dir={data_dir}", f"--out={out}"),
        *("--lr=0.01", "--test_frames=6"),
        *arguments,
    ]


def errors_by_hand(model: Path, frames: list[Atoms]) -> tuple[float, float]:
    """MAE of total energy (meV) and of force components (meV/A), through the ASE calculator."""
    from mace.calculators import MACECalculator

    calculator = MACECalculator(str(model), device="cpu", default_dtype="float64")
    energies, forces = [], []
    for frame in frames:
        atoms = Atoms(numbers=frame.numbers, positions=frame.positions, calculator=calculator)
        energies.append(atoms.get_potential_energy() - frame.info["REF_energy"])
        forces.append(atoms.get_forces() - frame.arrays["REF_forces"])
    return 1e3 * np.abs(energies).mean(), 1e3 * np.abs(forces).mean()


@pytest.mark.slow
def test_the_table_is_what_the_saved_models_predict(tmp_path, data_dir):
    """The whole path for an adapter and a baseline; what is finished is not done again."""
    run_program(
        *command(data_dir, tmp_path, "--adapter=full,lora", "--train_frames=10", "--steps=4")
    )
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/**/*")}
    arguments = command(data_dir, tmp_path, "--adapter=lora", "--train_frames", "5", "10")
    printed = run_program(*arguments, "--steps=4")
    assert printed.count("(was finished)") == 1
    assert {p: p.stat().st_mtime_ns for p in written if p.is_file()} == {
        p: time for p, time in written.items() if p.is_file()
    }
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        reproduce.carry_out(reproduce.plan(*reproduce.parse([*arguments[2:], "--steps=6"])), None)

    table = json.loads((tmp_path / "table.json").read_text())
    last = {(r["method"], r["train_frames"]): r for r in table if r["last_stage"]}
    assert set(last) == {("full", 10), ("lora", 10), ("lora", 5)}
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert all(line in printed.splitlines() for line in lines if line)
    for row in last.values():
        assert row["stage"] == "stage_two"
        check_row(row, lines, tmp_path / "runs" / "rmd17" / "ethanol" / row["runs"][0])
    for name in ("learning_curves_rmd17_ethanol", "error_against_frames_rmd17_ethanol_MD"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000

    printed = run_program(*arguments, "--steps=4", "--test_frames=4", "--only=n10")
    assert "(was finished)" not in printed  # evaluated again, on other frames
    assert all(p.stat().st_mtime_ns == t for p, t in written.items() if p.name == "run.model")
    results = json.loads((tmp_path / "table.json").read_text())
    rows = [r for r in results if (r["method"], r["train_frames"]) == ("lora", 10)]
    assert {r["errors"]["MD"]["frames"] for r in rows} == {4}


def check_row(row: dict, lines: list[str], folder: Path) -> None:
    """A row of the table, as JSON and as text, against the run's files."""
    frames = ase.io.read(DATA / "ethanol_test.xyz", index=":6")
    energy, forces = errors_by_hand(folder / "run_stagetwo.model", frames)
    assert row["errors"]["MD"]["energy"]["mean"] == pytest.approx(energy, rel=1e-6)
    assert row["errors"]["MD"]["forces"]["mean"] == pytest.approx(forces, rel=1e-6)
    start, frames_steps = f"| {row['title']} ", f"| {row['train_frames']} | 4 |"
    (line,) = (text for text in lines if text.startswith(start) and frames_steps in text)
    assert f"| {row['trainable_parameters']:,} |" in line
    assert f"| {energy:.1f} | {forces:.1f} |" in line
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["max_num_epochs"] == 4 // (row["train_frames"] // 5)
    assert len(ase.io.read(folder / "train.xyz", index=":")) == row["train_frames"]
    if row["method"] == "full":
        model = torch.load(folder / "run.model", weights_only=False)
        assert row["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert (folder / "parity.png").stat().st_size > 1000


@pytest.mark.slow
def test_an_interrupted_run_is_continued(tmp_path, data_dir):
    arguments = command(data_dir, tmp_path, "--adapter=lora", "--train_frames", "5", "--swa=False")
    arguments.append("--max_num_epochs=25")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/*/*/checkpoints/*.pt")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "give the same command again to continue" in printed
    assert not list(tmp_path.glob("runs/*/*/*/result.json"))
    run_program(*arguments)
    (result,) = (json.loads(p.read_text()) for p in tmp_path.glob("runs/*/*/*/result.json"))
    assert result["resumed"]
    (folder,) = tmp_path.glob("runs/*/*/*")
    log = (folder / "output.txt").read_text()
    assert "Continuing from" in log


@pytest.mark.slow
def test_an_interrupted_baseline_starts_over(tmp_path, data_dir):
    """mace-torch's own restart would end elsewhere."""
    arguments = command(data_dir, tmp_path, "--adapter=full", "--train_frames=5", "--steps=3")
    run_program(*arguments)
    (path,) = tmp_path.glob("runs/*/*/*/result.json")
    straight = json.loads(path.read_text())
    path.unlink()
    (path.parent / "trained.json").unlink()  # as if it had been stopped after its last checkpoint
    run_program(*arguments)
    again = json.loads(path.read_text())
    assert again["errors"] == straight["errors"]
    assert not again["resumed"]


@pytest.mark.slow
def test_baselines_start_at_the_labels_where_all_elements_are_the_foundations(tmp_path):
    """There mace-torch throws its estimated E0s away, which would make the comparison unfair."""
    uracil = datasets.System("rmd17", "uracil")
    settings = {"foundation_model": "mini", "E0s": "estimated", "default_dtype": "float64"}
    assert foundation.is_needed(settings, False, uracil.numbers)
    assert not foundation.is_needed(settings, False, ETHANOL.numbers)
    assert not foundation.is_needed({**settings, "adapter": "lora"}, False, uracil.numbers)
    path = Path(__file__).parents[1] / "data" / "uracil.xyz"
    frames = datasets.read_xyz(path)
    foundation.write(tmp_path / "foundation.model", settings, frames)
    run_program(
        *(sys.executable, "-c", "from mace.cli.run_train import main; main()"),
        *(
            "--name=run",
            f"--work_dir={tmp_path}",
            f"--foundation_model={tmp_path}/foundation.model",
        ),
        *(f"--train_file={path}", "--valid_fraction=0.3"),
        *("--E0s=estimated", "--max_num_epochs=1", "--batch_size=2", "--lr=0", "--plot=False"),
    )
    errors = predictions(load_model(tmp_path / "run.model"), frames).errors()
    assert errors["energy_per_atom_mae"] < 100  # hundreds of eV without


def test_a_foundation_model_that_cannot_be_had_is_named(monkeypatch, tmp_path):
    """From scratch needs its architecture; here its place in mace-torch's cache holds rubbish."""
    (tmp_path / "mace").mkdir()
    (tmp_path / "mace" / "MACE-OFF23_medium.model").write_text("rubbish")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FoundationModelError, match="foundation_model=medium_off: mace-torch can't"):
        plan("acac", "--adapter=scratch")
