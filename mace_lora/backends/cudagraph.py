"""The way "cudagraph": forward and backward captured by CUDA once per shape, and replayed.

Small molecules in small batches are bound by the launches of thousands of small kernels. A captured
graph launches them at once. `whole` adds the rest of a step to it. The loss stays outside: it is
few launches, and so every loss of mace-torch works.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from mace_lora.backends import recording
from mace_lora.backends.base import CannotServe
from mace_lora.backends.padding import KEYS, Padded, Shape
from mace_lora.backends.recording import Called, Replayed
from mace_lora.backends.static import Recorded, Static
from mace_lora.backends.tracing import Flags, Inputs


class Captured(Static):
    """Training and evaluation as captured CUDA graphs."""

    name = "cudagraph"
    _recorder: Replayed | Called | None = None

    def recorder(self, device: torch.device) -> Replayed | Called:
        """One for all that this way records.

        Raises:
            CannotServe: nothing can be recorded on `device`.
        """
        if self._recorder is None:
            self._recorder = recording.recorder_for(device)
        return self._recorder

    def record(
        self, inputs: Inputs, data: Padded, shape: Shape, flags: Flags, training: bool
    ) -> Recorded:
        recorder = self.recorder(data["positions"].device)
        logging.info(
            f"Capturing the {'training step' if training else 'evaluation'} for up to "
            f"{shape.structures - 1} structures, {shape.edges} edges"
        )
        try:
            return Capture(inputs, data, flags, training, recorder)
        except (RuntimeError, NotImplementedError) as error:
            text = " ".join(str(error).split())[-300:]
            raise CannotServe(f"the model can't be captured: {text}") from error


class Capture(Recorded):
    """One captured shape.

    Inputs are copied into fixed memory before a replay, unless they are there already. Parameters
    are read where they are: the optimiser changes them in place. Results are copied out, since the
    next replay overwrites them.
    """

    def __init__(
        self,
        inputs: Inputs,
        data: Padded,
        flags: Flags,
        training: bool,
        recorder: Replayed | Called,
    ) -> None:
        self._data = {k: data[k] if data.stays else data[k].clone() for k in KEYS}
        self._n_before = len(inputs.trained) + len(inputs.fixed)
        self._trained = list(inputs.trained.values())
        self._inputs, self._flags, self._training = inputs, flags, training
        self._found: dict[str, Tensor] = {}
        self._cotangents: list[Tensor] = []
        recorder.warm_up(self._both)
        self._forward = recorder.record(self._run)
        self.names = list(self._found)
        if training:
            self._backward = recorder.record(self._differentiate)
        self._found = {}  # its memory is free for the next capture

    def _both(self) -> list[Tensor]:
        results = self._run()
        self._cotangents = [torch.zeros_like(r) for r in results]
        return self._differentiate() if self._training else results

    def _run(self) -> list[Tensor]:
        data = {k: v.detach() for k, v in self._data.items()}
        with torch.enable_grad():
            self._found = self._inputs.whole(data, self._training, self._flags)
        return [v.detach() for v in self._found.values()]

    def _differentiate(self) -> list[Tensor]:
        """The gradients of the trained parameters, one after the other in one tensor."""
        pairs = zip(self._found.values(), self._cotangents, strict=True)
        reached = [(v, a) for v, a in pairs if v.requires_grad]
        gradients = torch.autograd.grad(
            [v for v, _ in reached], self._trained, [a for _, a in reached], allow_unused=True
        )
        flat = [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for g, p in zip(gradients, self._trained, strict=True)
        ]
        return [torch.cat(flat)]

    def forward(self, inputs: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        for mine, given in zip(self._data.values(), inputs[self._n_before :], strict=True):
            if mine is not given:
                mine.copy_(given)
        return [v.clone() for v in self._forward()], []

    def backward(self, kept: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        for mine, given in zip(self._cotangents, cotangents, strict=True):
            mine.copy_(given)
        flat = self._backward()[0].clone()
        parts = flat.split([p.numel() for p in self._trained])
        return [g.view(p.shape) for g, p in zip(parts, self._trained, strict=True)]
