"""The backend "eager": mace-torch's own operations."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from mace_lora.backends.base import Backend, PerModel

if TYPE_CHECKING:
    import torch

    from mace_lora.backends.replacing import StandIn


class Eager(Backend):
    """mace-torch's own products; on a CPU e3nn's linear layers without TorchScript, which makes up
    for the gradients of whole weights that adapters in weight space need."""

    name = "eager"
    summary = "mace-torch's own operations"

    def __init__(self) -> None:
        self._stand_ins: PerModel[list[StandIn]] = PerModel(_stand_ins)

    def active(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        if next(model.parameters()).device.type != "cpu":
            return contextlib.nullcontext()
        from mace_lora.backends.replacing import replaced

        return replaced(self._stand_ins.of(model))


def _stand_ins(model: torch.nn.Module) -> list[StandIn]:
    from mace_lora.backends.replacing import plain_layers

    return plain_layers(model)
