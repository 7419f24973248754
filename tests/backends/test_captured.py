"""Whole steps on recorded parts, on a CPU: what CUDA would replay is called again instead.

Everything is as with CUDA graphs, fixed memory included, but for the capture itself.
"""

from __future__ import annotations

import signal
from pathlib import Path

import ase.io
import pytest
import torch
from helpers.frames import FRAMES, ethanol
from helpers.running import LATEST, here, results, same_weights, short_run, signal_after
from helpers.steps import adapted, differs, step
from torch_ema import ExponentialMovingAverage

from mace_lora.backends import recording
from mace_lora.backends.base import Way
from mace_lora.backends.cudagraph import Captured
from mace_lora.backends.padding import Shape, pad, sizes
from mace_lora.backends.resident import Resident
from mace_lora.backends.update import Update
from mace_lora.testing import outputs, worst
from mace_lora.upstream import names as upstream
from mace_lora.upstream.predicting import frames_to_batch, frames_to_data


@pytest.fixture(autouse=True)
def _called(monkeypatch):
    """Functions are called again, where CUDA would replay them."""
    monkeypatch.setattr(recording, "recorder_for", lambda device: recording.Called())


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
def test_gradients_of_eager_batch_after_batch(build, frames):
    """Two batches through the same memory: nothing of the first is left in the second."""
    model = adapted(build("residual"))
    several = frames()
    batches = [frames_to_batch(f, model) for f in (several, several[:1], several)]
    stress = bool(batches[0].to_dict()["pbc"].any())
    edges, atoms, structures = sizes(batches[0].to_dict())
    way = Captured([Shape.around(edges, atoms, structures)])
    for batch in batches:
        expected, found = (step(w, model, batch, stress) for w in (Way(), way))
        assert differs(expected[0], found[0]) < 1e-10
        assert differs(expected[1], found[1]) < 1e-10


def test_gradients_of_a_model_converted_to_cuequivariance(build, frames):
    pytest.importorskip("cuequivariance_torch")
    model = adapted(upstream.original("to_cueq")(build("foundation"), device="cpu"))
    assert any("cuequivariance" in type(m).__module__ for m in model.modules())
    batch = frames_to_batch(frames, model)
    way = Captured([Shape.around(*sizes(batch.to_dict()))])
    for _ in range(2):
        expected, found = (step(w, model, batch) for w in (Way(), way))
        assert differs(expected[0], found[0]) < 1e-10
        assert differs(expected[1], found[1]) < 1e-10


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
def test_a_gathered_batch_is_the_collated_one(model, frames):
    dataset = frames_to_data(frames(), model)
    whole = frames_to_batch(frames(), model)
    edges, atoms, structures = sizes(whole.to_dict())
    shape = Shape.around(edges + 5, atoms + 3, structures + 2)
    resident = Resident(
        [d.to_dict() for d in dataset], [shape], float(model.r_max), torch.device("cpu"),
        recording.Called(),
    )  # fmt: skip
    for chosen in ([1, 0], list(range(len(dataset)))):
        collated = frames_to_batch([frames()[i] for i in chosen], model)
        expected = pad(collated.to_dict(), shape, float(model.r_max))
        batch = resident.batch(chosen)
        for key, tensor in expected.items():
            assert torch.equal(batch.padded[key], tensor), key
        assert batch.num_graphs == len(chosen)
        plain = collated.to_dict()
        for key, tensor in batch.to_dict().items():
            assert torch.equal(tensor, plain[key]), key


SETTINGS = {
    "ema, amsgrad, clipping, plateau": (
        *("--ema", "--amsgrad", "--clip_grad=0.5", "--batch_size=4"),
        *("--scheduler=ReduceLROnPlateau", "--scheduler_patience=0", "--lr_factor=0.5"),
    ),
    "adamw, stage two, warm-up, learning rates of parts": (
        *("--optimizer=adamw", "--weight_decay=0.1", "--swa", "--start_swa=3", "--ema"),
        *("--scheduler=ExponentialLR", "--lr_scheduler_gamma=0.8", "--clip_grad=None"),
        *("--warmup_steps=4", "--lora_lr_ratio=4", "--loss=huber"),
        '--lr_params_factors={"embedding_lr_factor": 0.5, "interactions_lr_factor": 2.0}',
    ),
    "two batches make a step, float32": ("--accumulate=2", "--ema", "--default_dtype=float32"),
}


@pytest.mark.parametrize("more", SETTINGS.values(), ids=SETTINGS)
def test_a_run_is_that_of_eager(tmp_path, small_data, foundation, frames, more):
    """Losses of every step and validation, learning rates with them, and the model that is left."""
    flags = short_run(small_data, foundation, "--max_num_epochs=5", *more)
    for way in ("eager", "cudagraph"):
        assert here(tmp_path / way, *flags, f"--step={way}") == ""
    tolerance = 1e-5 if "--default_dtype=float32" in more else 1e-9
    logs = [results(tmp_path / way) for way in ("eager", "cudagraph")]
    assert len(logs[0]) == len(logs[1]) >= 15
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance)
        assert (one["mode"], one["epoch"]) == (other["mode"], other["epoch"])
    models = [
        torch.load(tmp_path / way / "run.model", weights_only=False)
        for way in ("eager", "cudagraph")
    ]
    one, other = (outputs(m.double(), frames) for m in models)
    assert worst(one, other) < 100 * tolerance
    states = [
        torch.load(tmp_path / way / LATEST, weights_only=True) for way in ("eager", "cudagraph")
    ]
    groups = [s["optimizer"]["param_groups"] for s in states]
    assert [g["lr"] for g in groups[0]] == pytest.approx([g["lr"] for g in groups[1]])
    if states[0]["ema"] is not None:  # Adam divides small gradients by themselves, errors too
        pairs = zip(*(s["ema"]["shadow"] for s in states), strict=True)
        loose = {"rtol": 1e4 * tolerance, "atol": 10 * tolerance}
        assert all(torch.allclose(a, b, **loose) for a, b in pairs)
        assert states[0]["ema"]["num_updates"] == states[1]["ema"]["num_updates"]


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, small_data, foundation):
    flags = short_run(
        *(small_data, foundation, "--max_num_epochs=6", "--batch_size=3", "--ema"),
        "--step=cudagraph",
    )
    assert here(tmp_path / "whole", *flags) == ""
    with signal_after(signal.SIGTERM, tmp_path / "cut", 5):
        assert here(tmp_path / "cut", *flags) == "75"
    assert here(tmp_path / "cut", *flags, "--restart_latest") == ""
    assert results(tmp_path / "whole") == results(tmp_path / "cut")
    assert same_weights(tmp_path / "whole/run.model", tmp_path / "cut/run.model")


def test_a_loss_that_is_no_number_is_noticed_and_its_frames_are_named(
    tmp_path, small_data, foundation
):
    """Losses are looked at later, and still belong to their step."""
    frames = ase.io.read(small_data["train"], index=":")
    frames[6].arrays["REF_forces"][0] = 1e200  # whose square is infinite
    bad = tmp_path / "bad.xyz"
    ase.io.write(bad, frames)
    flags = short_run({**small_data, "train": str(bad)}, foundation, "--max_num_epochs=3")
    said = here(tmp_path / "run", *flags, "--step=cudagraph", "--batch_size=2")
    assert "training loss is" in said
    assert "training has diverged" in said
    assert "epoch 0" in said
    assert "6" in said.partition("on frames [")[2].partition("]")[0]
    assert not Path(tmp_path / "run" / LATEST).exists()


OPTIMISERS = {
    "adam": (torch.optim.Adam, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
}


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e3])
@pytest.mark.parametrize(("kind", "options"), OPTIMISERS.values(), ids=OPTIMISERS)
def test_an_update_is_that_of_torch(kind, options, max_norm):
    """Twenty steps of two groups with changing learning rates: parameters, averages and state; the
    first five by torch alone, as of a run that is continued."""
    torch.manual_seed(0)
    start = [torch.randn(n, 3, dtype=torch.float64) for n in (1, 4, 2)]
    runs = []
    for _ in range(2):
        parameters = [torch.nn.Parameter(t.clone()) for t in start]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.3}]
        optimizer = kind(groups, lr=0.1, betas=(0.8, 0.99), **options)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        runs.append((parameters, optimizer, schedule, ExponentialMovingAverage(parameters, 0.9)))
    update = None
    for i in range(20):
        gradients = [torch.randn_like(t) for t in start]
        for which, (parameters, optimizer, schedule, ema) in enumerate(runs):
            if which == 1 and i >= 5:
                update = update or Update(optimizer, ema, max_norm, recording.Called())
                update(gradients)
            else:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.clone()
                if max_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
                optimizer.step()
                ema.update()
            if i % 3 == 0:
                schedule.step()
    one, other = runs
    assert one[3].num_updates == other[3].num_updates
    pairs = [*zip(one[0], other[0], strict=True)]
    pairs += zip(one[3].shadow_params, other[3].shadow_params, strict=True)
    for a, b in zip(one[0], other[0], strict=True):
        states = one[1].state[a], other[1].state[b]
        assert states[0].keys() == states[1].keys()
        pairs += [(states[0][k], states[1][k]) for k in states[0]]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in pairs)


def test_evaluations_are_those_of_eager(model):
    model = adapted(model)
    batch = frames_to_batch(ethanol("valid", 4), model)
    edges, atoms, structures = sizes(batch.to_dict())
    way = Captured([Shape.around(edges, atoms, structures)])
    expected, found = (step(w, model, batch, training=False) for w in (Way(), way))
    assert differs(expected[0], found[0]) < 1e-10
