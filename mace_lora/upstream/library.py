"""mace-torch as a library: its functions by ours, typed; all are rows of `substitutions`.

Those that are substituted during a run are looked up at each call, so that ours are found.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mace_lora.upstream import names
from mace_lora.upstream.types import Batch, ElementTable, Graph, Loader, Metrics

if TYPE_CHECKING:
    from mace.calculators import MACECalculator as MACECalculator


def run(args: argparse.Namespace) -> None:
    """mace-torch's training script."""
    names.original("run")(args)


def evaluate(**arguments: object) -> tuple[float, Metrics]:
    """Loss and errors of a data set; the arguments are those of mace-torch's function."""
    found: tuple[float, Metrics] = names.current("evaluate")(**arguments)
    return found


def elements(numbers: Iterable[int]) -> ElementTable:
    """mace-torch's table of these elements."""
    table: ElementTable = names.original("elements")(list(numbers))
    return table


def batch(graphs: Sequence[Graph]) -> Batch:
    """Several graphs as one."""
    made: Batch = names.original("batch")(graphs)
    return made


def loader(dataset: Sequence[Graph], batch_size: int) -> Loader:
    """Batches of a data set in its order."""
    made: Loader = names.original("loader")(
        dataset, batch_size=batch_size, shuffle=False, generator=torch.Generator().manual_seed(0)
    )
    return made


def reads_with_ase(path: str) -> bool:
    """Whether mace-torch reads this file by ASE, not frame by frame as HDF5 and LMDB.

    Raises:
        RuntimeError: a folder without HDF5 or LMDB files.
    """
    return bool(names.original("reads_with_ase")(path))


def architecture(model: torch.nn.Module) -> dict[str, Any]:
    """The arguments that a model of mace-torch's was made with; "error" for a class unknown to it.

    Its E0s, scale and shift may be trained: no gradients are asked for.
    """
    with torch.no_grad():
        found: dict[str, Any] = names.original("architecture")(model)
    return found


def calculator(models: Sequence[torch.nn.Module], **settings: object) -> MACECalculator:
    """mace-torch's calculator for ASE."""
    made: Callable[..., MACECalculator] = names.original("calculator")
    return made(models=list(models), **settings)
