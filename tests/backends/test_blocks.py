"""Many edges in blocks: the same energies, forces and gradients as all at once."""

from __future__ import annotations

import pytest
import torch
from helpers import zoo
from helpers.frames import molecules

from mace_lora import AdapterConfig, inject
from mace_lora.backends import radial
from mace_lora.backends.choice import choose
from mace_lora.model.injection import adapter_parameters
from mace_lora.testing import randomise_
from mace_lora.upstream import predicting


def computed(model, batch) -> dict[str, torch.Tensor]:
    """Energy, forces, stress, and the gradients of a loss on all of them."""
    for parameter in adapter_parameters(model).values():
        parameter.grad = None
    with choose("fused", model).active(model):
        found = model(batch.to_dict(), training=True, compute_force=True, compute_stress=True)
        loss = found["energy"].square().mean() + found["forces"].pow(3).sum()
        (loss + found["stress"].square().sum()).backward()
    gradients = {name: p.grad for name, p in adapter_parameters(model).items()}
    outputs = {key: found[key].detach() for key in ("energy", "forces", "stress")}
    return outputs | {name: g for name, g in gradients.items() if g is not None}


@pytest.mark.parametrize("kind", ["foundation", "density_zbl_agnesi", "nonlinear"])
@pytest.mark.parametrize("method", ["full", "elora"])
def test_the_same_forces_and_gradients(kind, method, monkeypatch):
    model = zoo.build(kind).double()
    inject(model, AdapterConfig.create(method))
    randomise_(model, 1)
    batch = predicting.frames_to_batch(molecules(), model)
    whole = computed(model, batch)
    used, in_blocks = [], radial.in_blocks

    def noted(function, size, nodes, edges, edge_index, weights):
        used.append(-(-edge_index.shape[1] // size))
        return in_blocks(function, size, nodes, edges, edge_index, weights)

    monkeypatch.setattr(radial, "in_blocks", noted)
    monkeypatch.setattr(radial, "MANY", 0)
    monkeypatch.setattr(radial, "BLOCK", 1500)
    blocks = computed(model, batch)
    assert (kind == "nonlinear") == (not used)  # whose networks are of another kind
    assert all(n > 1 for n in used)
    assert len(whole) > 4
    assert blocks.keys() == whole.keys()
    for key, value in whole.items():
        assert (blocks[key] - value).abs().max() <= 1e-10 * value.abs().max(), key
