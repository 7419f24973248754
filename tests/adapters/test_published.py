"""ELoRA and MMEA against numbers of their published implementations: layers, models, counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from e3nn import nn, o3
from helpers.golden import Golden, assert_close, assert_gradients, cases, load, reference_parameters
from mace import modules
from mace.modules.symmetric_contraction import SymmetricContraction

from mace_lora import AdapterConfig, inject, merge
from mace_lora.model.injection import adapters
from mace_lora.upstream.precision import default_dtype


def adapted(layer: torch.nn.Module, config: AdapterConfig, values: dict) -> torch.nn.Module:
    """The layer with adapters and the published numbers; everything asks for gradients."""
    model = torch.nn.ModuleDict({"layer": layer})
    inject(model, config)
    load(model, {f"layer.{k}": v for k, v in values.items()})
    return model.requires_grad_(True)


def elora(golden: Golden, **options) -> AdapterConfig:
    options = {"rank": int(golden["rank"]), "alpha": float(golden["alpha"]), **options}
    return AdapterConfig.create("elora", cap=False, **options)


def mmea(golden: Golden, **options) -> AdapterConfig:
    return AdapterConfig.create(
        "mmea", rank=int(golden["rank"]), gate=golden.text("phi"), reference=True, **options
    )


def check(model: torch.nn.Module, golden: Golden, key: str, *inputs: str) -> None:
    """Output, and gradients of the sum of its squares, against those of the file."""
    values = [golden[name].clone().requires_grad_(True) for name in inputs]
    output = model["layer"](*values)
    assert_close(output, golden[key], "output")
    loss = output.square().sum()
    assert_close(loss, golden["loss_sum_output_squared"], "loss")
    loss.backward()
    published = {k: v for k, v in golden.under("grad/").items() if k not in inputs}
    assert_gradients(model, {f"layer.{k}": v for k, v in published.items()})
    for name, value in zip(inputs, values, strict=True):
        assert_close(value.grad, golden[f"grad/{name}"], f"gradient of {name}")


def linear(golden: Golden) -> torch.nn.Module:
    with default_dtype(torch.float64):
        irreps = (golden.text("irreps_in"), golden.text("irreps_out"))
        return o3.Linear(*irreps, biases=bool(golden["base_has_bias"]))


@pytest.mark.parametrize("name", cases("mmea_linear"))
def test_mmea_linear(name):
    golden = Golden(name)
    model = adapted(linear(golden), mmea(golden), golden.under("param/"))
    assert_close(
        model["layer"].ungated(golden["input"]), golden["output_without_adapter"], "base output"
    )
    check(model, golden, "output", "input")


@pytest.mark.parametrize("name", cases("elora_linear"))
def test_elora_linear(name):
    golden = Golden(name)
    model = adapted(linear(golden), elora(golden, simplify=False), golden.under("param/"))
    check(model, golden, "output_before_merge", "input")
    check_merged(model, golden, "input")


@pytest.mark.parametrize("name", cases("elora_fc_"))
def test_elora_radial_network(name):
    golden = Golden(name)
    with default_dtype(torch.float64):
        layer = nn.FullyConnectedNet(
            [int(n) for n in golden["layer_sizes"]], torch.nn.functional.silu
        )
    model = adapted(layer, elora(golden), golden.under("param/"))
    check(model, golden, "output_before_merge", "input")
    check_merged(model, golden, "input")


@pytest.mark.parametrize("name", cases("elora_fctp"))
def test_elora_tensor_product(name):
    golden = Golden(name)
    with default_dtype(torch.float64):
        irreps = [golden.text(f"irreps_{k}") for k in ("in1", "in2", "out")]
        layer = o3.FullyConnectedTensorProduct(*irreps)
    model = adapted(layer, elora(golden), golden.under("param/"))
    check(model, golden, "output_before_merge", "input", "node_attrs")
    check_merged(model, golden, "input", "node_attrs")


@pytest.mark.parametrize("name", cases("elora_contraction"))
def test_elora_symmetric_contraction(name):
    golden = Golden(name)
    with default_dtype(torch.float64):
        layer = SymmetricContraction(
            irreps_in=o3.Irreps(golden.text("irreps_in")),
            irreps_out=o3.Irreps(golden.text("irreps_out")),
            correlation=int(golden["correlation"]),
            num_elements=int(golden["num_elements"]),
            use_reduced_cg=False,
        )
    for buffer, value in golden.under("buffer/").items():
        assert_close(layer.get_buffer(buffer), value, buffer)
    model = adapted(layer, elora(golden), golden.under("param/"))
    check(model, golden, "output_before_merge", "input", "node_attrs")
    check_merged(model, golden, "input", "node_attrs")


def check_merged(model: torch.nn.Module, golden: Golden, *inputs: str) -> None:
    merge(model)
    own = dict(model.named_parameters())
    for name, value in golden.under("merged_param/").items():
        assert_close(own[f"layer.{name}"], value, f"merged {name}")
    output = model["layer"](*(golden[name] for name in inputs))
    assert_close(output, golden["output_after_merge"], "merged output")


def mace(channels: int, mlp: int) -> torch.nn.Module:
    """The architecture of the published files: ScaleShiftMACE for H, C, O."""
    classes = modules.interaction_classes
    with default_dtype(torch.float64):
        return modules.ScaleShiftMACE(
            r_max=5.0,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=3,
            interaction_cls_first=classes["RealAgnosticInteractionBlock"],
            interaction_cls=classes["RealAgnosticResidualInteractionBlock"],
            num_interactions=2,
            num_elements=3,
            hidden_irreps=o3.Irreps(f"{channels}x0e + {channels}x1o"),
            MLP_irreps=o3.Irreps(f"{mlp}x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=np.zeros((1, 3)),
            avg_num_neighbors=14.337142857142856,
            atomic_numbers=[1, 6, 8],
            correlation=3,
            radial_MLP=[64, 64, 64],
            radial_type="bessel",
            heads=["Default"],
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
            use_reduced_cg=False,
        )


def bessel_as_parameter(model: torch.nn.Module) -> torch.nn.Module:
    """As loading a foundation model leaves it."""
    basis = model.radial_embedding.bessel_fn
    values = basis.bessel_weights.detach().clone()
    del basis.bessel_weights
    basis.bessel_weights = torch.nn.Parameter(values)
    return model


def small_model(golden: Golden, config: AdapterConfig, adapted: bool = True) -> torch.nn.Module:
    """The published model; not `adapted`: its base weights under fresh adapters."""
    model = bessel_as_parameter(mace(channels=8, mlp=8))
    state = golden.under("state/")
    with torch.no_grad():
        energies = model.atomic_energies_fn.atomic_energies
        energies.copy_(state["atomic_energies_fn.atomic_energies"].reshape(energies.shape))
        for name in ("scale", "shift"):
            buffer = getattr(model.scale_shift, name)
            buffer.copy_(state[f"scale_shift.{name}"].reshape(buffer.shape))
    if not adapted:
        load(model, {k: v for k, v in state.items() if k in dict(model.named_parameters())})
    inject(model, config)
    own = reference_parameters(model)
    if adapted:
        load(model, {k: v for k, v in state.items() if k in own})
    return model


def predictions(model: torch.nn.Module, golden: Golden) -> dict[str, torch.Tensor]:
    graph = {
        "positions": golden["positions"].clone(),
        "node_attrs": golden["node_attrs_onehot"],
        "edge_index": golden["edge_index"],
        "shifts": golden["shifts"],
        "unit_shifts": golden["unit_shifts"],
        "cell": golden["cell"].reshape(-1, 3),
        "ptr": golden["graph_ptr"],
        "batch": golden["graph_index_of_atom"],
    }
    return model(graph, training=True)


def published_loss(output: dict[str, torch.Tensor], golden: Golden) -> torch.Tensor:
    energy = (golden["ref_energy"] - output["energy"]).square().mean()
    return energy + 1000 * (golden["ref_forces"] - output["forces"]).square().mean()


@pytest.mark.parametrize("name", [*cases("mmea_model"), *cases("elora_model")])
def test_model(name):
    golden = Golden(name)
    if name.startswith("mmea"):
        rank = int(golden["config_rank_mmea"])
        config = AdapterConfig.create("mmea", rank=rank, reference=True)
    else:
        config = AdapterConfig.create("elora", cap=False)
    model = small_model(golden, config)
    own = reference_parameters(model)
    for theirs, numel in zip(golden["trainable_names"], golden["trainable_numel"], strict=True):
        assert theirs in own or numel == 0, theirs
    output = predictions(model, golden)
    for key in ("interaction_energy", "node_feats", "forces"):
        assert_close(output[key], golden[key], key)
    for key in ("energy", "node_energy"):  # E0s add their rounding
        assert (output[key] - golden[key]).abs().max() < 1e-10 * golden["energy"].abs().max()
    loss = published_loss(output, golden)
    assert_close(loss, golden["loss"], "loss")
    for parameter in own.values():
        parameter.requires_grad_(True)
    published_loss(predictions(model, golden), golden).backward()
    assert_gradients(model, golden.under("grad_loss/"))
    if golden.under("grad_energy_sum/"):
        model.zero_grad()
        predictions(model, golden)["energy"].sum().backward()
        assert_gradients(model, golden.under("grad_energy_sum/"))
    merge(model, keep_gates=True)
    merged = predictions(model, golden)
    for key in ("interaction_energy", "forces"):
        assert_close(merged[key], golden[key], f"merged {key}")
    if "phi_res/forces" in golden:
        for _, gate in adapters(model):
            gate.exponential = False
        output = predictions(model, golden)
        for key in ("interaction_energy", "forces", "node_feats"):
            assert_close(output[key], golden[f"phi_res/{key}"], f"{key} with --mmea_gate=res")
        loss = published_loss(output, golden)
        assert_close(loss, golden["phi_res/loss"], "loss with --mmea_gate=res")


@pytest.mark.parametrize("name", [*cases("mmea_model"), *cases("elora_model")])
def test_model_without_adapters(name):
    """Gates that do nothing and B of zeros leave the published base model."""
    golden = Golden(name)
    config = AdapterConfig.create(name.partition("_")[0])
    model = small_model(golden, config, adapted=False)
    output = predictions(model, golden)
    assert_close(output["forces"], golden["forces_without_adapters"], "forces")
    energy = golden["energy_without_adapters"]
    assert (output["energy"] - energy).abs().max() < 1e-12 * energy.abs().max()


_COMPONENTS = {  # of the published count -> the kind of layer and the parameters that we count
    "mmea_linear_hidden": ("linear", "hidden"),
    "mmea_linear_scalar_shift": ("linear", "shift"),
    "mmea_linear_scale": ("linear", "scale"),
    "lora_linear": ("linear", ""),
    "lora_radial_fc": ("radial", ""),
    "lora_skip_tensor_product": ("skip", ""),
    "lora_symmetric_contraction_weights_max": ("contraction", "weights_max"),
    "contraction_lower_order_weights": ("contraction", "weights."),
    "bessel_frequencies": ("basis", ""),
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mmea_rank16", AdapterConfig.create("mmea", reference=True)),
        ("mmea_rank32", AdapterConfig.create("mmea", rank=32, reference=True)),
        ("elora_rank16_alpha16", AdapterConfig.create("elora", cap=False)),
    ],
)
def test_parameter_counts_of_the_medium_model(name, config):
    """Component by component; the published log says 151,354 for MMEA at rank 16."""
    golden = Golden(f"param_counts_medium_{name}")
    model = bessel_as_parameter(mace(channels=128, mlp=16))
    assert sum(p.numel() for p in model.parameters()) == int(golden["base_model_parameters"])
    report = inject(model, config)
    assert report.trainable == int(golden["trainable_parameters"])
    if name == "mmea_rank16":
        assert report.trainable == 151_354  # the published log
    assert sum(p.numel() for p in model.parameters()) - 6536 == int(golden["total_parameters"])
    found = dict.fromkeys(_COMPONENTS, 0)
    for layer, adapter in adapters(model):
        for factor, parameter in adapter.named_parameters():
            for component, (kind, part) in _COMPONENTS.items():
                if kind == adapter.layout.kind and part in f"{layer}.{factor}":
                    if component == "lora_linear" and config.method == "mmea":
                        continue
                    found[component] += parameter.numel()
    theirs = zip(golden["component_names"], golden["component_numel_trainable"], strict=True)
    published = {str(k): int(n) for k, n in theirs if int(n)}
    assert {k: n for k, n in found.items() if n} == published
