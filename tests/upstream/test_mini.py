"""The embedded foundation model."""

from __future__ import annotations

import subprocess
import sys

import ase.io
import numpy as np
import pytest
import torch
from e3nn.util import jit
from helpers.frames import DATA, ethanol
from mace.calculators import MACECalculator
from mace.modules import ScaleShiftMACE

from mace_lora import load_foundation
from mace_lora.testing import outputs, symmetry_errors, worst
from mace_lora.upstream import mini
from mace_lora.upstream.predicting import frames_to_batch, predict


@pytest.fixture(scope="module")
def model():
    return load_foundation("mini", dtype=torch.float64)


def test_it_is_small():
    assert sum((DATA / f).stat().st_size for f in (mini.WEIGHTS, mini.CARD)) < 1_000_000


def test_it_is_a_plain_mace_model(model, tmp_path, frames):
    assert type(model) is ScaleShiftMACE
    torch.save(model, tmp_path / "mini.model")
    again = torch.load(tmp_path / "mini.model", weights_only=False)
    assert worst(outputs(model, frames), outputs(again, frames)) <= 1e-12
    jit.compile(again)
    frame = frames[0]
    frame.calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    energy = outputs(model, frames[:1])["energy"].item()
    assert frame.get_potential_energy() == pytest.approx(energy, abs=1e-9)


def test_symmetries(model, frames):
    assert max(symmetry_errors(model, frames, seed=0).values()) < 1e-10


_FLOAT64_AFTER_FLOAT32 = """
import ase.io, torch
from mace.tools.cg import U_matrix_real
U_matrix_real("1x0e + 1x1o + 1x2e", "1x0e + 1x1o", 3, dtype=torch.float32)  # kept in float32
from mace_lora import load_foundation
from mace_lora.testing import symmetry_errors
load_foundation("mini", dtype=torch.float32)
model = load_foundation("mini", dtype=torch.float64)
print(max(symmetry_errors(model, [ase.io.read("{frame}")], seed=0).values()))
"""


def test_float64_is_exact_in_a_process_that_used_float32_before(frames, tmp_path):
    ase.io.write(tmp_path / "frame.xyz", frames[0])
    code = _FLOAT64_AFTER_FLOAT32.format(frame=tmp_path / "frame.xyz")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 1e-12


def test_float32_is_the_same_model(model, frames):
    single = load_foundation("mini", dtype=torch.float32)
    assert next(single.parameters()).dtype == torch.float32
    one, other = outputs(model, frames), outputs(single, frames)
    assert (one["forces"] - other["forces"].double()).abs().max() < 1e-3


def test_it_has_learnt_what_its_card_says(model):
    """Frames of molecules that were held out, against the error written down."""
    frames = ase.io.read(DATA / "mini_holdout.xyz", index=":")
    batch = frames_to_batch(frames, model)
    found = predict(model, [batch])
    force_mae = 1e3 * (found["forces"] - batch.forces).abs().mean().item()
    constant = 1e3 * batch.forces.abs().mean().item()
    assert force_mae < 0.15 * constant
    assert force_mae < 2.5 * _force_error(mini.load_card()["errors"])


def _force_error(errors: dict) -> float:
    """The test force MAE (meV/A) of the card."""
    (value,) = [v for k, v in errors["test"].items() if "force" in k]
    return value


def test_ethanol_at_dft_is_another_level_of_theory(model):
    """Forces are alike but not the same: there is something to fine-tune."""
    frames = ethanol("test", 20)
    found = outputs(model, frames)["forces"].numpy()
    labels = np.concatenate([f.arrays["REF_forces"] for f in frames])
    relative = np.abs(found - labels).mean() / np.abs(labels).mean()
    assert 0.1 < relative < 0.6
    assert np.corrcoef(found.ravel(), labels.ravel())[0, 1] > 0.9
