"""Errors before and after a run, and what the verdict makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.frames import ethanol

from mace_lora.results.compared import Compared, as_text, table
from mace_lora.results.labelled import LabelledFrames, Values
from mace_lora.results.progress import History
from mace_lora.results.verdict import judge

FLAGS = {"max_num_epochs": 20}


@pytest.fixture
def run() -> History:
    """Energies and forces of validation frames got better."""
    made = History()
    for epoch, loss in ((None, 1.0), (0, 0.5)):
        made.add(epoch, "Default", {"rmse_e_per_atom": loss, "rmse_f": loss, "loss": loss})
    return made


@pytest.fixture
def frames() -> LabelledFrames:
    atoms = ethanol("test", 6)
    n = sum(len(a) for a in atoms)
    noise = np.random.default_rng(0)
    none = np.full((6, 3, 3), np.nan)
    labels = Values(noise.normal(size=6), noise.normal(size=(n, 3)), none)
    numbers = np.concatenate([a.numbers for a in atoms])
    return LabelledFrames("test.xyz", atoms, labels, numbers, np.array(["warm", "hot"] * 3))


def compared(frames, before: Values, after: Values, kind: str = "test") -> Compared:
    return Compared(kind, "Default", kind, frames, before, after)


def off(values: Values, energy: float, forces: float) -> Values:
    return replace(values, energy=values.energy + energy, forces=values.forces + forces)


def test_the_table_has_rmse_before_and_after(frames):
    part = compared(
        frames,
        off(frames.labels, 0.01, 0.3),
        off(frames.labels, 0.002, -0.1),
    )
    heading, rows = table([part])
    assert heading == ["RMSE", "frames", "energy, meV/atom", "forces, meV/Å"]
    assert rows == [["test", "6", "10.0 → 2.0", "300.0 → 100.0"]]
    assert "300.0 → 100.0" in as_text([part])


def test_parts_are_configuration_types_and_elements(frames):
    hot = np.repeat(frames.groups == "hot", [len(a) for a in frames.atoms])
    after = replace(frames.labels, forces=frames.labels.forces + 0.05 * hot[:, None])
    found = {a.name: a.rmse["forces"] for _, a in compared(frames, after, after).rows}
    assert found["hot"] == pytest.approx(50)
    assert found["warm"] == 0
    assert {"H", "C", "O"} <= set(found)


def test_an_offset_of_energies_is_told(run, frames):
    good = off(frames.labels, 0.0, 0.1)
    for name in ("test", "validation"):
        part = Compared(
            name, "Default", name, frames, off(frames.labels, 0.1, 0.3), off(good, -0.02, 0)
        )
        told = judge(run, {}, {"Default": 50}, FLAGS, [part]).told
        assert f"energies of {name} are off by a constant, -20.0 of 20.0 meV/atom" in told[0]
    assert not judge(run, {}, {"Default": 50}, FLAGS, [replace(part, after=good)]).told


def test_a_test_set_that_got_worse_is_bad_news(run, frames):
    part = compared(frames, off(frames.labels, 0, 0.1), off(frames.labels, 0, 0.4))
    bad = judge(run, {}, {"Default": 50}, FLAGS, [part]).bad
    assert bad == ("forces of test got worse, 100.0 → 400.0 meV/Å",)
