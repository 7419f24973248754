"""The contract of every adapter, as tests that a new method inherits.

`AdapterContract` runs under pytest with three fixtures: `model` (a fresh MACE model in float64),
`frames` (labelled `ase.Atoms`) and `config` (an `AdapterConfig`). Tolerances go by precision. The
README of `mace_lora/adapters` shows it with a new method.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import ase
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.spatial.transform import Rotation

from mace_lora.api.files import load_adapter, save_adapter
from mace_lora.config import AdapterConfig
from mace_lora.errors import NotMergeable
from mace_lora.model.injection import adapter_parameters, adapters, inject
from mace_lora.model.merging import merge
from mace_lora.upstream.predicting import (
    MERGE_TOLERANCE,
    OUTPUTS,
    frames_to_batch,
    largest_difference,
    predict,
)
from mace_lora.upstream.types import Batch

Outputs = dict[str, torch.Tensor]
Frames = list[ase.Atoms]


@torch.no_grad()
def randomise_(model: torch.nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Random factors for every adapter: at its start a zero B would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(std * noise)


def outputs(model: torch.nn.Module, frames: Frames) -> Outputs:
    """What `model` predicts for `frames`."""
    return predict(model, [frames_to_batch(frames, model)])


def worst(one: Outputs, other: Outputs) -> float:
    """The largest relative difference over all outputs."""
    return max(relative for _, relative in largest_difference(one, other).values())


def symmetry_errors(model: torch.nn.Module, frames: Frames, seed: int) -> dict[str, float]:
    """How far `model` is from symmetric under each operation, relative to the largest output.

    Rotation, inversion, translation and permutation are measured one by one, so that a failure says
    which. Geometry is transformed in float64, whatever the model's precision. Frames must not be
    periodic.
    """
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(random_state=seed).as_matrix()
    reference = outputs(model, frames)
    errors = {}
    for name, matrix in (("rotation", rotation), ("inversion", -np.eye(3))):
        moved = [_with_positions(f, f.positions @ matrix.T) for f in frames]
        turned = outputs(model, moved)
        errors[name] = worst(_rotate(reference, torch.tensor(matrix)), turned)
    shifted = [_with_positions(f, f.positions + rng.normal(size=3)) for f in frames]
    errors["translation"] = worst(reference, outputs(model, shifted))
    orders = [rng.permutation(len(f)) for f in frames]
    starts = np.cumsum([0, *(len(f) for f in frames[:-1])])
    order = np.concatenate([s + o for s, o in zip(starts, orders, strict=True)])
    expected = {k: v[order] if k == "forces" else v for k, v in reference.items()}
    permuted = outputs(model, [f[o] for f, o in zip(frames, orders, strict=True)])
    errors["permutation"] = worst(expected, permuted)
    return errors


def _with_positions(frame: ase.Atoms, positions: npt.NDArray[np.float64]) -> ase.Atoms:
    moved = deepcopy(frame)
    moved.positions = positions
    return moved


def _rotate(values: Outputs, matrix: torch.Tensor) -> Outputs:
    """Energies stay, vectors turn, matrices turn on both sides."""
    turned = {}
    for key, value in values.items():
        m = matrix.to(value)
        if key in ("forces", "dipole"):
            turned[key] = value @ m.T
        elif key in ("stress", "polarizability"):
            turned[key] = m @ value @ m.T
        else:
            turned[key] = value
    return turned


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Squared outputs, minus the labels where there are any."""
    result = model(batch.to_dict(), training=True)
    loss = torch.zeros((), dtype=batch.positions.dtype)
    for key in OUTPUTS:
        if result.get(key) is not None:
            label = getattr(batch, key, None)
            target = label if label is not None and label.shape == result[key].shape else 0.0
            loss = loss + ((result[key] - target) ** 2).mean()
    return loss


class AdapterContract:
    """What holds for every adapter method. Subclass it in a test module and give the fixtures."""

    def adapted(self, model: torch.nn.Module, config: AdapterConfig) -> torch.nn.Module:
        """`model` with random adapters."""
        inject(model, config)
        randomise_(model)
        return model

    def test_fresh_adapters_change_nothing(
        self, model: torch.nn.Module, frames: Frames, config: AdapterConfig
    ) -> None:
        before = outputs(model, frames)
        inject(model, config)
        assert worst(before, outputs(model, frames)) <= 1e-12

    def test_random_adapters_change_energies_and_forces(
        self, model: torch.nn.Module, frames: Frames, config: AdapterConfig
    ) -> None:
        before = outputs(model, frames)
        after = outputs(self.adapted(model, config), frames)
        for key, (_, relative) in largest_difference(before, after).items():
            assert relative > 1e-6, f"{key} did not change"

    def test_symmetries(
        self, model: torch.nn.Module, frames: Frames, config: AdapterConfig
    ) -> None:
        self.adapted(model, config)
        for dtype, seed in ((torch.float64, 1), (torch.float32, 2)):
            errors = symmetry_errors(model.to(dtype), frames, seed)
            assert max(errors.values()) < MERGE_TOLERANCE[dtype], errors

    def test_merged_equals_adapted(
        self, model: torch.nn.Module, frames: Frames, config: AdapterConfig
    ) -> None:
        base = deepcopy(model)
        self.adapted(model, config)
        gates = [name for name, adapter in adapters(model) if not adapter.mergeable]
        if gates:
            before = outputs(model, frames)
            with pytest.raises(NotMergeable, match="keep_gates"):
                merge(model)
            assert worst(before, outputs(model, frames)) == 0
        for dtype in (torch.float64, torch.float32):
            adapted = deepcopy(model).to(dtype)
            before = outputs(adapted, frames)
            merged = merge(adapted, keep_gates=True)
            assert worst(before, outputs(merged, frames)) <= MERGE_TOLERANCE[dtype]
        assert [name for name, _ in adapters(merged)] == gates
        if not gates:
            assert _plain(merged) == _plain(base)
            assert set(merged.state_dict()) == set(base.state_dict())
        assert all(p.requires_grad for p in merged.parameters())
        assert worst(outputs(base, frames), outputs(model, frames)) > 1e-6

    def test_copies_survive_the_merge_of_another(
        self, model: torch.nn.Module, frames: Frames, config: AdapterConfig
    ) -> None:
        self.adapted(model, config)
        copy = deepcopy(model)
        before = outputs(copy, frames)
        merge(model, keep_gates=True)
        assert worst(before, outputs(copy, frames)) <= 1e-12

    def test_saved_and_loaded(
        self, model: torch.nn.Module, frames: Frames, config: AdapterConfig, tmp_path: Path
    ) -> None:
        base = deepcopy(model)
        self.adapted(model, config)
        save_adapter(model, tmp_path / "adapter")
        loaded = load_adapter(base, tmp_path / "adapter")
        assert worst(outputs(model, frames), outputs(loaded, frames)) <= 1e-12

    def test_training_moves_adapters_alone_and_lowers_the_loss(
        self, model: torch.nn.Module, frames: Frames, config: AdapterConfig
    ) -> None:
        inject(model, config)
        own = {id(p) for p in adapter_parameters(model).values()}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        batch = frames_to_batch(frames, model)
        losses = list(train(model, batch, steps=4))
        assert losses[-1] < losses[0]
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == (id(parameter) in own), name

    def test_gradients_against_finite_differences(
        self, model: torch.nn.Module, frames: Frames, config: AdapterConfig
    ) -> None:
        self.adapted(model, config)
        batch = frames_to_batch(frames, model)
        own = adapter_parameters(model)
        gradients = torch.autograd.grad(loss_of(model, batch), list(own.values()))
        direction, slope = {}, 0.0
        generator = torch.Generator().manual_seed(3)
        for (name, parameter), gradient in zip(own.items(), gradients, strict=True):
            direction[name] = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
            slope += (gradient * direction[name]).sum().item()
        step = 1e-5
        ends = []
        for sign in (1, -1):
            moved = deepcopy(model)
            with torch.no_grad():
                for name, parameter in adapter_parameters(moved).items():
                    parameter.add_(sign * step * direction[name])
            ends.append(loss_of(moved, batch).item())
        difference = (ends[0] - ends[1]) / (2 * step)
        assert abs(difference - slope) <= 1e-5 * abs(slope)


def train(model: torch.nn.Module, batch: Batch, steps: int, lr: float = 1e-3) -> Iterator[float]:
    """Adam on what is trainable in `model`; the loss before each step."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
        optimiser.step()
        yield loss.item()


def _plain(model: torch.nn.Module) -> list[str]:
    return [type(m).__qualname__ for m in model.modules()]
