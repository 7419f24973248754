"""Edges i -> j and j -> i are found, also where crystals have many between the same atoms."""

from __future__ import annotations

import ase.build
import pytest
import torch
from helpers.frames import FRAMES
from helpers.steps import Plain, adapted, differs, step

from mace_lora.backends import radial
from mace_lora.backends.fused import Fused
from mace_lora.backends.pairs import there_and_back
from mace_lora.upstream.predicting import frames_to_batch


def perfect():
    """A cell whose distances are the same in many directions, and one with a displaced atom."""
    frames = [ase.build.bulk("CO", "rocksalt", a=3.6) for _ in range(2)]
    frames[1].positions[1] += [0.1, 0.2, -0.1]
    return frames


CASES = {**FRAMES, "perfect": perfect}


@pytest.mark.parametrize("frames", CASES.values(), ids=CASES)
def test_every_edge_and_the_one_that_goes_back(model, frames, monkeypatch):
    batch = frames_to_batch(frames(), model)
    found = []

    def noted(*arguments):
        found.append(there_and_back(*arguments))
        return found[-1]

    monkeypatch.setattr(radial, "there_and_back", noted)
    step(Fused(), model, batch, training=False)
    assert len(found) == len(model.interactions)
    for pairs in found:
        first, second = pairs
        assert sorted(torch.cat(pairs).tolist()) == list(range(batch.edge_index.shape[1]))
        assert torch.equal(batch.edge_index[:, first], batch.edge_index[:, second].flip(0))
        assert torch.equal(batch.unit_shifts[first], -batch.unit_shifts[second])


@pytest.mark.parametrize("kind", ["foundation", "residual", "density_zbl_agnesi", "attention"])
def test_forces_of_perfect_crystals(build, kind):
    """Where edges are as long as others that are not the same ones."""
    model = adapted(build(kind))
    batch = frames_to_batch(perfect(), model)
    expected, found = (step(b, model, batch, True) for b in (Plain(), Fused()))
    assert differs(expected[0], found[0]) < 1e-10
    assert differs(expected[1], found[1]) < 1e-10


def test_edges_of_one_direction(model, frames):
    """A neighbour list that isn't whole, as of a domain decomposition."""
    batch = frames_to_batch(frames, model)
    for name in ("edge_index", "shifts", "unit_shifts"):
        half = batch[name]
        batch[name] = half[:, 1:] if name == "edge_index" else half[1:]
    model = adapted(model)
    expected, found = (step(b, model, batch) for b in (Plain(), Fused()))
    assert differs(expected[0], found[0]) < 1e-10
    assert differs(expected[1], found[1]) < 1e-10
