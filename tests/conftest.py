"""Fixtures: frames, small models of every kind, and the command run in a process of its own."""

from __future__ import annotations

import logging
import os
from copy import deepcopy
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch

# the models are tiny: more threads only wait for each other, in processes that tests start as well
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

from helpers import zoo  # noqa: E402
from helpers.frames import DATA, ethanol  # noqa: E402


@pytest.fixture(autouse=True)
def _as_if_alone(monkeypatch):
    """What a command run inside a test changes in the process is put back: whichever tests run, in
    whatever order, each starts with the same switches, log, folder and random numbers."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)  # a fixture of a whole module may have run a command before
    log = root.level, root.handlers[:], root.filters[:]
    folder, default, environment = Path.cwd(), torch.get_default_dtype(), dict(os.environ)
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    monkeypatch.undo()  # before what follows, which would otherwise be undone by it
    root.setLevel(log[0])
    root.handlers[:], root.filters[:] = log[1:]
    os.chdir(folder)
    torch.set_default_dtype(default)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def frames() -> list[ase.Atoms]:
    """Three frames of ethanol, not periodic."""
    return ethanol("train", 3)


@pytest.fixture(scope="session")
def _built() -> dict[str, torch.nn.Module]:
    return {}


@pytest.fixture
def build(_built):
    """`build("name")`: a fresh float64 model of the zoo, built once per session."""

    def get(name: str) -> torch.nn.Module:
        if name not in _built:
            _built[name] = zoo.build(name)
        return deepcopy(_built[name])

    return get


@pytest.fixture
def model(build) -> torch.nn.Module:
    return build("residual")


@pytest.fixture
def base(build) -> torch.nn.Module:
    """A foundation model for H, C, N, O."""
    return build("foundation")


@pytest.fixture
def base_file(base, tmp_path) -> Path:
    torch.save(base, tmp_path / "base.model")
    return tmp_path / "base.model"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> dict[str, str]:
    """Ten training, five validation and five test frames of ethanol, as files."""
    folder = tmp_path_factory.mktemp("data")
    paths = {}
    for part, n in (("train", 10), ("valid", 5), ("test", 5)):
        paths[part] = str(folder / f"{part}.xyz")
        ase.io.write(paths[part], ase.io.read(DATA / f"ethanol_{part}.xyz", index=f":{n}"))
    return paths


@pytest.fixture(scope="session")
def foundation(tmp_path_factory) -> str:
    """A `.model` file of an untrained model for H, C, N, O, in float32 as foundation models are."""
    path = tmp_path_factory.mktemp("foundation") / "base.model"
    torch.save(zoo.build("foundation").to(torch.float32), path)
    return str(path)


@pytest.fixture
def train_flags(small_data) -> list[str]:
    """Flags of a run that takes seconds."""
    return [
        "--name=run",
        f"--train_file={small_data['train']}",
        f"--valid_file={small_data['valid']}",
        f"--test_file={small_data['test']}",
        "--max_num_epochs=3",
        "--batch_size=5",
        "--valid_batch_size=5",
        "--lr=0.01",
        "--forces_weight=100",
        "--energy_weight=1",
        "--error_table=PerAtomMAE",
        "--seed=1",
    ]
