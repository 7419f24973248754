"""Run a model with the fused products in place of its own, for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mace_lora.step.products import Contraction, Convolution


class Fusion:
    """The fused products of one model.

    They stand in place only inside `active`: the model's modules, its state and its files are those
    of mace-torch at all other times.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._convolutions: list[tuple[torch.nn.Module, Convolution]] = []
        self._contractions: list[tuple[torch.nn.Module, Contraction]] = []
        device = next(model.parameters()).device
        for block in getattr(model, "interactions", ()):
            product = getattr(block, "conv_tp", None)
            if not hasattr(block, "conv_fusion") and Convolution.fits(product):
                self._convolutions.append((block, Convolution(product).to(device)))
        for block in getattr(model, "products", ()):
            product = getattr(block, "symmetric_contractions", None)
            if Contraction.fits(product):
                self._contractions.append((product, Contraction(product).to(device)))

    def __len__(self) -> int:
        return len(self._convolutions) + len(self._contractions)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model computes with the fused products meanwhile."""
        try:
            for block, fused in self._convolutions:
                block.conv_fusion = True
                block.conv_tp.forward = fused.forward
            for product, fused in self._contractions:
                product.forward = fused.forward
            yield
        finally:
            for block, _ in self._convolutions:
                block.__dict__.pop("conv_fusion", None)
                block.conv_tp.__dict__.pop("forward", None)
            for product, _ in self._contractions:
                product.__dict__.pop("forward", None)
