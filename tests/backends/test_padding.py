"""Batches of a few fixed shapes."""

from __future__ import annotations

import pytest
import torch
from helpers.frames import FRAMES
from helpers.steps import adapted

from mace_lora.backends.padding import MOST_WASTED, Shape, pad, shape_for, sizes
from mace_lora.upstream.predicting import frames_to_batch


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
def test_padding_changes_nothing(build, frames):
    model = adapted(build("density_zbl_agnesi"))
    data = frames_to_batch(frames(), model).to_dict()
    edges, n_atoms, n_frames = sizes(data)
    shape = Shape.around(edges * 6 // 5, n_atoms + 4, n_frames + 2)  # room for a fifth more
    padded = pad(data, shape, float(model.r_max))
    assert sizes(padded) == (shape.edges, shape.atoms, shape.structures)
    found, plain = (model(d, compute_stress=True) for d in (padded, dict(data)))
    for key, n in (("energy", n_frames), ("stress", n_frames), ("forces", n_atoms)):
        assert torch.allclose(found[key][:n], plain[key], rtol=1e-12, atol=1e-12), key
        assert torch.isfinite(found[key]).all()
    assert (found["forces"][n_atoms:] == 0).all()


def batch_of(edges: int, atoms: int, structures: int) -> dict[str, torch.Tensor]:
    """What tells the sizes of a batch."""
    return {
        "edge_index": torch.zeros(2, edges),
        "positions": torch.zeros(atoms, 3),
        "ptr": torch.zeros(structures + 1),
    }


def test_batches_of_about_one_size_share_a_shape():
    known: set[Shape] = set()
    for i in range(100):
        known.add(shape_for(batch_of(1500 + i % 40, 105, 5), known))
    assert len(known) == 1


def test_every_batch_has_a_shape_that_wastes_little():
    generator = torch.Generator().manual_seed(0)
    molecules = torch.tensor([[72, 9, 1], [150, 12, 1], [302, 21, 1], [130, 12, 1]])
    drawn = molecules[torch.randint(4, (300, 10), generator=generator)].sum(dim=1).tolist()
    known: set[Shape] = set()
    for edges, atoms, structures in drawn:
        shape = shape_for(batch_of(edges, atoms, structures), known)
        known.add(shape)
        assert edges <= shape.edges <= edges / (1 - MOST_WASTED)
        assert atoms < shape.atoms
        assert structures < shape.structures
    assert len(known) <= 12
