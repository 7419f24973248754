"""The kernels against what defines them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from e3nn import o3
from helpers.steps import adapted
from mace.modules import WeightedEnergyForcesLoss

from mace_lora.backends import kernels
from mace_lora.backends.activations import silu
from mace_lora.backends.fused import Fused
from mace_lora.backends.kernels import conv
from mace_lora.backends.products import Convolution
from mace_lora.model.injection import adapter_parameters
from mace_lora.training.epochs.computing import Computing
from mace_lora.upstream.predicting import frames_to_batch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("halves", [1, 2], ids=["weights by edge", "by pair"])
@pytest.mark.parametrize("channels", [1, 7, 16, 37, 96])
def test_conv_is_its_definition(channels, halves, dtype):
    """For numbers of channels that fill vectors, that don't, and that leave a rest; for matrices of
    one row to eleven."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # coefficients of e3nn are made in it
    x_irreps = o3.Irreps(f"{channels}x0e + {channels}x1o + {channels}x4e")
    y_irreps = o3.Irreps("0e + 1o + 2e")
    paths = [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3), (1, 2, 4), (2, 1, 5), (2, 2, 6)]
    found = ("0e", "1o", "1o", "0e", "1o", "5o", "3e")
    out_irreps = o3.Irreps("+".join(f"{channels}x{i}" for i in found))
    product = o3.TensorProduct(
        *(x_irreps, y_irreps, out_irreps),
        [(i, j, k, "uvu", True) for i, j, k in paths],
        shared_weights=False,
        internal_weights=False,
    ).to(dtype)
    nodes, edges = 5, 24
    sizes = {
        "x": (nodes, x_irreps.dim),
        "y": (edges, y_irreps.dim),
        "w": (edges // halves, product.weight_numel),
        "g": (nodes, out_irreps.dim),
    }
    given = {n: torch.randn(s, dtype=dtype, requires_grad=True) for n, s in sizes.items()}
    senders, receivers = index = torch.randint(nodes, (2, edges))
    messages = product(given["x"][senders], given["y"], given["w"].repeat(halves, 1))
    summed = torch.zeros(sizes["g"], dtype=dtype).index_add(0, receivers, messages)
    q = (summed * given["g"]).sum()
    expected = dict(zip(given, torch.autograd.grad(q, list(given.values())), strict=True))
    made = Convolution(product)
    tables = [made.paths, made.entries, made.values, made.x_blocks, made.out_blocks]
    for by in given:
        others = [None if n == by else t.detach() for n, t in given.items()]
        found = conv(by, *others, index, edges // halves, tables, made.sizes)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert (found - expected[by]).abs().max() < tolerance * expected[by].abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_silu_and_its_derivatives_are_torchs(dtype):
    """Twice differentiated, from tensors that are not contiguous as well."""
    torch.manual_seed(0)
    x, g, a = (torch.randn(37, 5, dtype=dtype).t().requires_grad_() for _ in range(3))
    found = []
    for function in (silu, torch.nn.functional.silu):
        y = function(3 * x)
        (by_x,) = torch.autograd.grad(y, x, g, create_graph=True)
        found.append((y, by_x, *torch.autograd.grad(by_x, (x, g), a)))
    tolerance = 1e-14 if dtype == torch.float64 else 1e-5
    for mine, torchs in zip(*found, strict=True):
        assert (mine - torchs).abs().max() < tolerance * torchs.abs().max()


def test_third_derivatives_are_refused():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = silu(x).sum()
    for _ in range(2):
        (y,) = torch.autograd.grad(y, x, create_graph=True)
        y = y.sum()
    with pytest.raises(RuntimeError, match="no third derivatives"):
        y.backward()


def test_gradients_that_nobody_reads_are_not_computed(model, frames, monkeypatch):
    """Those by positions when the loss is differentiated, those by weights for forces."""
    model = adapted(model, "full")
    batch = frames_to_batch(frames, model)
    called: Counter[str] = Counter()

    def counting(name, *arguments):
        called[name] += 1
        call(name, *arguments)

    call = kernels.call
    monkeypatch.setattr(kernels, "call", counting)
    with Fused().active(model):
        model(batch.to_dict(), compute_force=True)
    layers = len(model.interactions)
    assert called["contract_weights"] == 0
    assert called["conv_by_y"] == layers
    called.clear()
    optimiser = torch.optim.SGD(list(adapter_parameters(model).values()))
    Computing("fused").take_step(
        model,
        loss_fn=WeightedEnergyForcesLoss(),
        batch=batch,
        optimizer=optimiser,
        ema=None,
        output_args={"forces": True, "virials": False, "stress": False},
        max_grad_norm=None,
        device=torch.device("cpu"),
    )
    assert called["conv_by_y"] == layers
    assert called["contract_weights"] == 2 * layers
    assert batch.positions.grad is None
