"""e3nn's layers in plain torch, where models of the other tests don't reach."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3

from mace_lora.backends.plain_layers import plain_forward


def derivatives(function, module, x, y) -> list[torch.Tensor]:
    """Values, gradients by features and weights, and second derivatives."""
    torch.manual_seed(1)
    out = function(x, y)
    g, a = torch.randn_like(out).requires_grad_(), torch.randn_like(x)
    first = torch.autograd.grad(out, (x, module.weight), g, create_graph=True)
    return [out, *first, *torch.autograd.grad((first[0] * a).sum(), (module.weight, g))]


@pytest.mark.parametrize("kind", ["elements", "mixtures"])
def test_a_skip_connection_of_many_elements(kind):
    """Of 89, as in foundation models of materials: only those that occur are computed."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    module = o3.FullyConnectedTensorProduct("4x0e + 3x1o", "89x0e", "5x0e + 2x1o")
    x = torch.randn(7, 13, requires_grad=True)
    y = torch.nn.functional.one_hot(torch.tensor([5, 88, 5, 0, 7, 7, 5]), 89).double()
    if kind == "mixtures":
        y = y + 0.5 * y.flip(0)
    forward = plain_forward(module)
    assert forward is not None
    expected = derivatives(module, module, x, y)
    for found, wanted in zip(derivatives(forward, module, x, y), expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_a_skip_connection_of_no_atoms():
    module = o3.FullyConnectedTensorProduct("4x0e", "89x0e", "5x0e")
    forward = plain_forward(module)
    assert forward is not None
    assert forward(torch.zeros(0, 4), torch.zeros(0, 89)).shape == (0, 5)
