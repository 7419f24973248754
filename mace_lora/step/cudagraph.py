"""The way "cudagraph": forward and backward captured by CUDA once per shape, and replayed.

Small molecules in small batches are bound by the launches of thousands of small kernels. A captured
graph launches them at once. Loss, clipping and optimiser stay outside: they are few launches, and
so every loss and optimiser of mace-torch works.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from mace_lora.step.base import CannotServe
from mace_lora.step.padding import KEYS, Data, Shape
from mace_lora.step.static import Recorded, Static
from mace_lora.step.tracing import Flags, Inputs

# Runs before the capture: allocations, libraries and TorchScript settle in them
WARM_UP = 3


class Captured(Static):
    """Training and evaluation as captured CUDA graphs."""

    name = "cudagraph"

    def record(
        self, inputs: Inputs, data: Data, shape: Shape, flags: Flags, training: bool
    ) -> Recorded:
        device = data["positions"].device
        if device.type != "cuda":
            raise CannotServe(f"it captures CUDA kernels, and the model is on {device}")
        logging.info(
            f"Capturing the {'training step' if training else 'evaluation'} for up to "
            f"{shape.structures - 1} structures, {shape.edges} edges"
        )
        try:
            return Capture(inputs, data, flags, training)
        except (RuntimeError, NotImplementedError) as error:
            text = " ".join(str(error).split())[-300:]
            raise CannotServe(f"the model can't be captured: {text}") from error


class Capture(Recorded):
    """One captured shape.

    Inputs are copied into fixed memory before a replay. Parameters are read where they are: the
    optimiser changes them in place. Results are copied out, since the next replay overwrites them.
    """

    def __init__(self, inputs: Inputs, data: Data, flags: Flags, training: bool) -> None:
        self._data = {k: data[k].clone() for k in KEYS}
        self._n_before = len(inputs.trained) + len(inputs.fixed)
        self._trained = list(inputs.trained.values())
        self._inputs, self._flags, self._training = inputs, flags, training
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                found = self._run()
                if training:
                    self._differentiate(found, [torch.zeros_like(v) for v in found.values()])
        torch.cuda.current_stream().wait_stream(stream)
        pool = torch.cuda.graph_pool_handle()
        self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward_graph, pool=pool):
            found = self._run()
        self.names, self._results = list(found), [v.detach() for v in found.values()]
        if training:
            self._cotangents = [torch.zeros_like(v) for v in self._results]
            with torch.cuda.graph(self._backward_graph, pool=pool):
                self._gradients = self._differentiate(found, self._cotangents)

    def _run(self) -> dict[str, Tensor]:
        return self._inputs.whole(dict(self._data), self._training, self._flags)

    def _differentiate(self, found: dict[str, Tensor], along: Sequence[Tensor]) -> list[Tensor]:
        pairs = [(v, a) for v, a in zip(found.values(), along, strict=True) if v.requires_grad]
        gradients = torch.autograd.grad(
            [v for v, _ in pairs], self._trained, [a for _, a in pairs], allow_unused=True
        )
        return [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(gradients, self._trained, strict=True)
        ]

    def forward(self, inputs: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        for name, tensor in zip(KEYS, inputs[self._n_before :], strict=True):
            self._data[name].copy_(tensor)
        self._forward_graph.replay()
        return [v.clone() for v in self._results], []

    def backward(self, kept: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        for mine, given in zip(self._cotangents, cotangents, strict=True):
            mine.copy_(given)
        self._backward_graph.replay()
        return [g.clone() for g in self._gradients]
