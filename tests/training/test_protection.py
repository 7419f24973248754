"""`--protect`: the start's forces are kept where no label speaks, and nothing else is."""

from __future__ import annotations

from copy import deepcopy

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from helpers.frames import ethanol
from helpers.running import here, short_run

from mace_lora import AdapterConfig, inject, load_foundation
from mace_lora.frames import anchors
from mace_lora.model.injection import adapter_parameters
from mace_lora.testing import randomise_
from mace_lora.training.epochs.computing import Computing
from mace_lora.training.epochs.protection import FREE, RELATIVE, Protection, cost, fallen
from mace_lora.training.epochs.steps import Steps
from mace_lora.training.options import RunOptions
from mace_lora.upstream.predicting import frames_to_batch, frames_to_data, predict


def test_errors_within_what_is_free_cost_nothing():
    """However they turn: up to FREE plus RELATIVE of the force."""
    wanted = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    free = torch.tensor([FREE + 3 * RELATIVE, FREE], dtype=torch.float64)
    direction = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    both = torch.tensor([True, True])
    assert cost(wanted + 0.99 * free[:, None] * direction, wanted, both) == 0
    far = wanted + 3.0 * free[:, None] * direction
    assert cost(far, wanted, both).item() == pytest.approx(np.log(1 + 2.0**2))
    far[1] = 1e3
    assert cost(far, wanted, ~both).item() == 0
    assert cost(far, wanted, torch.tensor([True, False])) == pytest.approx(np.log(5.0) / 2)


def test_the_deepest_hole_is_drawn_at_as_much_as_any():
    """Where repulsion became attraction; of a force that is too strong this is not asked."""
    wanted = torch.tensor([[30.0, 0.0, 0.0]], dtype=torch.float64)

    def pull(factor: float) -> float:
        found = (factor * wanted).requires_grad_()
        cost(found, wanted, torch.tensor([True])).backward()
        assert found.grad is not None
        return float(-found.grad[0, 0])

    unit = 1 / (FREE + 30 * RELATIVE)
    assert pull(1.05) == pull(0.95) == 0
    assert min(pull(-1), pull(-10), pull(-1000)) > unit
    assert 0 < -pull(1000) < 0.1 * unit


def test_a_wall_whose_energy_falls_costs():
    """As H-C of a trained model did by 0.4 eV; a lower wall, another zero and flat parts don't."""
    start = torch.tensor([6.5, 6.2, 5.4, 4.1, 3.4, 3.4, 3.35], dtype=torch.float64)
    distances = torch.arange(7, dtype=torch.float64) * 0.05 + 0.6
    assert fallen(start - 100.0, start, distances) == 0
    assert fallen(0.8 * start, start, distances) == 0
    flat = start + torch.tensor([0, 0, 0, 0, 0, 0, 0.05])
    assert fallen(flat, start, distances) == 0
    hole = torch.tensor([4.8, 5.4, 5.2, 4.1, 3.4, 3.4, 3.35], dtype=torch.float64)
    hole.requires_grad_()
    cost_of_hole = fallen(hole, start, distances)
    cost_of_hole.backward()
    assert cost_of_hole > 0.5
    assert hole.grad[0] < 0  # up with it
    assert (hole.grad[4:] == 0).all()
    assert fallen(hole[:2], start[:2], distances[:2]) == 0  # too few to tell


def test_the_gradient_is_that_of_the_cost():
    wanted = torch.randn(5, 3, dtype=torch.float64)
    found = (wanted + 2 * torch.randn(5, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f: cost(f, wanted, torch.ones(5, dtype=torch.bool)), (found,)
    )


def test_pairs_are_of_every_two_elements_from_contact_on():
    frames = anchors.pairs([8, 1, 6])
    kinds = {tuple(sorted(f.numbers)) for f in frames}
    assert kinds == {(1, 1), (1, 6), (1, 8), (6, 6), (6, 8), (8, 8)}
    others = anchors.pairs([1, 6, 7, 8], without=[1, 6, 8])
    assert {tuple(sorted(f.numbers)) for f in others} == {(1, 7), (6, 7), (7, 7), (7, 8)}
    distances = [f.get_distance(0, 1) for f in others if set(f.numbers) == {1, 7}]
    assert min(distances) < 0.5
    assert max(distances) > 2.8
    own = sorted(f.get_distance(0, 1) for f in frames if set(f.numbers) == {1, 6})
    assert np.diff([d for d in own if d < 1.05]).max() < 0.03  # no room for a hole between two
    assert len(anchors.pairs(range(1, 90))) == anchors.MOST_PAIRS


def test_distorted_crystals_keep_their_neighbours():
    crystal = ase.Atoms("CO", [[0, 0, 0], [0, 0, 1.2]], cell=[3, 4, 5], pbc=True)
    made, sources = anchors.distorted([crystal], 20)
    assert sources == [0] * 20
    scales = [f.cell.lengths()[0] / 3 for f in made]
    assert min(scales) < 0.85
    assert max(scales) > 1.05
    lengths = np.array([f.cell.lengths() for f in made])
    assert np.allclose(lengths / [3, 4, 5], np.array(scales)[:, None])
    assert all(f.pbc.all() for f in made)


@pytest.fixture(scope="module")
def start() -> torch.nn.Module:
    return load_foundation("mini", dtype=torch.float64)


def protection(model: torch.nn.Module, batch_size: int = 5) -> Protection:
    dataset = frames_to_data(ethanol("train", 5), model)
    return Protection(model, dataset, Computing("auto"), 3, batch_size)


@pytest.mark.parametrize("method", ["lora", "full", "mmea"])
def test_the_teacher_is_the_start(start, method):
    """Whatever the adapters are when the run is continued; an identity costs nothing."""
    model = deepcopy(start)
    inject(model, AdapterConfig.create(method))
    fresh = protection(model)
    assert all(not g.any() for g in fresh.gradients(0).values())
    randomise_(model, 1)
    again = protection(model)
    both = zip(fresh.gradients(0).items(), again.gradients(0).items(), strict=True)
    assert all(p is q and torch.equal(g, h) for (p, g), (q, h) in both)
    assert any(g.any() for g in again.gradients(0).values())
    assert fresh.gradients(1) == {}
    assert protection(model, batch_size=1).gradients(2) == {}  # as dear as the step itself


def test_its_gradient_lowers_the_error_on_pairs_that_are_no_anchors(start):
    """From a model whose walls are broken, by steps along that gradient alone."""
    model = deepcopy(start)
    inject(model, AdapterConfig.create("lora", rank=4, alpha=4.0, targets=("all",)))
    randomise_(model, 1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter *= 2
    distances = np.arange(0.8, 1.6, 0.07)
    pairs = [ase.Atoms("HO", [[0, 0, 0], [0, 0, d]]) for d in distances]
    batch = frames_to_batch(pairs, model)
    wanted = predict(start, [batch])["forces"]

    def error() -> float:
        return (predict(model, [batch])["forces"] - wanted).abs().mean().item()

    before, guard = error(), protection(model)
    assert before > 2
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(0, 420, 2):
        optimiser.zero_grad()
        for parameter, gradient in guard.gradients(step).items():
            parameter.grad = gradient
        optimiser.step()
    assert error() < 0.3 * before


def test_gradients_join_at_the_optimisers_steps_alone():
    """With accumulation at the last batch of each group, by the number of the step."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser, asked = torch.optim.SGD([weight], lr=1.0), []

    def more(step):
        asked.append(step)
        return {weight: torch.ones(1)}

    def step(optimizer, model, loss_fn, **_):
        optimizer.zero_grad()
        optimizer.step()
        return 0.0, {"loss": 0.0}

    steps = Steps(RunOptions(accumulate=2), 5, more)
    for _ in range(10):  # two epochs of 2 + 2 + 1 batches
        steps.take(step, optimizer=optimiser, model=torch.nn.Module(), loss_fn=None)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert weight.item() == -6


def test_lbfgs_is_refused(tmp_path, small_data, foundation):
    flags = short_run(small_data, foundation, "--protect=True", "--lbfgs")
    assert "leave one of them out" in here(tmp_path, *flags)


@pytest.mark.parametrize("name", ["two_heads_biased_readout", "density_zbl_agnesi", "charge_spin"])
def test_every_kind_of_model_in_every_backend(build, name):
    """Anchors have the heads, charges and spins of the frames that they are made of."""
    model = build(name)
    inject(model, AdapterConfig.create("full"))
    dataset = frames_to_data(ethanol("train", 5), model)
    guards = [Protection(model, dataset, Computing(way), 3, 5) for way in ("eager", "fused")]
    randomise_(model, 1)
    with torch.no_grad():  # so that errors exceed what is free
        for parameter in adapter_parameters(model).values():
            parameter *= 30
    eager, fused = (guard.gradients(0) for guard in guards)
    assert eager.keys() == fused.keys()
    largest = max(g.abs().max() for g in eager.values())
    assert largest > 0
    assert all((eager[p] - fused[p]).abs().max() <= 1e-10 * largest for p in eager)


@pytest.mark.slow
def test_crystals_with_stress(tmp_path, foundation):
    """Periodic anchors beside a loss of stresses; the merge is proved as ever."""
    rng = np.random.default_rng(1)
    frames = []
    for _ in range(6):
        atoms = bulk("C", "diamond", a=3.6, cubic=True)
        atoms.rattle(0.05, rng=rng)
        atoms.info |= {"REF_energy": -70.0 + rng.normal(), "REF_stress": 0.01 * np.eye(3)}
        atoms.arrays["REF_forces"] = rng.normal(scale=0.3, size=(8, 3))
        frames.append(atoms)
    path = tmp_path / "crystals.xyz"
    ase.io.write(path, frames)
    files = {"train": str(path), "valid": str(path)}
    flags = ["--max_num_epochs=2", "--loss=universal", "--stress_weight=1", "--protect=True"]
    assert here(tmp_path, *short_run(files, foundation, "--batch_size=2", *flags)) == ""
    said = (tmp_path / "logs").glob("*.log")
    assert "distorted training frames are kept" in next(iter(said)).read_text()
    assert (tmp_path / "run.model").exists()
