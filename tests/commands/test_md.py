"""`mace_lora md`, as a user runs it."""

from __future__ import annotations

import csv
import json

import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule
from helpers.adapter_folders import make_adapter
from helpers.frames import DATA
from helpers.running import tool_fails, tool_prints

from mace_lora import MaceLoraCalculator
from mace_lora.cli import main_tools
from mace_lora.trust.simulation import Run, Sample, Settings, problems

ETHANOL = str(DATA / "ethanol_test.xyz")


def test_constant_energy_is_judged_by_its_drift(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--ensemble=nve", "--ps=0.2", "--timestep=1", "--every=20", "--output=run"]
    said = tool_prints(capsys, "md", "mini", ETHANOL, *flags, "--json")
    found = json.loads(said)
    assert found["problems"] == []
    assert (found["steps"], found["ps"]) == (200, pytest.approx(0.2))
    rows = list(csv.DictReader((tmp_path / "run.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(0, 201, 20))
    times, total = ([float(row[k]) for row in rows] for k in ("time_ps", "total_eV"))
    assert found["drift"] == pytest.approx(1e3 * np.polyfit(times, total, 1)[0] / 9)
    frames = ase.io.read("run.xyz", index=":")
    assert len(frames) == len(rows)
    assert "REF_energy" not in frames[0].info  # a label of the file, false from the second frame on
    last = frames[-1].copy()
    last.calc = MaceLoraCalculator("mini", default_dtype="float64")
    assert last.get_potential_energy() == pytest.approx(float(rows[-1]["potential_eV"]), abs=1e-4)
    assert frames[-1].get_kinetic_energy() == pytest.approx(float(rows[-1]["kinetic_eV"]), rel=1e-4)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "run.xyz already; remove it" in tool_fails("md", "mini", ETHANOL, *flags)


def test_a_thermostat_an_adapter_and_a_crystal(base, base_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter", std=0.01)
    ase.io.write("start.cif", bulk("C", "diamond", a=3.6, cubic=True))
    flags = [str(base_file), "start.cif", "--adapter", str(adapter), "--ps=0.01", "--seed=3"]
    main = ["md", *flags, "--temperature=50"]
    with pytest.raises(SystemExit):  # the model is untrained: what becomes of it is open
        main_tools(main)
    said = capsys.readouterr().out
    assert "8 atoms, NVT: 20 steps, 0.010 ps" in said
    assert "written: md.xyz, md.csv, md.png" in said
    first = ase.io.read("md.xyz", index="0")
    assert all(first.pbc)
    start = first.copy()
    start.calc = MaceLoraCalculator(base, adapter, default_dtype="float64")
    assert first.get_potential_energy() == pytest.approx(start.get_potential_energy(), abs=1e-4)
    main[main.index("--seed=3")] = "--seed=4"
    with pytest.raises(SystemExit):
        main_tools([*main, "--output=other"])
    other = ase.io.read("other.xyz", index="0")
    assert not np.allclose(other.get_momenta(), first.get_momenta())


def test_what_breaks_is_told(tmp_path, monkeypatch, capsys):
    """Steps far too long for hydrogen: exit code 1, and the files hold what there was."""
    monkeypatch.chdir(tmp_path)
    ase.io.write("water.xyz", molecule("H2O"))
    flags = ["--ensemble=nve", "--timestep=8", "--temperature=2000", "--every=1", "--ps=1"]
    with pytest.raises(SystemExit) as stop:
        main_tools(["md", "mini", "water.xyz", *flags])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "not sound: " in said
    assert len(ase.io.read("md.xyz", index=":")) > 1


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--temperature=-1", "--temperature=-1.0: a number above 0"),
        ("--timestep=50", "--timestep=50.0: a number above 0, at most 10"),
        ("--every=0", "--every=0: a number above 0"),
        ("--seed=-1", "--seed=-1: a whole number"),
        ("--output=nowhere/md", "there is no folder"),
        ("--device=gpu", "no kind of device"),
        ("--head=other", "--head=other: the model has no such head"),
    ],
)
def test_what_makes_no_dynamics_is_refused(tmp_path, monkeypatch, flag, word):
    monkeypatch.chdir(tmp_path)
    assert word in tool_fails("md", "mini", ETHANOL, flag)
    assert list(tmp_path.iterdir()) == []


def test_drift_is_per_atom_and_ps_and_judged_where_energy_is_constant():
    def run(slope: float, length: float) -> Run:
        times = np.linspace(0, length, 11)
        return Run(4, [Sample(0, t, 0.0, 0.0, slope * t, 300.0) for t in times])

    nve, nvt = (Settings(kind, 300.0, 10, 0.5, 0, 1) for kind in ("nve", "nvt"))
    assert run(-0.02, 1.0).drift() == pytest.approx(-5.0)
    assert "drifts by -5 meV" in problems(run(-0.02, 1.0), nve)[0]
    assert problems(run(-0.02, 1.0), nvt) == problems(run(0.004, 1.0), nve) == []
    assert run(-0.02, 0.1).drift() is None
