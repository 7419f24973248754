"""Functions of tensors that are recorded once and run again on the same memory.

What is recorded takes no arguments: it reads tensors that stay where they are, and its results are
overwritten by the next run. `Replayed` records with CUDA graphs. `Called` does the same by calling
the function again, on any device: the way to test everything but CUDA's part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mace_lora.backends.base import CannotServe

Function = Callable[[], Sequence[Tensor]]
# Runs before a capture: allocations, libraries and TorchScript settle in them
WARM_UP = 3


class Recording:
    """A recorded function: call it to run it again.

    Attributes:
        results: always the same tensors.
    """

    def __init__(self, again: Callable[[], object], results: list[Tensor]) -> None:
        self._again = again
        self.results = results

    def __call__(self) -> list[Tensor]:
        self._again()
        return self.results


class Replayed:
    """Records with CUDA graphs, which share their memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Function) -> None:
        """Run `function` before it, or a part of it, is recorded."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, function: Function) -> Recording:
        """Record `function`, without running it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            results = [t.detach() for t in function()]
        return Recording(graph.replay, results)


class Called:
    """Runs the function itself, and copies its results to where a replay would have put them."""

    def warm_up(self, function: Function) -> None:
        function()

    def record(self, function: Function) -> Recording:
        results = [t.detach().clone() for t in function()]

        @torch.no_grad()
        def again() -> None:
            for mine, found in zip(results, function(), strict=True):
                mine.copy_(found)

        return Recording(again, results)


def recorder_for(device: torch.device) -> Replayed | Called:
    """What records functions on `device`.

    Raises:
        CannotServe: nothing can.
    """
    if device.type != "cuda":
        raise CannotServe(f"it captures CUDA kernels, and the model is on {device}")
    return Replayed()
