"""A run that keeps all elements of its foundation model, whatever its frames have."""

from __future__ import annotations

import json

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from helpers.frames import ethanol
from helpers.running import here

from mace_lora import disable_adapter, load_adapter, load_foundation
from mace_lora.model.description import describe
from mace_lora.testing import outputs, worst
from mace_lora.upstream.precision import default_dtype


@pytest.fixture(scope="module")
def mini():
    with default_dtype(torch.float64):
        return load_foundation("mini").double()


@pytest.fixture(scope="module")
def hydrocarbons(mini, tmp_path_factory):
    """Methane and ethane off their minima, with labels of the foundation model, and 0.3 eV more
    for each atom."""
    rng = np.random.default_rng(0)
    frames = [ase.build.molecule(name) for name in ("CH4", "C2H6") for _ in range(5)]
    for frame in frames:
        frame.positions += 0.1 * rng.normal(size=frame.positions.shape)
        found = outputs(mini, [frame])
        frame.info["REF_energy"] = float(found["energy"][0]) + 0.3 * len(frame)
        frame.arrays["REF_forces"] = found["forces"].numpy()
    path = tmp_path_factory.mktemp("hydrocarbons") / "train.xyz"
    ase.io.write(path, frames)
    return path


@pytest.mark.parametrize("method", ["lora", "full"])
def test_elements_that_the_frames_lack_are_kept(mini, hydrocarbons, tmp_path, method):
    """E0s that are given are the run's; those of the other elements stay the foundation's."""
    own = dict(
        zip(describe(mini)["atomic_numbers"], describe(mini)["atomic_energies"][0], strict=True)
    )
    given = {z: own[z] + 0.3 for z in (1, 6)}
    flags = ["--name=run", "--foundation_model=mini", f"--adapter={method}", "--lr=0.001"]
    flags += [f"--train_file={hydrocarbons}", f"--valid_file={hydrocarbons}", "--seed=1"]
    flags += ["--max_num_epochs=1", "--batch_size=5", "--foundation_filter_elements=False"]
    assert here(tmp_path, *flags, f"--E0s={given}") == ""
    folder = tmp_path / "run_adapter"
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["model"]["atomic_numbers"] == sorted(own)
    energies = dict(zip(sorted(own), written["model"]["atomic_energies"][0], strict=True))
    assert energies == pytest.approx(own | given, abs=1e-9)

    frames = ethanol("test", 2)
    loaded = load_adapter(mini, folder)
    trained, before = outputs(loaded, frames), outputs(mini, frames)
    with disable_adapter(loaded):
        start = outputs(loaded, frames)
    start["energy"] -= 8 * 0.3  # of two C and six H
    assert worst(start, before) < 1e-10
    assert worst(trained, before) > 1e-6
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    assert worst(trained, outputs(merged, frames)) < 1e-10


def test_estimated_energies(mini, hydrocarbons, tmp_path):
    """The default, `estimated`, moves the E0s of the frames' elements alone."""
    flags = ["--name=run", "--foundation_model=mini", "--lora=True", "--batch_size=5"]
    flags += [f"--train_file={hydrocarbons}", f"--valid_file={hydrocarbons}", "--seed=1"]
    flags += ["--max_num_epochs=1", "--foundation_filter_elements=False"]
    assert here(tmp_path, *flags) == ""
    found = json.loads((tmp_path / "run_adapter" / "adapter_config.json").read_text())["model"]
    shifts = np.subtract(found["atomic_energies"], describe(mini)["atomic_energies"])[0]
    expected = [0.3 if z in (1, 6) else 0.0 for z in found["atomic_numbers"]]
    assert shifts == pytest.approx(expected, abs=1e-6)
