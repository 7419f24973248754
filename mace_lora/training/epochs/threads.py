"""How many threads a step is worth: a small one is computed fastest by one."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mace_lora.upstream.types import Dataset, TrainArguments

# For each thread: edges of a batch times what a radial network makes for each. Measured with one
# and two: 150,000 (`mini`, 5 frames of ethanol) are as fast with one, 430,000 (`spice2022`, 5 of
# aspirin) a third faster with two.
PER_THREAD = 200_000
_SAMPLE = 20  # frames
_GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def suiting(given: TrainArguments) -> Iterator[None]:
    """Training takes no more of torch's threads than its batches are worth, unless the environment
    says how many. The number follows from model, frames and machine alone: a run that goes on
    there computes alike.
    """
    before = torch.get_num_threads()
    told = os.environ.keys() & set(_GIVEN)
    if before > 1 and not told and torch.device(given.device).type == "cpu":
        loader = given.train_loader
        edges = _edges(loader.dataset) * len(loader.dataset) / max(1, len(loader))
        wanted = worth(given.model, edges)
        if wanted < before:
            logging.info(
                f"Training on {wanted} of {before} threads: batches of {edges:.0f} edges are worth "
                f"no more ({_GIVEN[0]}={before} takes all)"
            )
            torch.set_num_threads(int(wanted))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def worth(model: torch.nn.Module, edges: float) -> float:
    """Threads for batches of so many edges; any number where `model` has no radial networks."""
    named = (m for name, m in model.named_modules() if name.endswith("conv_tp_weights"))
    widths = [sum(network.hs) for network in named if hasattr(network, "hs")]
    return max(1, int(edges * max(widths) / PER_THREAD)) if widths else math.inf


def _edges(frames: Dataset) -> float:
    """Of a frame, the mean of some that are evenly spread."""
    chosen = range(0, len(frames), max(1, len(frames) // _SAMPLE))
    return sum(frames[i].edge_index.shape[1] for i in chosen) / len(chosen)
