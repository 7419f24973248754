"""The stress of slabs, wires and molecules: energy by strain, over the volume of their cell."""

from __future__ import annotations

import ase
import numpy as np
import pytest
import torch

from mace_lora.upstream import predicting
from mace_lora.upstream.graphs import Graphs

BOXES = {
    "crystal": (True, True, True),
    "slab": (True, True, False),
    "wire": (False, True, False),
    "molecule": (False, False, False),
}


def strained(pbc: tuple[bool, bool, bool], strain: np.ndarray) -> ase.Atoms:
    """Carbon monoxides, not periodic along z over 18 A."""
    cell = np.array([[3.4, 0.1, 0.0], [0.0, 3.6, 0.2], [0.0, 0.0, 3.5 if all(pbc) else 18.0]])
    places = [[0, 0, 0], [0.9, 0.4, 0.6], [1.8, 1.7, 0.2], [2.6, 2.0, 1.0]]
    deformed = np.eye(3) + strain
    return ase.Atoms("COCO", np.array(places) @ deformed, cell=cell @ deformed, pbc=pbc)


def energy(model: torch.nn.Module, atoms: ase.Atoms) -> float:
    batch = predicting.frames_to_batch([atoms], model)
    return float(model(batch.to_dict(), compute_force=False)["energy"])


@pytest.mark.parametrize("pbc", BOXES.values(), ids=BOXES)
def test_a_predicted_stress_is_the_derivative_of_the_energy(build, pbc):
    model, step = build("foundation"), 1e-5
    expected = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            strain = np.zeros((3, 3))
            strain[i, j] = strain[j, i] = step if i == j else step / 2
            up, down = (energy(model, strained(pbc, sign * strain)) for sign in (1, -1))
            expected[i, j] = (up - down) / (2 * step)
    atoms = strained(pbc, np.zeros((3, 3)))
    batch = predicting.frames_to_batch([atoms], model)
    found = model(batch.to_dict(), compute_stress=True)["stress"][0].detach().numpy()
    assert np.abs(found).max() > 1e-4
    np.testing.assert_allclose(found, expected / atoms.get_volume(), rtol=1e-5, atol=1e-8)


def test_a_model_with_long_range_parts_sees_the_cells_of_mace_torch(build):
    """Its energy depends on them."""
    polar = type("PolarMACE", (torch.nn.Module,), {})()
    assert Graphs.of(polar).padded
    assert not Graphs.of(build("foundation")).padded
