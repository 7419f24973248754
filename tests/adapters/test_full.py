"""Full fine-tuning as a method, against training the weights themselves."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers.frames import ethanol
from helpers.running import here

from mace_lora import AdapterConfig, extract, inject, load_adapter, load_foundation, merge
from mace_lora.backends.fused import Fused
from mace_lora.errors import NoLayerMatched
from mace_lora.model.injection import adapter_parameters, adapters
from mace_lora.testing import loss_of, outputs, randomise_, worst
from mace_lora.training.arguments import parse
from mace_lora.upstream.predicting import frames_to_batch


@pytest.mark.parametrize("name", ["nonlinear", "high_order", "charge_and_spin"])
def test_fused_gradients_are_those_of_all_parameters_of_the_plain_model(build, name):
    plain, model = build(name), build(name)
    inject(model, AdapterConfig.create("full"))
    batch = frames_to_batch(ethanol("train", 2), plain)
    wanted = {n: p for n, p in plain.named_parameters() if p.numel()}
    expected = torch.autograd.grad(loss_of(plain, batch), list(wanted.values()), allow_unused=True)
    own = adapter_parameters(model)
    with Fused().active(model):
        found = torch.autograd.grad(loss_of(model, batch), list(own.values()), allow_unused=True)
    by_name = dict(zip(own, found, strict=True))
    assert len(by_name) == len(wanted)
    for parameter, gradient in zip(wanted, expected, strict=True):
        ours = by_name[parameter.removesuffix(".weight") + ".D"]
        assert (ours is None) == (gradient is None), parameter
        if gradient is not None:
            error = (ours.flatten() - gradient.flatten()).abs().max()
            assert error <= 1e-10 * gradient.abs().max().clamp_min(1e-2), parameter


@pytest.fixture
def trained(build):
    """`trained(**options)`: the parameters of a model that full fine-tuning with these trains."""

    def names(**options) -> set[str]:
        model = build("nonlinear")
        inject(model, AdapterConfig.create("full", **options))
        return {name for name, _ in adapters(model)}

    return names


def test_targets_choose_among_all_parameters(trained):
    every = trained()
    assert "interactions.0.alpha" in every
    assert "interactions.0.conv_tp_weights.net.1.bias" in every
    assert trained(targets=("readouts",)) == {n for n in every if n.startswith("readouts")}
    assert trained(exclude=("other",)) == every - trained(targets=("other",))
    assert trained(bias="all") == every


def test_parts_are_frozen_by_name(trained):
    every = trained()
    parts = ("interactions.1", "products")
    left = {name for name in every if not name.startswith(parts)}
    assert 0 < len(left) < len(every)
    assert trained(freeze=parts) == trained(freeze=parts, bias="all") == left
    assert trained(freeze=("readouts",), targets=("readouts.0", "products")) == {
        name for name in every if name.startswith("products")
    }
    with pytest.raises(
        NoLayerMatched, match=r"freeze=interaction.0: .* known: interactions, inter"
    ):
        trained(freeze=("interaction.0",))
    with pytest.raises(NoLayerMatched, match=r"Did you mean 'interactions\.0'"):
        trained(freeze=("interaction.0",))
    with pytest.raises(
        NoLayerMatched, match=r"in the parts interactions.* Did you mean 'readouts'"
    ):
        trained(targets=("readuots",))
    with pytest.raises(NoLayerMatched, match="leaves nothing to train"):
        trained(targets=("readouts",), freeze=("readouts",))


def test_a_low_rank_adapter_is_extracted_from_a_full_one(build, frames, tmp_path):
    """Of a full update that happens to be of rank 2, all of it."""
    base = build("high_order")
    low = deepcopy(base)
    inject(low, AdapterConfig.create("lora", rank=2, targets=("all",)))
    randomise_(low, std=0.2)
    full = extract(base, merge(low), AdapterConfig.create("full"))
    full.save(tmp_path / "full")
    tuned = merge(load_adapter(base, tmp_path / "full"))
    wanted = outputs(tuned, frames)
    assert worst(outputs(base, frames), wanted) > 1e-3
    found = extract(base, tuned, AdapterConfig.create("lora", rank=2, targets=("all",)))
    assert worst(wanted, outputs(found.model, frames)) < 1e-10
    found.save(tmp_path / "low")
    assert worst(wanted, outputs(load_adapter(base, tmp_path / "low"), frames)) < 1e-10


def test_the_published_recipe_is_a_configuration():
    config = Path(__file__).parents[2] / "configs" / "full_published.yaml"
    args, adapter, options = parse([f"--config={config}", "--train_file=a.xyz"])
    assert adapter is not None
    assert adapter.method == "full"
    assert (args.lr, args.ema, args.ema_decay, args.clip_grad) == (0.001, True, 0.999, 1.0)
    assert (args.weight_decay, args.energy_weight, args.forces_weight) == (0.0, 10.0, 10.0)
    assert (options.schedule, options.protect, options.solve_e0s) == ("constant", False, False)


def test_the_difference_of_two_models_is_extracted_exactly(build, frames):
    base = build("nonlinear")
    tuned = deepcopy(base)
    inject(tuned, AdapterConfig.create("full"))
    randomise_(tuned)
    tuned = merge(tuned)
    found = extract(base, tuned, AdapterConfig.create("full"))
    assert max(layer.error for layer in found.layers) < 1e-12
    assert worst(outputs(tuned, frames), outputs(found.model, frames)) < 1e-10


def test_a_run_ends_where_full_fine_tuning_of_mace_torch_does(tmp_path, train_flags):
    """Four steps of Adam with EMA, without weight decay: all weights of the two models.

    One batch holds all frames: the two draw other orders. No clipping: mace-torch counts gradients
    of Bessel frequencies, which it neither trains nor sets to zero between steps.
    """
    base = tmp_path / "mini.model"
    torch.save(load_foundation("mini").double(), base)
    flags = [*train_flags, f"--foundation_model={base}", "--E0s=foundation", "--batch_size=10"]
    flags += ["--max_num_epochs=4", "--weight_decay=0", "--ema", "--clip_grad=None", "--lr=0.001"]
    flags += ["--default_dtype=float64", "--multiheads_finetuning=False"]
    assert here(tmp_path / "plain", *flags) == ""
    assert here(tmp_path / "full", *flags, "--adapter=full") == ""
    plain, full = (
        dict(torch.load(tmp_path / run / "run.model", weights_only=False).named_parameters())
        for run in ("plain", "full")
    )
    assert plain.keys() == full.keys()
    for name, weight in plain.items():
        assert (weight - full[name]).abs().max() < 1e-8 if weight.numel() else True, name
    moved = json.loads((tmp_path / "full/results/run_run-1_train.txt").read_text().splitlines()[-1])
    assert moved["loss"] > 0
