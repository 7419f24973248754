"""A whole training step on recorded parts: batch, forward, backward, clipping, optimiser, EMA.

What mace-torch's `take_step` does, in its order, without waiting for the device: the loss comes
back as a tensor that nobody has looked at yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mace_lora.backends.base import Way
from mace_lora.backends.recording import Called, Replayed
from mace_lora.backends.resident import ResidentBatch
from mace_lora.backends.update import Update


class WholeStep:
    """Takes the steps of one run.

    Args:
        recorder: records what is not yet recorded.
    """

    def __init__(self, recorder: Replayed | Called) -> None:
        self._recorder = recorder
        self._update: Update | None = None
        self._asked: tuple[Any, Any] | None = None
        self._serves = False

    def serves(self, model: torch.nn.Module, optimizer: Any, ema: Any) -> bool:
        """Whether the optimiser is one that can be recorded; else forward and backward are."""
        if self._asked is None or self._asked[0] is not optimizer or self._asked[1] is not ema:
            self._asked = optimizer, ema
            self._serves = Update.serves(optimizer, ema, model)
        return self._serves

    def take(
        self,
        way: Way,
        model: torch.nn.Module,
        loss_fn: Callable[..., Tensor],
        batch: Any,
        optimizer: torch.optim.Optimizer,
        ema: Any,
        output_args: dict[str, bool],
        max_grad_norm: float | None,
        device: torch.device,
    ) -> tuple[Tensor, dict[str, Any]]:
        """One step; the arguments are those of mace-torch's `take_step`, and the way.

        Returns:
            The loss, and metrics with "loss" (a tensor) and "time" (seconds to launch the step).
        """
        start = time.perf_counter()
        if self._update is None or not self._update.fits(optimizer, ema, max_grad_norm):
            self._update = Update(optimizer, ema, max_grad_norm, self._recorder)
        batch = batch.to(device)
        with way.active(model):
            recorded = way.name == "cudagraph"  # it may have given up on entering
            keep = recorded and isinstance(batch, ResidentBatch)
            output = model(
                batch.padded if keep else batch.to_dict(),
                training=True,
                compute_force=output_args["forces"],
                compute_virials=output_args["virials"],
                compute_stress=output_args["stress"],
            )
            with _SizesAreKnown(batch):
                loss = loss_fn(pred=output, ref=batch)
            gradients = torch.autograd.grad(loss, self._update.parameters, allow_unused=True)
        self._update(gradients)
        return loss, {"loss": loss.detach(), "time": time.perf_counter() - start}


class _SizesAreKnown(torch.overrides.TorchFunctionMode):
    """Losses repeat numbers of structures for their atoms; torch asks the device how many these
    are, and waits for it, unless it is told."""

    def __init__(self, batch: Any) -> None:
        super().__init__()
        self._structures, self._atoms = batch.num_graphs, batch["positions"].shape[0]

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_repeat = function is torch.repeat_interleave and len(args) == 2
        if is_repeat and isinstance(args[1], Tensor) and args[1].shape == (self._structures,):
            kwargs = {"output_size": self._atoms, **kwargs}
        return function(*args, **kwargs)
