"""Atoms on one spot: found as by trying all pairs and images, whatever the cell."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mace_lora.frames.overlaps import SAME_SPOT, first_overlap, is_alone


def frame(positions, cell=None, pbc=(False, False, False)) -> SimpleNamespace:
    return SimpleNamespace(positions=np.array(positions, dtype=float), cell=cell, pbc=pbc)


def slowly(one: SimpleNamespace) -> set[tuple[int, int]]:
    """All pairs, all images up to the third."""
    found = set()
    ranges = [range(-3, 4) if p else (0,) for p in one.pbc]
    for shift in itertools.product(*ranges):
        moved = one.positions + np.array(shift) @ (
            np.zeros((3, 3)) if one.cell is None else one.cell
        )
        for i, j in itertools.combinations(range(len(moved)), 2):
            if np.linalg.norm(one.positions[i] - moved[j]) < SAME_SPOT:
                found.add((i, j))
    return found


@st.composite
def frames(draw) -> SimpleNamespace:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cell = np.diag([3.0, 4.0, 5.0]) + rng.uniform(-1, 1, (3, 3))
    pbc = tuple(draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    positions = rng.uniform(0, 1, (draw(st.integers(1, 6)), 3)) @ cell
    if len(positions) > 1 and draw(st.booleans()):  # one on the spot of another, or of its image
        shift = np.where(pbc, rng.integers(-1, 2, 3), 0) @ cell
        step = rng.normal(size=3)
        step *= draw(st.sampled_from([0.0, 0.05, 0.15])) / np.linalg.norm(step)
        positions[-1] = positions[0] + shift + step
    return frame(positions, cell, pbc)


@settings(max_examples=150, deadline=None)
@given(st.lists(frames(), min_size=1, max_size=4))
def test_it_finds_what_all_pairs_and_images_give(several):
    expected = [(n, *pair) for n, one in enumerate(several) for pair in sorted(slowly(one))]
    assert first_overlap(several) == (expected[0] if expected else None)


def test_a_large_box_costs_nothing():
    """Some search (L / 0.1 A)^3 cells: 10^12 here."""
    box = np.eye(3) * 1000.0
    assert first_overlap([frame([[0, 0, 0], [1, 0, 0]], box, (True,) * 3)] * 100) is None
    wrapped = frame([[0, 0, 0.02], [1000, 0, 999.99]], box, (True,) * 3)
    assert first_overlap([wrapped]) == (0, 0, 1)


def test_an_atom_that_sees_its_own_images_is_not_alone():
    skewed = np.array([[3.0, 0, 0], [30.0, 3.0, 0], [0, 0, 20.0]])
    assert is_alone(frame([[0, 0, 0]]), 5.0)
    assert is_alone(frame([[0, 0, 0]], np.eye(3) * 20, (True,) * 3), 5.0)
    assert not is_alone(frame([[0, 0, 0]], np.eye(3) * 4, (True,) * 3), 5.0)
    assert is_alone(frame([[0, 0, 0]], np.eye(3) * 4, (False,) * 3), 5.0)
    assert not is_alone(frame([[0, 0, 0]], skewed, (False, True, False)), 31.0)
    assert is_alone(frame([[0, 0, 0]], skewed, (False, True, False)), 5.0)
    assert not is_alone(frame([[0, 0, 0], [2, 0, 0]]), 5.0)
