"""The CPU's backends give the numbers of the plain model, in every kind of model and run."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import zoo
from helpers.frames import FRAMES, ethanol
from helpers.running import here, run_command
from helpers.steps import METHODS, Plain, adapted, differs, step

from mace_lora.backends.base import Backend
from mace_lora.backends.eager import Eager
from mace_lora.backends.fused import Fused
from mace_lora.model.injection import adapter_parameters
from mace_lora.model.merging import merge
from mace_lora.testing import outputs, worst
from mace_lora.upstream.predicting import frames_to_batch


@pytest.mark.parametrize("name", zoo.available())
def test_the_gradients_of_plain_mace_in_every_model(build, name):
    model = adapted(build(name))
    batch = frames_to_batch(ethanol("train", 2), model)
    expected = step(Plain(), model, batch)
    for backend in (Fused(), Eager()):
        found = step(backend, model, batch)
        assert differs(expected[0], found[0]) < 1e-10
        assert differs(expected[1], found[1]) < 1e-10


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("method", METHODS)
def test_fused_gives_the_gradients_of_every_method(build, method, frames):
    model = adapted(build("high_order"), method)
    batch = frames_to_batch(frames(), model)
    stress = bool(batch.to_dict()["pbc"].any())
    expected, found = (step(b, model, batch, stress) for b in (Plain(), Fused()))
    assert ("stress" in expected[0]) == stress
    assert differs(expected[0], found[0]) < 1e-10
    assert differs(expected[1], found[1]) < 1e-10


def test_fused_in_float32(model, frames):
    model = adapted(model).float()
    batch = frames_to_batch(frames, model)
    expected, found = step(Plain(), model, batch), step(Fused(), model, batch)
    assert found[0]["forces"].dtype == torch.float32
    assert differs(expected[0], found[0]) < 1e-4
    assert differs(expected[1], found[1]) < 1e-4


def test_fused_evaluates_like_the_plain_model(model, frames):
    model = adapted(model)
    batch = frames_to_batch(frames, model)
    expected, found = (step(b, model, batch, training=False) for b in (Plain(), Fused()))
    assert differs(expected[0], found[0]) < 1e-10


def test_not_a_number_is_not_hidden(model, frames):
    """A diverged weight must show, or divergence is not noticed."""
    model = adapted(model)
    batch = frames_to_batch(frames, model)
    with torch.no_grad():
        next(iter(adapter_parameters(model).values())).fill_(float("nan"))
    found, _ = step(Fused(), model, batch)
    assert not torch.isfinite(found["energy"]).any()


def test_the_model_is_itself_outside_of_the_block(model, frames):
    model = adapted(model)
    state, code = set(model.state_dict()), [vars(m).get("forward") for m in model.modules()]
    backend = Fused()
    with pytest.raises(RuntimeError, match="in the middle"), backend.active(model):
        raise RuntimeError("in the middle")
    assert set(model.state_dict()) == state
    assert [vars(m).get("forward") for m in model.modules()] == code
    assert not any(hasattr(block, "conv_fusion") for block in model.interactions)


def test_a_block_in_a_block(model, frames):
    """As where a run predicts within a step: the inner one takes nothing from the outer one."""
    model, outer = adapted(model), Fused()

    def code() -> list[object]:
        return [vars(m).get("forward") for m in model.modules()]

    with outer.active(model):
        before = code()
        with Eager().active(model):
            assert code() != before
        assert code() == before
    assert not any(code())


def test_edges_that_lie_apart_in_memory(model, frames):
    """Every other column of a table, as slicing leaves it."""
    model, batch = adapted(model), frames_to_batch(frames, model)
    expected, gradients = step(Fused(), model, batch)
    wide = batch.edge_index.repeat_interleave(2, dim=1)
    batch["edge_index"] = wide.T.contiguous().T[:, ::2]
    assert not batch.edge_index[0].is_contiguous()
    found, other = step(Fused(), model, batch)
    assert differs(expected, found) == differs(gradients, other) == 0


def test_a_backend_follows_merging(model, frames):
    """The same model object, before and after its adapters are merged."""
    model, backend = adapted(model), Fused()
    batch = frames_to_batch(frames, model)
    before, _ = step(backend, model, batch, training=False)
    merge(model)
    for each in (backend, Plain()):
        assert differs(before, step(each, model, batch, training=False)[0]) < 1e-10


def run_with(backend: str, folder, flags, foundation):
    (folder / backend).mkdir()
    return run_command(
        *flags,
        f"--foundation_model={foundation}",
        "--lora=True",
        f"--step={backend}",
        cwd=folder / backend,
    )


def models_of(folder, *backends: str):
    return [torch.load(folder / b / "run.model", weights_only=False) for b in backends]


def test_a_run_gives_the_same_model_with_every_backend(tmp_path, train_flags, foundation, frames):
    """Ten epochs with EMA, clipping and stage two: the losses of 20 steps, and the saved models."""
    flags = [*train_flags, "--max_num_epochs=10", "--ema", "--swa", "--start_swa=8", "--amsgrad"]
    logs = {}
    for backend in ("eager", "fused"):
        run_with(backend, tmp_path, flags, foundation)
        lines = (tmp_path / backend / "results" / "run_run-1_train.txt").read_text().splitlines()
        logs[backend] = [row["loss"] for row in map(json.loads, lines)]
    assert len(logs["eager"]) > 30
    assert logs["fused"] == pytest.approx(logs["eager"], rel=1e-8)
    one, other = models_of(tmp_path, "eager", "fused")
    assert worst(outputs(one, frames), outputs(other, frames)) < 1e-8


def test_losses_that_pick_rows_and_lbfgs(tmp_path, train_flags, foundation, frames):
    flags = [*train_flags, "--loss=universal", "--lbfgs", "--max_num_epochs=1"]
    for backend in ("eager", "fused"):
        run_with(backend, tmp_path, flags, foundation)
    one, other = models_of(tmp_path, "eager", "fused")
    assert worst(outputs(one, frames), outputs(other, frames)) < 1e-7


def test_a_backend_follows_a_cast(model, frames):
    model, backend = adapted(model), Fused()
    step(backend, model, frames_to_batch(frames, model))
    model = model.float()
    batch = frames_to_batch(frames, model)
    expected, found = step(Plain(), model, batch), step(backend, model, batch)
    assert differs(expected[1], found[1]) < 1e-4


def test_building_a_backend_draws_no_random_numbers(model, frames):
    """Else dropout and whatever is drawn later would depend on --step, and on a restart."""
    model = adapted(model)
    batch = frames_to_batch(frames, model)
    before = torch.get_rng_state()
    step(Fused(), model, batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_full_fine_tuning(build):
    """No adapters: every parameter trains, weights of contractions and embedding too."""
    model = build("high_order")
    assert all(p.requires_grad for p in model.parameters())
    batch = frames_to_batch(FRAMES["mixed"](), model)
    expected, found = (all_gradients(b, model, batch) for b in (Plain(), Fused()))
    assert any("symmetric_contractions" in name for name in found)
    assert any("node_embedding" in name for name in found)
    assert differs(expected, found) < 1e-10


def test_training_from_random_numbers(tmp_path, small_data):
    """Without a foundation model or an adapter: the losses of mace-torch's own steps."""
    flags = ["--name=run", *(f"--{part}_file={small_data[part]}" for part in ("train", "valid"))]
    flags += ["--model=ScaleShiftMACE", "--hidden_irreps=4x0e + 4x1o", "--r_max=4", "--max_ell=2"]
    flags += ["--E0s=average", "--batch_size=5", "--valid_batch_size=5", "--max_num_epochs=3"]
    flags += ["--default_dtype=float64", "--seed=1", "--ema", "--correlation=2"]
    losses = {}
    for name, more in {"plain": [], "fused": ["--step=fused"]}.items():
        assert here(tmp_path / name, *flags, *more) == ""
        lines = (tmp_path / name / "results" / "run_run-1_train.txt").read_text().splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, lines)]
    assert len(losses["plain"]) > 8
    assert losses["fused"] == pytest.approx(losses["plain"], rel=1e-10)
    assert losses["fused"] != losses["plain"]  # other operations: rounding differs


def all_gradients(backend: Backend, model: torch.nn.Module, batch) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    with backend.active(model):
        found = model(batch.to_dict(), training=True)
        loss = found["energy"].sum() + (found["forces"] ** 2).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {k: g for k, g in zip(parameters, gradients, strict=True) if g is not None}
