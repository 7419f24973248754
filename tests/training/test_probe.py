"""The largest batch is tried before the first epoch."""

from __future__ import annotations

import re

import pytest
import torch

from mace_lora.errors import ConfigError
from mace_lora.training.epochs.probe import Memory, probe, too_large
from mace_lora.training.epochs.sizes import Limit

PER_FRAME = 30_000_000  # bytes of a frame of 10 atoms, in the trials below


class Small(Memory):
    """A machine with 1 GB left."""

    def available(self) -> float:
        return 1.0


def trial(frames: int, memory: Memory) -> list[int]:
    """A probe of batches of 5 and of `frames` frames; the sizes of the batches that ran."""
    ran = []

    def step(batch: list[int]) -> None:
        ran.append(len(batch))
        torch.ones(len(batch) * PER_FRAME, dtype=torch.uint8)

    batches = [list(range(5)), list(range(5, 5 + frames))]
    sizes = [10] * (5 + frames)
    probe(Limit("atoms", 10 * frames), batches, sizes, step, memory)
    return ran


def test_a_batch_that_fits_is_tried_and_its_memory_told(caplog):
    caplog.set_level("INFO")
    assert trial(20, Small(torch.device("cpu"))) == [5, 5, 20]
    found = re.search(r"--batch_atoms=200: .* 200 atoms, fits: it takes ([0-9.]+) GB", caplog.text)
    assert found
    assert float(found[1]) == pytest.approx(0.6, rel=0.1)


def test_memory_that_a_step_before_has_left_counts_as_taken():
    """Many small tensors, whose memory stays with the process when they are freed."""

    def step() -> None:
        kept = [torch.ones(2000, dtype=torch.uint8) for _ in range(100_000)]
        assert len(kept) == 100_000

    memory = Memory(torch.device("cpu"))
    step()
    assert [memory.taken_by(step), memory.taken_by(step)] == pytest.approx([0.25, 0.25], rel=0.3)


def test_a_batch_that_does_not_is_refused_before_it_runs():
    """Two GB are asked for, one is there: what is suggested takes 0.8 of that."""
    with pytest.raises(ConfigError, match=r"needs about (1\.9|2\.[01]) GB, and 1\.0 GB") as error:
        trial(67, Small(torch.device("cpu")))
    suggested = re.search(r"give --batch_atoms=(\d+)", str(error.value))
    assert suggested
    assert PER_FRAME / 10 * int(suggested[1]) / 1e9 == pytest.approx(0.8, rel=0.15)


def test_a_frame_that_is_too_large_by_itself_is_told():
    error = too_large(Limit("edges", 9000), 9000, 30.0, 10.0, 9000)
    assert "about 2400 edges would fit, and the largest frame has 9000" in str(error)
