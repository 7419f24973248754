"""`mace_lora trust`, on what `mace_run_train` leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.frames import DATA
from helpers.running import here, short_run

from mace_lora.cli import main_tools

TEST = str(DATA / "ethanol_test.xyz")


def trust(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main_tools(["trust", *arguments])
    return str(stop.value.code)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_data):
    """The merged model of a short run from `mini`, with flags."""

    def train(*flags: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        assert here(folder, *short_run(small_data, "mini", "--max_num_epochs=5", *flags)) == ""
        return folder / "run.model"

    return train


@pytest.mark.slow
def test_a_fine_tuned_model_passes(run, tmp_path, capsys):
    model, page = run("--energy_weight=100", "--protect=True"), tmp_path / "trust.html"
    flags = ["--base", "mini", "--data", TEST, "--ps=0.05", f"--output={page}"]
    assert trust(str(model), *flags) == "0"
    said = capsys.readouterr().out
    assert "no check failed" in said
    assert str(page) in said
    assert "data:image/png" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_average_e0s_fail(run, capsys):
    model = run("--E0s=average")
    capsys.readouterr()
    assert trust(str(model), "--base=mini", f"--data={TEST}", "--ps=0", "--json") == "1"
    found = json.loads(capsys.readouterr().out)
    assert "E0s" in found["problems"]
    (check,) = (c for c in found["checks"] if c["name"] == "E0s")
    assert check["value"] < -20


def test_mini_itself_without_data(capsys):
    assert trust("mini", "--ps=0") == "0"
    assert "pairs of atoms: no hole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["mini", "--head=x"], "the model has no such head"),
        (["mini", "--ps=-1"], "0 or more, is needed"),
        (["mini", "--base=nothing.model"], "nothing.model"),
        (["mini", "--output=no/such/folder.html"], "there is no folder"),
    ],
)
def test_mistakes(flags, words):
    assert words in trust(*flags)
