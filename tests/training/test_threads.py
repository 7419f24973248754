"""Small batches are trained on by few threads, and all threads come back."""

from __future__ import annotations

import pytest
import torch
from helpers.running import here, short_run

from mace_lora import load_foundation
from mace_lora.training.epochs.threads import worth


@pytest.fixture
def two_threads(monkeypatch):
    """What a machine with two cores has, where nothing in the environment says otherwise."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_few_edges_are_worth_one_thread():
    model = load_foundation("mini")
    assert worth(model, 360) == 1
    assert worth(model, 1514) == 3
    assert worth(torch.nn.Linear(2, 2), 1) > 64  # nothing is known of it


@pytest.mark.parametrize("told", [False, True])
def test_a_run_on_small_molecules(told, two_threads, small_data, tmp_path, monkeypatch):
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    flags = short_run(small_data, "mini", "--max_num_epochs=1")
    assert here(tmp_path, *flags) == ""
    log = (tmp_path / "logs" / "run_run-1.log").read_text()
    assert ("Training on 1 of 2 threads" in log) is not told
    assert torch.get_num_threads() == 2
