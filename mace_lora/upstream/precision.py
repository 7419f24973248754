"""Building models in a chosen precision, with all their constants in it.

mace-torch's `O3_e3nn.clebsch_gordan` gives coefficients in torch's default precision at that
moment, and cuequivariance keeps the contraction matrices made of them for the life of the process.
A float64 model built after a float32 one then has matrices of float32 accuracy, without a word:
forces no longer turn with the molecule to better than 1e-9, energies are off by 1e-8 eV.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mace_lora.upstream import names as upstream

_EMPTY_ANNOTATION = "The TorchScript type system doesn't support instance-level"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default precision, for as long as a model is built in it, and without the warnings.

    TorchScript gives one for each of e3nn's layers, and nobody can act on it.
    """
    exact_coefficients()
    with _default(dtype), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_EMPTY_ANNOTATION)
        yield


@functools.cache
def exact_coefficients() -> None:
    """Compute coefficients in float64 from now on, in this process, and forget those kept."""
    group, name = upstream.holder("clebsch_gordan")
    if not hasattr(group, name):  # without cuequivariance none are kept
        return
    original = getattr(group, name).__func__

    def clebsch_gordan(cls: type, *representations: object) -> object:
        with _default(torch.float64):
            return original(cls, *representations)

    setattr(group, name, classmethod(clebsch_gordan))
    _forget()


def _forget() -> None:
    """Empty the caches of cuequivariance, functions' and dictionaries."""
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "cuequivariance"]:
        for name, value in vars(module).items():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
            elif name.startswith("_cache") and isinstance(value, dict):
                value.clear()


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
