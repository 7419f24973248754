"""Frames and measures of trust: which molecules are asked, what a hole is, what is broken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from helpers.faults import PairFault

from mace_lora import load_foundation
from mace_lora.trust import dynamics, frames, measures


@pytest.fixture(scope="module")
def mini() -> torch.nn.Module:
    return load_foundation("mini", dtype=torch.float64)


def test_a_hole_is_found_where_it_is(mini):
    scans = frames.dimers([1, 8])
    assert [scan.name for scan in scans] == ["H2", "HO", "O2"]
    found = measures.wall(PairFault(mini, -1e5), mini, scans)
    assert found["where"] == ["H2", "HO", "O2"]
    assert found["holes"] == 3
    steeper = measures.wall(PairFault(mini, 1e5), mini, scans)
    assert steeper["holes"] == 0
    # the same force more or less, by hand: 2e5 * (0.8 - d) on each atom along one axis of three
    inside = [0.8 - d for d in frames.DISTANCES if d < 0.8]
    by_hand = 2e5 * sum(inside) / len(frames.DISTANCES) / 3
    for error in (found["forces"], steeper["forces"]):
        assert error == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "start", "expected"),
    [
        ([0.0, 1.0, 3.0], [0.0, 1.0, 2.0], False),
        ([0.0, 1.0, 0.5], [0.0, 1.0, 2.0], True),
        ([0.0, 1.0, 0.5], [0.0, 1.0, 0.5], False),  # the start falls there, too
        ([0.0, -0.02, 2.0], [0.0, 0.02, 2.0], False),  # a minimum that moved a little
        ([0.0, 1.0, float("nan")], [0.0, 1.0, 2.0], True),
    ],
)
def test_what_a_hole_is(model, start, expected):
    assert measures.holes(np.array(model), np.array(start)) is expected


@pytest.mark.parametrize(("fall", "expected"), [(0.05, False), (0.2, True), (float("nan"), True)])
def test_a_flat_wall_is_no_hole(fall, expected):
    model, start = np.array([0.0, 1.0, 1.0 - fall]), np.array([0.0, 1.0, 1.3])
    assert measures.holes(model, start, measures.RISE) is expected


def test_broad_molecules_are_those_of_the_known_elements():
    water = frames.molecules([1, 8], 0.06)
    assert {str(m.symbols) for m in water} == {"OH2", "O2H2", "O3"}
    everything = frames.molecules([1, 6, 7, 8], 0.06)
    assert len(everything) > 50
    same = [m for m in everything if set(m.numbers) <= {1, 8}]
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(water, same, strict=True))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]], ""),
        ([[0, 0, 0], [2.5, 0, 0], [-0.24, 0.93, 0]], "a bond broke"),
        ([[0, 0, 0], [0.96, 0, 0], [0.96, 0.1, 0]], "atoms collapsed"),
        ([[0, 0, 0], [np.nan, 0, 0], [-0.24, 0.93, 0]], "not a number"),
    ],
)
def test_what_is_broken(positions, expected):
    water = Atoms("OHH", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    health = dynamics.Health(water, kelvin=300.0)
    assert health.trouble(Atoms("OHH", positions)) == expected
    if not expected:
        hot = Atoms("OHH", positions, momenta=np.ones((3, 3)))
        assert health.trouble(hot) == "too hot"
