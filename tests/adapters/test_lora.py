"""LoRA against slow twins: two real layers in a row, and mace-torch's own `--lora`."""

from copy import deepcopy

import mace.modules.lora as upstream_lora
import pytest
import torch
from safetensors.torch import load_file

from mace_lora import AdapterConfig, inject, inject_lora, save_adapter
from mace_lora.adapters.lora import Lora
from mace_lora.adapters.options import INITS, LoraOptions
from mace_lora.errors import ConfigError
from mace_lora.model.injection import adapters
from mace_lora.model.layers import find_sites
from mace_lora.testing import outputs, randomise_, worst
from mace_lora.upstream.precision import default_dtype

from e3nn import o3  # isort: skip

IRREPS = [
    ("8x0e + 8x1o", "8x0e + 8x1o"),
    ("6x0e + 4x1o + 3x2e", "5x0e + 4x1o + 2x2e"),
    ("8x0e", "1x0e"),
    ("4x0e + 4x0o + 3x1o", "2x1o + 4x0o + 4x0e"),  # output in another order
    ("4x0e + 3x1o + 2x0e", "5x0e + 2x1o + 2x1o"),  # the same irrep twice
    ("4x0e + 2x2o", "3x0e + 3x1o"),  # an output that nothing reaches
]


@pytest.mark.parametrize(("irreps_in", "irreps_out"), IRREPS)
def test_equals_a_second_path_through_two_linear_layers(irreps_in, irreps_out):
    """y = W x + (alpha / r) B(A(x)), with A and B as `o3.Linear` layers."""
    rank, alpha = 2, 3.0
    with default_dtype(torch.float64):
        layer = o3.Linear(irreps_in, irreps_out)
        base = deepcopy(layer)
        shared = {ir for _, ir in o3.Irreps(irreps_in)} & {ir for _, ir in o3.Irreps(irreps_out)}
        middle = o3.Irreps([(rank, ir) for ir in sorted(shared)])
        first, second = o3.Linear(irreps_in, middle), o3.Linear(middle, irreps_out)
    (site,), _ = find_sites(layer)
    ranks = {g.label: min(rank, g.rows, g.cols) for g in site.layout.groups}
    if min(ranks.values()) < rank:  # the twin can't have a different rank per irrep
        rank = min(ranks.values())
        with default_dtype(torch.float64):
            middle = o3.Irreps([(rank, ir) for ir in sorted(shared)])
            first, second = o3.Linear(irreps_in, middle), o3.Linear(middle, irreps_out)
    adapter = Lora(site.layout, LoraOptions(rank=rank, alpha=alpha))
    adapter.attach(site, layer)
    _copy_factors(adapter, first, second, middle)
    x = torch.randn(5, o3.Irreps(irreps_in).dim, dtype=torch.float64)
    twin = base(x) + alpha / rank * second(first(x))
    assert (layer(x) - twin).abs().max() < 1e-12
    assert (layer(x) - base(x)).abs().max() > 1e-3


def _copy_factors(adapter: Lora, first: o3.Linear, second: o3.Linear, middle: o3.Irreps) -> None:
    """The same numbers in A and B as in the two layers, whose blocks may be several per irrep."""
    with torch.no_grad():
        for group, a, b in zip(adapter.layout.groups, adapter.lora_A, adapter.lora_B, strict=True):
            index = next(i for i, (_, ir) in enumerate(middle) if str(ir) == group.label)
            rows = [w for _, i, w in first.weight_views(yield_instruction=True) if i.i_out == index]
            cols = [w for _, i, w in second.weight_views(yield_instruction=True) if i.i_in == index]
            a.copy_(torch.cat(rows, dim=0))
            b.copy_(torch.cat(cols, dim=1))


@pytest.mark.parametrize("name", ["residual", "density_zbl_agnesi", "attention"])
def test_equals_upstream_lora_with_the_same_factors(build, frames, name):
    model, theirs = build(name), build(name)
    inject_lora(model, rank=1, alpha=2.0)
    upstream_lora.inject_lora(theirs, rank=1, alpha=2.0)
    randomise_(model)
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        for layer, adapter in adapters(model):
            twin = modules[layer]
            for name_, parameters in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)):
                factor = getattr(twin, name_)
                weight = factor if isinstance(factor, torch.nn.Parameter) else factor.weight
                weight.copy_(torch.cat([p.reshape(-1) for p in parameters]).view(weight.shape))
    assert worst(outputs(model, frames), outputs(theirs, frames)) < 1e-12


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_factors_are_the_parameters_with_lora_in_their_names(build, tmp_path, method):
    """As in mace-torch and PEFT, in the model and in the file."""
    model = build("residual")
    inject(model, AdapterConfig.create(method, targets=("all",)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert "readouts.0.linear.parametrizations.weight.0.lora_A.0" in trained
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = {name for name in stored if not name.startswith("basis.")}
    assert {"readouts.0.linear.lora_A.0", "readouts.0.linear.lora_B.0"} <= names
    assert len(names) == len(trained)


def test_update_is_alpha_over_rank_times_the_product(build):
    model = build("residual")
    inject(model, AdapterConfig.create("lora", rank=2, alpha=6.0, targets=("radial",)))
    randomise_(model)
    for name, adapter in adapters(model):
        layer = model.get_submodule(name)
        update = layer.weight - layer.parametrizations.weight.original
        assert torch.allclose(update, 3.0 * adapter.lora_A[0] @ adapter.lora_B[0])


def test_rank_is_capped_per_irrep_and_said(build):
    model = build("residual")
    report = inject(model, AdapterConfig.create("lora", rank=16))
    capped = "\n".join(report.capped())
    assert "readouts.0.linear: 0e: 4 -> 1 uses rank 1" in capped
    assert "interactions.0.linear_up: 0e: 4 -> 4 uses rank 4" in capped
    for _, adapter in adapters(model):
        for group, a, b in zip(adapter.layout.groups, adapter.lora_A, adapter.lora_B, strict=True):
            assert a.shape == (group.rows, min(16, group.rows, group.cols))
            assert b.shape == (min(16, group.rows, group.cols), group.cols)


@pytest.mark.parametrize("init", sorted(INITS))
def test_initialisation(init):
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        linear = o3.Linear("400x0e", "400x0e")
        dense = torch.nn.Linear(400, 400)
    stds = []
    for layer in (linear, dense):
        site = find_sites(layer)[0][0]
        adapter = Lora(site.layout, LoraOptions(rank=50, init=init))
        assert torch.count_nonzero(adapter.lora_B[0]) == 0
        stds.append(adapter.lora_A[0].std().item())
    expected = {
        "normal": (1.0, 400**-0.5),
        "small": (1e-3, 1e-3),
        "upstream": (1.0, 1e-3),
        "kaiming": ((3 * 400) ** -0.5, (3 * 400) ** -0.5),
        "orthogonal": (1.0, 400**-0.5),
    }[init]
    assert stds == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": 2.5},
        {"rank": True},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"alpha": "1"},
        {"init": "zeros"},
        {"targets": ()},
        {"colour": "blue"},
    ],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(ConfigError):
        AdapterConfig.create("lora", **options)
