"""Choosing layers, freezing, counting, and saying what was not adapted."""

import pytest
import torch

from mace_lora import AdapterConfig, inject, inject_lora, merge_lora_weights
from mace_lora.errors import ConfigError, NoLayerMatched
from mace_lora.model.injection import adapter_parameters, adapters
from mace_lora.model.layers import find_sites


def lora(**options):
    return AdapterConfig.create("lora", **options)


def test_default_adapts_what_upstream_adapts(model):
    inject(model, lora())
    kinds = {adapter.layout.kind for _, adapter in adapters(model)}
    assert kinds == {"linear", "radial"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("skip",), {"interactions.0.skip_tp", "interactions.1.skip_tp"}),
        ((r"readouts\.\d+\.linear$",), {"readouts.0.linear"}),
        (
            ("^node_embedding", r"products\.1\.linear"),
            {"node_embedding.linear", "products.1.linear"},
        ),
        (
            (r"weights_max$",),
            {
                "products.0.symmetric_contractions.contractions.0.weights_max",
                "products.0.symmetric_contractions.contractions.1.weights_max",
                "products.1.symmetric_contractions.contractions.0.weights_max",
            },
        ),
    ],
)
def test_targets(model, targets, expected):
    inject(model, lora(targets=targets))
    assert {name for name, _ in adapters(model)} == expected


def test_all_adapts_every_weight_matrix(model):
    names = {site.name for site in find_sites(model)[0]}
    report = inject(model, lora(targets=("all",)))
    assert {layer.name for layer in report.layers} == names
    assert report.skipped == []


def test_each_target_must_match(model):
    with pytest.raises(NoLayerMatched, match=r"'readout_typo' matches 0 of \d+ layers; .* like "):
        inject(model, lora(targets=("linear", "readout_typo")))
    assert not list(adapters(model))
    with pytest.raises(ConfigError, match="not a regular expression"):
        inject(model, lora(targets=("(",)))


def test_only_adapters_are_trainable(model):
    inject(model, lora(targets=("all",)))
    own = {id(p) for p in adapter_parameters(model).values()}
    assert own
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name


def test_counts_add_up(model):
    total = sum(p.numel() for p in model.parameters())
    report = inject(model, lora())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable_before == total == report.base
    assert report.trainable == trainable
    assert sum(t for t, _, _ in report.parts.values()) == total + trainable
    assert sum(n for _, _, n in report.parts.values()) == len(report.layers)
    skipped = sum(s.numel for s in report.skipped)
    assert skipped + sum(layer.numel for layer in report.layers) == total
    assert f"{total:,} before, {trainable:,} after" in str(report)


def test_reasons_are_given_for_what_is_not_adapted(build):
    reasons = {s.reason for s in inject(build("nonlinear"), lora(targets=("all",))).skipped}
    assert "a bias, no matrix" in reasons
    assert "a single number" in reasons
    assert any(r.startswith("no matrix (LayerNorm") for r in reasons)


def test_injecting_twice_is_refused(model):
    inject(model, lora())
    with pytest.raises(ConfigError, match="carries adapters already"):
        inject(model, lora())


def test_nothing_is_adapted_of_a_model_without_matrices():
    with pytest.raises(NoLayerMatched, match="no layer that can be adapted"):
        inject(torch.nn.Sequential(torch.nn.LayerNorm(3)), lora())


def test_mace_torch_names(model):
    inject_lora(model, rank=2, alpha=1.0, wrap_equivariant=True, wrap_dense=False)
    assert {a.layout.kind for _, a in adapters(model)} == {"linear"}
    merged = merge_lora_weights(model, inplace=False)
    assert not list(adapters(merged))
    assert list(adapters(model))
    merge_lora_weights(model)
    assert not list(adapters(model))
    with pytest.raises(ConfigError, match="no layer to adapt"):
        inject_lora(model, wrap_equivariant=False, wrap_dense=False)
