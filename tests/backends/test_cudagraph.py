"""Padded batches, the flow of captured calls and their memory, on a CPU; not CUDA's part."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.frames import FRAMES
from helpers.graphs import captured_on_a_cpu
from helpers.running import here, results, short_run
from helpers.steps import Plain, adapted, differs, step

from mace_lora.backends.cudagraph import CudaGraph
from mace_lora.testing import outputs, worst
from mace_lora.upstream import names as upstream
from mace_lora.upstream.predicting import frames_to_batch


@pytest.fixture(autouse=True)
def _on_a_cpu(caplog):
    caplog.set_level(logging.INFO)
    with captured_on_a_cpu():
        yield


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
def test_gradients_of_the_plain_model_batch_after_batch(build, frames, caplog):
    """Batches through the same memory: nothing of the first is left in the next."""
    model = adapted(build("residual"))
    several = frames()
    moved = [f.copy() for f in several]
    for frame in moved:
        frame.rattle(0.01, seed=1)
    batches = [frames_to_batch(f, model) for f in (several, moved, several[:1], several)]
    stress = bool(batches[0].to_dict()["pbc"].any())
    backend = CudaGraph()
    for batch in batches:
        expected, found = (step(b, model, batch, stress) for b in (Plain(), backend))
        assert differs(expected[0], found[0]) < 1e-10
        assert differs(expected[1], found[1]) < 1e-10
    captures = [m for m in caplog.messages if m.startswith("Capturing training")]
    assert 1 <= len(captures) < len(batches)
    assert "can't serve" not in caplog.text


def test_results_outlive_the_next_replay(model, frames):
    model, backend = adapted(model), CudaGraph()
    one, other = (frames_to_batch([f], model) for f in frames[:2])
    found, _ = step(backend, model, one)
    kept = {k: v.clone() for k, v in found.items()}
    step(backend, model, other)
    assert all(torch.equal(found[k], kept[k]) for k in kept)


def test_evaluations_are_those_of_the_plain_model(model, frames):
    model = adapted(model)
    batch = frames_to_batch(frames, model)
    expected, found = (step(b, model, batch, training=False) for b in (Plain(), CudaGraph()))
    assert differs(expected[0], found[0]) < 1e-10


def test_wrong_results_are_noticed(model, frames, monkeypatch, caplog):
    """What is captured is compared with the model before it is used."""
    model = adapted(model)
    batch = frames_to_batch(frames, model)
    monkeypatch.setattr(
        torch.cuda,
        "make_graphed_callables",
        lambda function, *_, **__: lambda *tensors: tuple(2 * r for r in function(*tensors)),
    )
    backend = CudaGraph()
    for _ in range(2):
        expected, found = (step(b, model, batch) for b in (Plain(), backend))
        assert differs(expected[1], found[1]) < 1e-10
    said = [m for m in caplog.messages if "which goes on in eager: Tensor-likes are not close" in m]
    assert len(said) == 1


def test_no_more_shapes_than_memory_is_kept_for(model, frames, monkeypatch, caplog):
    monkeypatch.setattr("mace_lora.backends.cudagraph.MOST_SHAPES", 1)
    model, backend = adapted(model), CudaGraph()
    for n in (1, 3):
        batch = frames_to_batch(frames[:n], model)
        expected, found = (step(b, model, batch) for b in (Plain(), backend))
        assert differs(expected[1], found[1]) < 1e-10
    assert caplog.text.count("Capturing") == 1


def test_what_is_trained_may_change(model, frames):
    model, backend = adapted(model), CudaGraph()
    batch = frames_to_batch(frames, model)
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    step(backend, model, batch)
    frozen.requires_grad_(True)
    for each in (Plain(), backend):
        with each.active(model):
            model(batch.to_dict(), training=True)["forces"].square().sum().backward()
    # the same gradient twice: by the plain model, and replayed
    once = frozen.grad / 2
    frozen.grad = None
    with Plain().active(model):
        model(batch.to_dict(), training=True)["forces"].square().sum().backward()
    assert frozen.grad.abs().max() > 0
    assert torch.allclose(frozen.grad, once, rtol=1e-9)


@pytest.mark.parametrize(
    "more",
    [
        ("--ema", "--amsgrad", "--clip_grad=0.5", "--batch_size=4"),
        ("--accumulate=2", "--ema", "--batch_size=2", "--warmup_steps=4"),
    ],
    ids=["ema, amsgrad, clipping", "two batches make a step"],
)
def test_a_run_is_that_of_eager(tmp_path, small_data, foundation, frames, more, caplog):
    """Losses of every step and validation, and the model that is left."""
    flags = short_run(small_data, foundation, "--max_num_epochs=3", *more)
    for name in ("eager", "cudagraph"):
        assert here(tmp_path / name, *flags, f"--step={name}") == ""
    assert "can't serve" not in caplog.text
    logs = [results(tmp_path / name) for name in ("eager", "cudagraph")]
    assert len(logs[0]) == len(logs[1]) >= 9
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-8)
    one, other = (
        outputs(torch.load(tmp_path / name / "run.model", weights_only=False), frames)
        for name in ("eager", "cudagraph")
    )
    assert worst(one, other) < 1e-7


def test_gradients_of_a_model_converted_to_cuequivariance(build, frames):
    pytest.importorskip("cuequivariance_torch")
    model = adapted(upstream.original("to_cueq")(build("foundation"), device="cpu"))
    assert any("cuequivariance" in type(m).__module__ for m in model.modules())
    batch = frames_to_batch(frames, model)
    expected, found = (step(b, model, batch) for b in (Plain(), CudaGraph()))
    assert differs(expected[0], found[0]) < 1e-10
    assert differs(expected[1], found[1]) < 1e-10
