"""Short runs that choose settings."""

from __future__ import annotations

import json
import math

import ase.io
import pytest
import yaml
from helpers.frames import ethanol
from helpers.running import tool_fails, tool_prints

from mace_lora.commands.tune import would_more_help
from mace_lora.tuning import search
from mace_lora.tuning.search import Candidate, Search, Tried
from mace_lora.tuning.trials import Outcome, train


def outcome(score: float) -> Outcome:
    return Outcome({"rmse_f": 100.0}, {"rmse_f": 100.0 * score})


def test_the_score_is_what_is_left_of_all_errors():
    found = Outcome(
        {"rmse_e_per_atom": 10.0, "rmse_f": 300.0}, {"rmse_e_per_atom": 5.0, "rmse_f": 150}
    )
    assert found.score == pytest.approx(0.5)
    assert Outcome({"rmse_f": 300.0}, {"rmse_f": math.inf}).score == math.inf


def test_the_best_third_is_trained_longer_and_the_best_of_those_wins(tmp_path, monkeypatch):
    """Of nine candidates; one that is behind early on may win later."""
    early = {f"c{i}": 0.5 + i / 10 for i in range(9)}
    late = {"c0": 0.4, "c1": 0.3, "c2": 0.35}
    made = []

    def train(folder, flags, at_once):
        name = flags["adapter"]
        made.append((name, flags["max_num_epochs"]))
        return outcome(early[name] if flags["max_num_epochs"] == 40 else late[name])

    monkeypatch.setattr(search, "train", train)
    files = {50: tmp_path / "t.xyz"}
    runs = Search(tmp_path, {"batch_size": 10}, files, 450, lambda _: None)
    found = runs.halve([Candidate(name, {"adapter": name}) for name in early])
    assert found[-1].candidate.name == "c1"
    assert [name for name, epochs in made if epochs == 120] == ["c0", "c1", "c2"]


def test_a_run_that_diverges_is_a_bad_candidate_and_no_failure(tmp_path, small_data):
    flags = {"foundation_model": "mini", "adapter": "lora", "protect": False, "E0s": "average"}
    files = {f"{part}_file": small_data[part] for part in ("train", "valid")}
    found = train(tmp_path, {**flags, **files, "lr": 1e9, "clip_grad": 1e9, "max_num_epochs": 20})
    assert found.score == math.inf


@pytest.mark.parametrize(
    ("half", "whole", "said"), [(0.5, 0.4, "would help"), (0.5, 0.499, "would hardly help")]
)
def test_whether_more_frames_would_help(half, whole, said):
    tried = [Tried(Candidate("a", {}), 600, n, outcome(s)) for n, s in ((10, half), (20, whole))]
    assert said in would_more_help(tried)


def test_too_few_frames_are_refused(tmp_path):
    ase.io.write(tmp_path / "few.xyz", ethanol("train", 5))
    error = tool_fails(
        *("tune", "--foundation_model", "mini", "--train_file", str(tmp_path / "few.xyz")),
        *("--output", str(tmp_path / "out")),
    )
    assert "4 frames to train on; 10 are needed" in error


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_and_its_winner_can_be_trained(tmp_path, monkeypatch, capsys):
    """With few steps and two candidates: the whole path."""
    monkeypatch.setattr(search, "STEPS", (4, 8))
    monkeypatch.setattr(search, "GRID", (("full", None, (0.005,)), ("lora", "balanced", (0.01,))))
    ase.io.write(tmp_path / "train.xyz", ethanol("train", 24))
    line = ("--foundation_model", "mini", "--train_file", tmp_path / "train.xyz")
    line = (*line, "--output", tmp_path / "out", "--json")
    first = json.loads(tool_prints(capsys, "tune", *line))
    assert len(first["tried"]) == 3
    assert [t["frames"] for t in first["by_frames"]] == [5, 11, 22]
    winner = first["tried"][-1]
    assert 0 < winner["left"] < 1
    best = yaml.safe_load((tmp_path / "out/best.yaml").read_text())
    assert {k: best[k] for k in first["flags"]} == first["flags"]
    assert first["winner"] in (tmp_path / "out/tune.html").read_text()
    times = {p: p.stat().st_mtime for p in (tmp_path / "out/runs").glob("*/run.model")}
    assert json.loads(tool_prints(capsys, "tune", *line)) == first
    assert times == {p: p.stat().st_mtime for p in (tmp_path / "out/runs").glob("*/run.model")}
