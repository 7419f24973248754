"""States of all generators of random numbers, as plain values of a checkpoint."""

from __future__ import annotations

import random
from typing import TypedDict

import numpy as np
import torch


class RandomStates(TypedDict):
    """Of torch, CUDA, numpy and Python."""

    torch: torch.Tensor
    cuda: list[torch.Tensor]
    numpy: tuple[str, list[int], int, int, float]
    python: tuple[int, list[int], float | None]


def now() -> RandomStates:
    """The states as they are."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": (kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)),
        "python": (version, list(internal), gauss),
    }


def restore(states: RandomStates) -> None:
    """Put the states back."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
