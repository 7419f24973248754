"""Injection, one training step and the merge, for every kind of model that mace-torch offers."""

from copy import deepcopy

import pytest
import torch
from helpers import zoo

from mace_lora import AdapterConfig, inject, merge
from mace_lora.adapters.registry import METHODS
from mace_lora.model.injection import adapters
from mace_lora.model.layers import find_sites
from mace_lora.testing import (
    loss_of,
    outputs,
    randomise_,
    symmetry_errors,
    train,
    worst,
)
from mace_lora.upstream.predicting import MERGE_TOLERANCE, frames_to_batch

KINDS = sorted(zoo.available())


@pytest.mark.parametrize(
    ("method", "targets"), [("lora", "default"), *((method, "all") for method in sorted(METHODS))]
)
@pytest.mark.parametrize("name", KINDS)
def test_inject_train_merge(build, frames, name, method, targets):
    model = build(name)
    before = outputs(model, frames)
    inject(model, AdapterConfig.create(method, targets=(targets,)))
    assert worst(before, outputs(model, frames)) <= 1e-12

    list(train(model, frames_to_batch(frames, model), steps=2))
    trained = outputs(model, frames)
    assert worst(before, trained) > 0

    randomise_(model)
    adapted = outputs(model, frames)
    assert worst(trained, adapted) > 1e-6
    merged = merge(deepcopy(model), keep_gates=True)
    assert worst(adapted, outputs(merged, frames)) <= MERGE_TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", KINDS)
def test_every_adapter_gets_a_gradient_where_its_weight_does(build, frames, name):
    """A layer whose adapter gets no gradient would be adapted in name only.

    Some models of mace-torch have layers that reach no output; there both have none.
    """
    model = build(name)
    batch = frames_to_batch(frames, model)
    loss_of(model, batch).backward()
    reached = {
        site.name: site.weight.grad is not None and bool(site.weight.grad.abs().max() > 0)
        for site in find_sites(model)[0]
    }
    inject(model, AdapterConfig.create("lora", targets=("all",)))
    randomise_(model)
    loss_of(model, batch).backward()
    for layer, adapter in adapters(model):
        moves = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in adapter.parameters()]
        assert any(moves) == reached[layer], layer


@pytest.mark.parametrize("name", ["nonlinear", "dielectric", "high_order"])
def test_symmetries_of_the_unusual_ones(build, frames, name):
    model = build(name)
    inject(model, AdapterConfig.create("lora", targets=("all",)))
    randomise_(model)
    errors = symmetry_errors(model, frames, seed=4)
    assert max(errors.values()) < 1e-9, errors
