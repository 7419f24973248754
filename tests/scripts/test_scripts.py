"""The scripts and configurations that the README names, run for real."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from helpers.frames import DATA
from helpers.running import run_program

from mace_lora import AdapterConfig, cli

ROOT = Path(__file__).parents[2]
FRAMES = DATA / "ethanol_train.xyz"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configurations_are_understood(path):
    args, config, options = cli.parse(["--config", str(path)])
    content = yaml.safe_load(path.read_text())
    adapter = content.pop("adapter", None) or ("lora" if content.pop("lora", False) else None)
    assert (config.method if config else None) == adapter
    if preset := content.pop(f"{adapter}_preset", None):
        assert config == AdapterConfig.create(adapter, preset=preset)
    known = {**{key: getattr(options, key, None) for key in content}, **vars(args)}
    assert {key: known[key] for key in content} == content


@pytest.mark.slow
def test_quickstart(tmp_path):
    if not (Path(sys.prefix) / "bin" / "activate").exists():
        pytest.skip("not in a virtual environment")
    flags = (f"--work_dir={tmp_path}", "--max_num_epochs=6")
    said = run_program(ROOT / "scripts" / "quickstart.sh", *flags, VENV=sys.prefix)
    assert "Before -> after training" in said
    for file in ("ethanol.model", "ethanol_compiled.model", "ethanol_learning_curve.png"):
        assert (tmp_path / file).exists()
        assert str(tmp_path / file) in said


@pytest.mark.slow
@pytest.mark.parametrize("study", ["init", "mini"])
def test_study(tmp_path, study):
    """Two epochs of every variant: the table has a row for each."""
    run_program(
        *(sys.executable, ROOT / "scripts" / "study.py", study),
        *("--out", tmp_path, "--epochs=2", "--eval_interval=1", "--dtype=float32"),
        *("--only", "rank 4"),
    )
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + {"init": 5, "mini": 1}[study]
    assert "rank 4" in lines[2]


def test_all_work_of_a_step_is_counted():
    """Of one frame: our kernels, which are no operations of torch, as well."""
    said = run_program(
        *(sys.executable, ROOT / "scripts" / "bench_floor.py", f"--frames={FRAMES}"),
        *("--batch=1", "--models", "mini", "--rounds=1"),
    )
    rows = [line.split("|")[1:-1] for line in said.splitlines() if "|" in line][2:]
    calls = {row[0].strip(): int(row[-1]) for row in rows}
    # What training on forces asks of each product. Of the second convolution: the message, its
    # derivatives by x, y and w for forces, and of these and of the message once more those by all
    # but y, which only positions are behind; the first has no positions behind x, either
    assert calls["convolution (our kernel)"] == (1 + 3 + 3 + 2 + 2 + 2) + (1 + 2 + 3 + 2 + 2)
    assert calls["symmetric contraction (our kernel)"] == 8
    assert calls.pop("all") == sum(calls.values())


@pytest.mark.slow
def test_whole_runs_are_compared():
    """Three frames of ethanol, one epoch of each program."""
    said = run_program(
        *(sys.executable, ROOT / "scripts" / "bench_run.py", f"--frames={FRAMES}"),
        *("--n_frames=3", "--n_valid=1", "--flags", "protect=False"),
    )
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if "|" in line}
    theirs, ours, ratio = (rows[who].split("|")[2:5] for who in ("mace-torch", "ours", "ratio"))
    for a, b, found in zip(ours, theirs, ratio, strict=True):
        assert float(found) == pytest.approx(float(a) / float(b), abs=0.1)
