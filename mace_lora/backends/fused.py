"""The backend "fused": C++ kernels for the two products of MACE, no TorchScript."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING

from mace_lora.backends import library
from mace_lora.backends.base import Backend, CannotServe, PerModel

if TYPE_CHECKING:
    import torch

    from mace_lora.backends.replacing import StandIn


class Fused(Backend):
    """Every MACE model, with or without adapters; products that aren't known stay as they are."""

    name = "fused"
    summary = "compiled kernels for the products of MACE and their derivatives"
    devices = ("cpu",)
    dtypes = ("float32", "float64")

    def __init__(self) -> None:
        self._stand_ins: PerModel[list[StandIn]] = PerModel(self._make)

    def check(self, model: torch.nn.Module) -> None:
        super().check(model)
        start = time.perf_counter()
        try:
            library.load()
        except library.NoCompiler as error:
            raise CannotServe(str(error)) from error
        if time.perf_counter() - start > 1.0:
            logging.info("Built the CPU kernels, once for this machine")

    def active(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        from mace_lora.backends.replacing import replaced

        return replaced(self._stand_ins.of(model))

    def _make(self, model: torch.nn.Module) -> list[StandIn]:
        self.check(model)
        from mace_lora.backends.replacing import plain_layers

        return [*plain_layers(model), *_products(model)]


def _products(model: torch.nn.Module) -> list[StandIn]:
    from mace_lora.backends.products import Contraction, Convolution
    from mace_lora.backends.radial import RadialNetwork

    found: list[StandIn] = []
    for block in getattr(model, "interactions", ()):
        product = getattr(block, "conv_tp", None)
        if Convolution.fits(product) and not hasattr(block, "conv_fusion"):
            # mace-torch's own switch: the product takes edge_index and sums over neighbours
            found.append((block, "conv_fusion", True))
            found.append((product, "forward", Convolution(product).forward))
            radial = getattr(block, "conv_tp_weights", None)
            if RadialNetwork.fits(radial):
                found.append((radial, "forward", RadialNetwork(radial).forward))
    for block in getattr(model, "products", ()):
        product = getattr(block, "symmetric_contractions", None)
        if Contraction.fits(product):
            found.append((block.symmetric_contractions, "forward", Contraction(product).forward))
    return found
