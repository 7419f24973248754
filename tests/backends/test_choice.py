"""Which backend a model gets, and what the log says about it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from helpers.running import LATEST, here, short_run
from helpers.steps import adapted

from mace_lora.backends import library
from mace_lora.backends.base import CannotServe
from mace_lora.backends.choice import choose
from mace_lora.backends.cudagraph import CudaGraph
from mace_lora.backends.registry import AUTO, BACKENDS, CHOICES, describe, get_backend
from mace_lora.errors import ConfigError
from mace_lora.training.options import RunOptions


@pytest.fixture(autouse=True)
def _all_is_logged(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture
def without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("MACE_LORA_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    library.tried.cache_clear()
    yield
    library.tried.cache_clear()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_says_what_it_is(name):
    backend = get_backend(name)
    assert backend.name == name
    assert f"{name} (" in describe() or f"{name}: {backend.summary}" in describe()
    assert f": {backend.summary}" in describe()
    assert ("experimental" in describe().partition(f"{name} (")[2].partition(")")[0]) == (
        backend.experimental
    )


def test_help_needs_no_torch():
    code = "import sys; from mace_lora.training import options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_backend():
    with pytest.raises(ConfigError, match=r"unknown backend 'fast'; known: .*fused"):
        get_backend("fast")
    with pytest.raises(ConfigError, match=r"--step=compile: known: auto, cudagraph, eager, fused"):
        RunOptions(step="compile")
    assert set(CHOICES) == {AUTO, *BACKENDS}


def test_auto_is_the_first_that_can_serve(model, caplog):
    assert choose(AUTO, model).name == "fused"
    assert caplog.messages[-1] == "--step=auto: fused"


def test_without_a_compiler_auto_is_eager(model, caplog, without_a_compiler):
    assert choose(AUTO, model).name == "eager"
    (line,) = caplog.messages
    assert line.startswith("--step=auto: eager; fused can't serve this run: no C++ compiler")


def test_a_backend_that_can_not_serve(model, caplog):
    """There is no CUDA device for this model: one line, and the next best."""
    assert choose("cudagraph", model).name == "fused"
    assert caplog.messages[-1] == (
        "--step=cudagraph can't serve this run, which goes on in fused: "
        "it computes on cuda, and the model is on cpu"
    )


def test_a_precision_that_is_not_known(model, caplog):
    assert choose("fused", model.to(torch.bfloat16)).name == "eager"
    assert "it knows float32 and float64, not bfloat16" in caplog.text


def test_models_that_can_not_be_captured(build, monkeypatch):
    monkeypatch.setattr(CudaGraph, "devices", ("cpu",))
    with pytest.raises(CannotServe, match="dropout"):
        CudaGraph().check(adapted(build("residual"), dropout=0.5))
    model = build("residual")
    model.joint_embedding = torch.nn.Identity()
    with pytest.raises(CannotServe, match="reads more than"), CudaGraph().active(model):
        pass


def test_an_experimental_backend_says_so(model, caplog, monkeypatch):
    monkeypatch.setattr(CudaGraph, "devices", ("cpu",))
    assert choose("cudagraph", model).name == "cudagraph"
    assert caplog.messages == [
        "--step=cudagraph is experimental: compare its losses with --step=eager"
    ]


def test_a_run_without_a_compiler_goes_on_in_eager(
    tmp_path, small_data, foundation, caplog, without_a_compiler
):
    flags = short_run(small_data, foundation, "--step=fused", "--max_num_epochs=1")
    assert here(tmp_path / "run", *flags) == ""
    line = "--step=fused can't serve this run, which goes on in eager: no C++ compiler"
    assert sum(message.startswith(line) for message in caplog.messages) == 1


@pytest.mark.parametrize(("began", "key"), [("fused", "backend"), ("compile", "way")])
def test_a_continued_run_says_when_it_computes_otherwise(
    tmp_path, small_data, foundation, caplog, began, key
):
    """Version 0.1 had a backend more, and called them ways."""
    flags = short_run(small_data, foundation)
    assert here(tmp_path, *flags, "--max_num_epochs=1") == ""
    state = torch.load(tmp_path / LATEST, weights_only=True)
    assert state["progress"].pop("backend") == "fused"
    state["progress"][key] = began
    torch.save(state, tmp_path / LATEST)
    assert here(tmp_path, *flags, "--max_num_epochs=2", "--restart_latest") == ""
    told = f"This run began with --step={began} and goes on in fused"
    assert (told in caplog.text) == (began == "compile")
    after = torch.load(tmp_path / LATEST, weights_only=True)["progress"]
    assert after["backend"] == "fused"
    assert after["epoch"] == 2
