"""A stand-in for CUDA's graphs on a CPU: functions are called again, where CUDA would replay them.

Memory is as with CUDA graphs: arguments are copied to fixed places, results and gradients are
overwritten by the next replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mace_lora.backends.cudagraph import CudaGraph

Function = Callable[..., tuple[Tensor, ...]]


@contextmanager
def captured_on_a_cpu() -> Iterator[None]:
    """The backend "cudagraph" serves CPUs meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CudaGraph, "devices", ("cpu",))
        patch.setattr(torch.cuda, "make_graphed_callables", _make_graphed)
        yield


def _make_graphed(
    function: Function, static: tuple[Tensor, ...], allow_unused_input: bool = False
) -> Function:
    """In the place of torch.cuda.make_graphed_callables."""
    results = [r.detach().clone() for r in function(*static)]
    trained = [t for t in static if t.requires_grad]
    gradients = [torch.zeros_like(t) for t in trained]

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given: Tensor) -> tuple[Tensor, ...]:
            for mine, tensor in zip(static, given, strict=True):
                if mine.data_ptr() != tensor.data_ptr():
                    assert not mine.requires_grad, "parameters are read where they are"
                    mine.copy_(tensor)
            with torch.enable_grad():
                Graphed.found = function(*static)
            for mine, found in zip(results, Graphed.found, strict=True):
                mine.copy_(found.detach())
            return tuple(r.detach() for r in results)

        @staticmethod
        def backward(ctx, *along: Tensor) -> tuple[Tensor | None, ...]:
            pairs = [(f, a) for f, a in zip(Graphed.found, along, strict=True) if f.requires_grad]
            found = torch.autograd.grad(
                [f for f, _ in pairs],
                trained,
                [a for _, a in pairs],
                allow_unused=allow_unused_input,
            )
            for mine, new in zip(gradients, found, strict=True):
                mine.copy_(torch.zeros_like(mine) if new is None else new)
            by_tensor = {id(t): g for t, g in zip(trained, gradients, strict=True)}
            return tuple(by_tensor[id(t)].detach() if id(t) in by_tensor else None for t in static)

    return Graphed.apply
