"""Contraction weights in the basis of another installation: told by the weights, kept exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import zoo
from helpers.frames import ethanol
from helpers.running import here

from mace_lora import AdapterConfig, inject, load_foundation, merge
from mace_lora.testing import outputs, randomise_, train, worst
from mace_lora.upstream.precision import default_dtype
from mace_lora.upstream.predicting import frames_to_batch

# What pip leaves out on most machines is out of reach for the process that runs this
_WITHOUT = """
import sys, warnings
warnings.filterwarnings("ignore")
sys.modules["cuequivariance"] = sys.modules["cuequivariance_torch"] = None
import torch
from helpers import zoo
from helpers.frames import ethanol
from mace_lora import load_foundation
from mace_lora.testing import outputs
"""
_MAKE = """
model = zoo.build("wide")
torch.save(model, "without.model")
torch.save(outputs(model, ethanol("train", 3)), "without.pt")
"""
_PREDICT = """
for name in ("full.model", "reduced.model"):
    plain = torch.load(name, weights_only=False)
    torch.save(outputs(plain, ethanol("train", 3)), name + ".plain")
    torch.save(outputs(load_foundation(name), ethanol("train", 3)), name + ".ours")
"""


def without_cuequivariance(code: str, folder: Path) -> None:
    root = Path(zoo.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def paths(model: torch.nn.Module) -> int:
    """Of the highest order, in the first contraction."""
    return model.products[0].symmetric_contractions.contractions[0].weights_max.shape[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with `without.model`, built where cuequivariance isn't, and what it predicts."""
    made = tmp_path_factory.mktemp("without")
    without_cuequivariance(_MAKE, made)
    return made


def trained(model: torch.nn.Module) -> torch.nn.Module:
    inject(model, AdapterConfig.create("lora", targets=("all",)))
    list(train(model, frames_to_batch(ethanol("train", 3), model), steps=1))
    randomise_(model, std=0.01)
    return merge(model)


def test_built_without_cuequivariance_and_back_again(folder):
    frames = ethanol("train", 3)
    said = torch.load(folder / "without.model", weights_only=False)
    assert said.use_reduced_cg  # which it isn't
    model = load_foundation(folder / "without.model")
    reduced = zoo.build("wide")
    assert (paths(said), paths(model), paths(reduced)) == (23, 23, 8)
    assert not model.use_reduced_cg
    assert worst(torch.load(folder / "without.pt"), outputs(model, frames)) <= 1e-12

    expected = {}
    for name, base in (("full.model", model), ("reduced.model", reduced)):
        merged = trained(base)
        torch.save(merged, folder / name)
        expected[name] = outputs(merged, frames)
        assert worst(expected[name], outputs(load_foundation(folder / name), frames)) <= 1e-12
    without_cuequivariance(_PREDICT, folder)
    for name, values in expected.items():
        assert worst(values, torch.load(folder / f"{name}.plain")) <= 1e-12
        assert worst(values, torch.load(folder / f"{name}.ours")) <= 1e-10


@pytest.mark.slow
def test_a_model_built_without_cuequivariance_is_fine_tuned(folder, tmp_path, train_flags):
    model = f"--foundation_model={folder / 'without.model'}"
    more = ["--lora=True", "--default_dtype=float64", "--max_num_epochs=1", "--E0s=foundation"]
    assert here(tmp_path, *train_flags, model, *more) == ""
    assert paths(load_foundation(tmp_path / "run.model")) == 23


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("reduced", [True, False])
def test_weights_are_believed_and_attributes_are_not(frames, tmp_path, said, reduced):
    kind, arguments = zoo.ZOO["high_order"]
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        model = kind(**{**zoo._COMMON, **arguments, "use_reduced_cg": reduced})
    model.use_reduced_cg = said
    torch.save(model, tmp_path / "saved.model")
    found = load_foundation(tmp_path / "saved.model")
    assert found.use_reduced_cg == reduced
    assert paths(found) == paths(model)
    assert worst(outputs(model, frames), outputs(found, frames)) <= 1e-12


def test_a_basis_of_another_version_is_converted(build, frames, tmp_path):
    """The same products by other paths: each a mixture of those that are built here."""
    model = build("high_order")
    generator = torch.Generator().manual_seed(0)
    before = outputs(model, frames)
    for product in model.products:
        for part in product.symmetric_contractions.contractions:
            coupling = part.U_matrix_3
            n = coupling.shape[-1]
            mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
            part.U_matrix_3 = coupling @ mixing
            part.weights_max.data = torch.linalg.solve(mixing, part.weights_max.data)
    assert worst(before, outputs(model, frames)) <= 1e-10
    torch.save(model, tmp_path / "saved.model")
    found = load_foundation(tmp_path / "saved.model")
    assert worst(before, outputs(found, frames)) <= 1e-10
    built = build("high_order").products[0].symmetric_contractions.contractions[0]
    here = found.products[0].symmetric_contractions.contractions[0]
    assert torch.equal(here.U_matrix_3, built.U_matrix_3)
    torch.testing.assert_close(here.weights_max, built.weights_max, rtol=1e-9, atol=1e-9)
