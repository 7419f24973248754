"""Every loss of mace-torch for energies, forces, stresses and virials, with every backend."""

from __future__ import annotations

import argparse
from copy import deepcopy

import ase
import pytest
import torch
from helpers.frames import FRAMES, crystals
from helpers.graphs import captured_on_a_cpu
from helpers.steps import Plain, adapted, differs
from mace.tools.scripts_utils import get_loss_fn

from mace_lora.backends.base import Backend
from mace_lora.backends.cudagraph import CudaGraph
from mace_lora.backends.fused import Fused
from mace_lora.model.injection import adapter_parameters
from mace_lora.upstream.precision import default_dtype
from mace_lora.upstream.predicting import frames_to_batch

# The flag's choices, but for models of dipoles
LOSSES = ("ef", "weighted", "forces_only", "virials", "stress", "huber", "universal")
LOSSES += ("l1l2energyforces",)


def labelled() -> list[ase.Atoms]:
    frames = crystals()
    for frame in frames:
        frame.info["REF_virials"] = -frame.info["REF_stress"] * frame.get_volume()
    return frames


def loss_named(name: str) -> torch.nn.Module:
    weights = {f"{k}_weight": 2.0 for k in ("energy", "forces", "stress", "virials")}
    flags = argparse.Namespace(loss=name, huber_delta=0.01, **weights)
    return get_loss_fn(flags, dipole_only=False, compute_dipole=False)


def gradients(backend: Backend, model: torch.nn.Module, batch, loss_fn: torch.nn.Module):
    parameters = adapter_parameters(model)
    with backend.active(model):
        found = model(batch.to_dict(), training=True, compute_virials=True, compute_stress=True)
        loss = loss_fn(pred=found, ref=batch)
        return {"loss": loss.detach()}, dict(
            zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_gradients_of_the_plain_model(build, name, dtype):
    model = adapted(build("foundation")).to(dtype)
    batch = frames_to_batch(labelled(), model)
    with default_dtype(dtype):
        loss_fn = loss_named(name)
    expected = gradients(Plain(), model, batch, loss_fn)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    with captured_on_a_cpu():
        for backend in (Fused(), CudaGraph()):
            found = gradients(backend, model, batch, loss_fn)
            assert differs(expected[0], found[0]) < tolerance, backend.name
            assert differs(expected[1], found[1]) < tolerance, backend.name


def fifty_losses(
    backend: Backend, model: torch.nn.Module, batch, loss_fn: torch.nn.Module
) -> list[float]:
    """Of 50 steps of Adam on one batch."""
    parameters = adapter_parameters(model)
    optimiser = torch.optim.Adam(parameters.values(), lr=0.01, amsgrad=True)
    losses = []
    for _ in range(50):
        loss, found = gradients(backend, model, batch, loss_fn)
        for name, parameter in parameters.items():
            parameter.grad = found[name]
        optimiser.step()
        losses.append(loss["loss"].item())
    return losses


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
def test_fifty_steps_have_the_losses_of_the_plain_model(build, frames):
    """One molecule; molecules of several sizes; periodic cells with stress."""
    model = build("foundation")
    batch = frames_to_batch(frames(), model)
    # near the model's own, else the offset is all of the loss
    batch.energy = model(batch.to_dict(), compute_force=False)["energy"].detach() + 0.5
    loss_fn = loss_named("stress" if frames is crystals else "weighted")
    with captured_on_a_cpu():
        expected, *found = (
            fifty_losses(backend, adapted(deepcopy(model)), batch, loss_fn)
            for backend in (Plain(), Fused(), CudaGraph())
        )
    assert expected[-1] < 0.98 * expected[0]
    for losses in found:
        assert losses == pytest.approx(expected, rel=1e-8)
