"""Ways to compute a step: every one gives the numbers of eager, in every kind of model and run."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import zoo
from helpers.frames import FRAMES, ethanol
from helpers.running import run_command
from helpers.steps import METHODS, adapted, differs, step

from mace_lora.backends import library
from mace_lora.backends.base import Way
from mace_lora.backends.fusing import Eager, Fused
from mace_lora.model.injection import adapter_parameters
from mace_lora.model.merging import merge
from mace_lora.testing import outputs, worst
from mace_lora.upstream.predicting import frames_to_batch


@pytest.mark.parametrize("name", zoo.available())
def test_the_gradients_of_plain_mace_in_every_model(build, name):
    model = adapted(build(name))
    batch = frames_to_batch(ethanol("train", 2), model)
    expected = step(Way(), model, batch)
    for way in (Fused(), Eager()):
        found = step(way, model, batch)
        assert differs(expected[0], found[0]) < 1e-10
        assert differs(expected[1], found[1]) < 1e-10


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("method", METHODS)
def test_fused_gives_the_gradients_of_eager_for_every_method(build, method, frames):
    model = adapted(build("high_order"), method)
    batch = frames_to_batch(frames(), model)
    stress = bool(batch.to_dict()["pbc"].any())
    expected, found = (step(way, model, batch, stress) for way in (Way(), Fused()))
    assert ("stress" in expected[0]) == stress
    assert differs(expected[0], found[0]) < 1e-10
    assert differs(expected[1], found[1]) < 1e-10


def test_fused_in_float32(model, frames):
    model = adapted(model).float()
    batch = frames_to_batch(frames, model)
    expected, found = step(Way(), model, batch), step(Fused(), model, batch)
    assert found[0]["forces"].dtype == torch.float32
    assert differs(expected[0], found[0]) < 1e-4
    assert differs(expected[1], found[1]) < 1e-4


def test_fused_evaluates_like_eager(model, frames):
    model = adapted(model)
    batch = frames_to_batch(frames, model)
    expected, found = (step(way, model, batch, training=False) for way in (Way(), Fused()))
    assert differs(expected[0], found[0]) < 1e-10


def test_not_a_number_is_not_hidden(model, frames):
    """A diverged weight must show, or divergence is not noticed."""
    model = adapted(model)
    batch = frames_to_batch(frames, model)
    with torch.no_grad():
        next(iter(adapter_parameters(model).values())).fill_(float("nan"))
    found, _ = step(Fused(), model, batch)
    assert not torch.isfinite(found["energy"]).any()


def test_the_model_is_itself_outside_of_a_way(model, frames):
    model = adapted(model)
    state, code = set(model.state_dict()), [vars(m).get("forward") for m in model.modules()]
    way = Fused()
    with pytest.raises(RuntimeError, match="in the middle"), way.active(model):
        raise RuntimeError("in the middle")
    assert set(model.state_dict()) == state
    assert [vars(m).get("forward") for m in model.modules()] == code
    assert not any(hasattr(block, "conv_fusion") for block in model.interactions)


def test_a_way_follows_merging(model, frames):
    """The same model object, before and after its adapters are merged."""
    model, way = adapted(model), Fused()
    with way.active(model):
        before = outputs(model, frames)
    merge(model)
    with way.active(model):
        assert worst(before, outputs(model, frames)) < 1e-10
    assert worst(before, outputs(model, frames)) < 1e-10


def run_with(way: str, folder, flags, foundation):
    (folder / way).mkdir()
    return run_command(
        *flags, f"--foundation_model={foundation}", "--lora=True", f"--step={way}", cwd=folder / way
    )


def models_of(folder, *ways: str):
    return [torch.load(folder / way / "run.model", weights_only=False) for way in ways]


def test_a_run_gives_the_same_model_every_way(tmp_path, train_flags, foundation, frames):
    """Ten epochs with EMA, clipping and stage two: the losses of 20 steps, and the saved models."""
    flags = [*train_flags, "--max_num_epochs=10", "--ema", "--swa", "--start_swa=8", "--amsgrad"]
    logs = {}
    for way in ("eager", "fused"):
        run_with(way, tmp_path, flags, foundation)
        lines = (tmp_path / way / "results" / "run_run-1_train.txt").read_text().splitlines()
        logs[way] = [row["loss"] for row in map(json.loads, lines)]
    assert len(logs["eager"]) > 30
    assert logs["fused"] == pytest.approx(logs["eager"], rel=1e-8)
    one, other = models_of(tmp_path, "eager", "fused")
    assert worst(outputs(one, frames), outputs(other, frames)) < 1e-8


def test_losses_that_pick_rows_and_lbfgs(tmp_path, train_flags, foundation, frames):
    flags = [*train_flags, "--loss=universal", "--lbfgs", "--max_num_epochs=1"]
    for way in ("eager", "fused"):
        run_with(way, tmp_path, flags, foundation)
    one, other = models_of(tmp_path, "eager", "fused")
    assert worst(outputs(one, frames), outputs(other, frames)) < 1e-7


def test_without_a_compiler_a_run_goes_on_in_eager(tmp_path, train_flags, foundation, monkeypatch):
    monkeypatch.setenv("MACE_LORA_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = [*train_flags, "--max_num_epochs=1"]
    done = run_with("fused", tmp_path, flags, foundation)
    assert done.stdout.count("--step=fused can't serve this run, which goes on in eager") == 1
    assert "no C++ compiler" in done.stdout


def test_a_way_follows_a_cast(model, frames):
    model, way = adapted(model), Fused()
    step(way, model, frames_to_batch(frames, model))
    model = model.float()
    batch = frames_to_batch(frames, model)
    expected, found = step(Way(), model, batch), step(way, model, batch)
    assert differs(expected[1], found[1]) < 1e-4


def test_a_cache_that_can_not_be_written_to(tmp_path, monkeypatch, caplog):
    """As in a container whose home is read-only: the run needs a place all the same."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MACE_LORA_CACHE", str(tmp_path / "file" / "cache"))
    folder = library.cache_folder()
    (folder / "kernel.so").write_text("")
    assert library.cache_folder() == folder  # the same one throughout the process
    assert folder.stat().st_mode & 0o077 == 0  # what is loaded from it can't be another user's
    assert caplog.text.count("file/cache can't be written to") == 1
    assert "MACE_LORA_CACHE" in caplog.text
