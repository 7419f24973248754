"""Adapter directories written by earlier versions load for ever, and predict what they did.

Each was written by the command on `mini` (readouts and the last product layer, mostly of rank 1,
one epoch on ethanol); `expected.json` holds the merged model's predictions for two frames then.
"""

from __future__ import annotations

import json

import ase.io
import pytest
import torch
from helpers.frames import DATA, TESTS

from mace_lora import load_adapter
from mace_lora.testing import outputs

FOLDER = TESTS / "data" / "old_adapters"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_it_loads_and_predicts_what_it_did(name):
    frames = ase.io.read(DATA / "ethanol_test.xyz", index=":2")
    found = outputs(load_adapter("mini", FOLDER / name), frames)
    for key in ("energy", "forces"):
        expected = torch.tensor(EXPECTED[name][key], dtype=torch.float64)
        assert (found[key] - expected).abs().max() < 1e-9


def test_every_folder_is_tested():
    assert {p.name for p in FOLDER.iterdir() if p.is_dir()} == set(EXPECTED)
