"""Full fine-tuning as a method, against training the weights themselves."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from helpers.frames import ethanol
from helpers.running import here

from mace_lora import AdapterConfig, extract, inject, load_foundation, merge
from mace_lora.backends.fused import Fused
from mace_lora.model.injection import adapter_parameters, adapters
from mace_lora.testing import loss_of, outputs, randomise_, worst
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


def test_targets_choose_among_all_parameters(build):
    def trained(**options) -> set[str]:
        model = build("nonlinear")
        inject(model, AdapterConfig.create("full", **options))
        return {name for name, _ in adapters(model)}

    every = trained()
    assert "interactions.0.alpha" in every
    assert "interactions.0.conv_tp_weights.net.1.bias" in every
    assert trained(targets=("readouts",)) == {n for n in every if n.startswith("readouts")}
    assert trained(exclude=("other",)) == every - trained(targets=("other",))
    assert trained(bias="all") == every


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
