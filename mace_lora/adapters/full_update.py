"""A small weight trained in full, as a difference to the foundation model."""

from __future__ import annotations

import torch

from mace_lora.adapters.base import WeightAdapter
from mace_lora.adapters.layout import WeightLayout
from mace_lora.adapters.options import AdapterOptions


class FullUpdate(WeightAdapter[AdapterOptions]):
    """W + D with D as large as W, zero at first.

    Trained as a difference, it merges and is saved as any other adapter, and weight decay pulls it
    towards the foundation model instead of towards zero.
    """

    def __init__(self, layout: WeightLayout, options: AdapterOptions) -> None:
        super().__init__(layout, options)
        self.D = torch.nn.Parameter(torch.zeros(layout.shape))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.D.view(weight.shape)

    @torch.no_grad()
    def fit(self, update: torch.Tensor) -> None:
        self.D.copy_(update.reshape(self.D.shape))

    def notes(self) -> str:
        return "trained in full"
