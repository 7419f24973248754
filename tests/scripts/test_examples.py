"""The programs of scripts/examples do what they say, in seconds, with `mini`."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import ase.io
import pytest
import torch
from helpers.adapter_folders import make_adapter
from helpers.frames import DATA
from helpers.running import run_program
from mace.calculators import MACECalculator

from mace_lora import load_adapter, load_foundation, merge

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


def example(name: str, monkeypatch, capsys, *flags: object) -> str:
    """Run one of the programs in this process; what it prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def energy(model: torch.nn.Module | str, atoms: ase.Atoms) -> float:
    single = {"model_paths": model} if isinstance(model, str) else {"models": model}
    atoms = atoms.copy()
    atoms.calc = MACECalculator(**single, default_dtype="float64")
    return atoms.get_potential_energy()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, with ten frames of ethanol and two adapters of `mini`."""
    monkeypatch.chdir(tmp_path)
    ase.io.write("train.xyz", ase.io.read(DATA / "ethanol_train.xyz", index=":10"))
    ase.io.write("test.xyz", ase.io.read(DATA / "ethanol_test.xyz", index=":2"))
    base = load_foundation("mini", dtype=torch.float64)
    for seed, name in enumerate(("one", "other")):
        make_adapter(base, tmp_path / name, "lora", seed=seed, std=0.05)
    return tmp_path


def test_own_loop(folder, monkeypatch, capsys):
    said = example("own_loop.py", monkeypatch, capsys, "train.xyz", "--steps", 12)
    errors = [float(line.split()[-2]) for line in said.splitlines() if line.startswith("step ")]
    assert len(errors) == 12
    assert errors[-1] < 0.7 * errors[0]
    atoms = ase.io.read("test.xyz")
    again = merge(load_adapter("mini", folder / "ethanol_forces_adapter"))
    saved = energy("ethanol_forces.model", atoms)
    assert energy(again, atoms) == pytest.approx(saved, abs=1e-5)  # `mini` is in float32
    assert abs(saved - energy(load_foundation("mini", dtype=torch.float64), atoms)) > 1e-3


def test_finetune(folder, monkeypatch, capsys):
    said = example("finetune.py", monkeypatch, capsys, "train.xyz", "--max_num_epochs", 2)
    assert float(said.partition("test: forces ")[2].split()[0]) < 390  # of mini: 400 meV/A
    assert float(said.partition("after 10 fs: ")[2].split()[0]) == pytest.approx(-4209.5, abs=1.0)
    saved = {path.name for path in (folder / "my_model").iterdir()}
    assert {"finetuned.model", "finetuned_adapter", "finetuned_report.html"} <= saved


def test_notebook(folder, monkeypatch, capsys):
    cells = json.loads((EXAMPLES / "finetune.ipynb").read_text())["cells"]
    programs = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    monkeypatch.setattr("matplotlib.pyplot.plot", lambda x, y: shown.update(x=list(x), y=list(y)))
    shown: dict[str, list[float]] = {}
    left: dict[str, object] = {}
    for program in programs:
        exec(program, left)
    assert shown["x"][-1] == 50.0
    assert 50.0 < sum(shown["y"]) / len(shown["y"]) < 1000.0
    result = left["result"]
    test = {row["quantity"]: row for row in result.errors if row["set"] == "test"}
    assert test["forces"]["after"] < 0.6 * test["forces"]["before"]
    assert "<table>" in result._repr_html_()
    assert (folder / "my_model" / "finetuned.model").exists()


def test_crystal_stress(folder, monkeypatch, capsys):
    flags = ("--max_num_epochs", 3, "--frames", 10)
    said = example("crystal_stress.py", monkeypatch, capsys, *flags)
    before, after = (float(w) for w in said.partition("training, stress: ")[2].split()[0:3:2])
    assert after < 0.8 * before
    assert 1.0 < float(said.partition("volume per atom: ")[2].split()[0]) < 10.0


def test_dynamics(folder, monkeypatch, capsys):
    said = example("dynamics.py", monkeypatch, capsys, "one", "test.xyz", "--steps", 20)
    assert abs(float(said.partition("moved by ")[2].split()[0])) < 2.0  # meV per atom; kinetic: 39
    assert len(ase.io.read("dynamics.traj", index=":")) == 21


def test_committee(folder, monkeypatch, capfd):
    flags = ("--members", 2, "--number", 2, "--max_num_epochs=1")
    said = example("committee.py", monkeypatch, capfd, "train.xyz", "test.xyz", *flags)
    energy_std = float(said.partition("eV, standard deviation ")[2].split()[0])
    forces_std = float(said.partition("standard deviation up to ")[2].split()[0])
    assert 0.0 < energy_std < 1000.0  # meV
    chosen = said.partition("frame 0: forces uncertain by ")[2].split()[0]  # of a whole force
    assert 1.0 < forces_std <= float(chosen) + 1.0 <= 3**0.5 * forces_std + 3.0  # of a component
    pool, taken = (ase.io.read(name, index=":") for name in ("test.xyz", "next.xyz"))
    first = int(said.partition("best first:")[2].partition("frame ")[2].partition(":")[0])
    assert len(taken) == 2
    assert taken[0].positions == pytest.approx(pool[first].positions, abs=1e-6)


def test_several_adapters(folder, monkeypatch, capsys):
    said = example("several_adapters.py", monkeypatch, capsys, "one", "other", "test.xyz")
    one, other, both, mixed = (
        float(line.partition(": ")[2].split()[0]) for line in said.splitlines()
    )
    assert abs(one - other) > 1e-3
    assert both == pytest.approx((one + other) / 2, abs=2e-6)
    assert energy("mixed.model", ase.io.read("test.xyz")) == pytest.approx(mixed, abs=2e-6)


@pytest.mark.slow
def test_fine_tune(folder):
    """From the shell: the command of this Python comes first on the PATH."""
    programs = Path(sys.executable).parent
    if not (programs / "mace_lora").exists():
        pytest.skip("the commands are not installed")
    flags = ("train.xyz", "test.xyz", "mini", "--max_num_epochs=2")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    run_program(EXAMPLES / "fine_tune.sh", *flags, PATH=path)
    assert Path("my_model.model").exists()
    assert Path("parity.png").exists()
