"""The way "fused": kernels in place of the products of a model, for the length of a block."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Hashable, Iterator
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch

from mace_lora.backends import library
from mace_lora.backends.base import CannotServe, Way, modules_of
from mace_lora.backends.layers import Forward, plain_forward
from mace_lora.backends.products import Contraction, Convolution


class Fusion:
    """Faster code for the modules of one model: kernels for its products, no TorchScript.

    It stands in place only inside `active`: the model's modules, its state and its files are those
    of mace-torch at all other times.

    Args:
        model: any MACE model, with or without adapters; what isn't known is left as it is.
        kernels: use the kernels of `kernels`, which are for the CPU; else the model's own products.
    """

    def __init__(self, model: torch.nn.Module, *, kernels: bool = True) -> None:
        self.name = "fused" if kernels else "eager"
        self.products = torch.nn.ModuleList()
        self._blocks: list[torch.nn.Module] = []
        self._forwards: list[tuple[torch.nn.Module, Forward]] = []
        if kernels:
            self._fuse_products(model)
        for module in model.modules():
            forward = plain_forward(module)
            if forward is not None:
                self._forwards.append((module, forward))

    def _fuse_products(self, model: torch.nn.Module) -> None:
        for block in getattr(model, "interactions", ()):
            product = getattr(block, "conv_tp", None)
            if not hasattr(block, "conv_fusion") and Convolution.fits(product):
                self._blocks.append(block)
                self._replace(product, Convolution(product))
        for block in getattr(model, "products", ()):
            product = getattr(block, "symmetric_contractions", None)
            if Contraction.fits(product):
                self._replace(product, Contraction(product))

    def _replace(self, module: torch.nn.Module, fused: torch.nn.Module) -> None:
        self.products.append(fused)
        self._forwards.append((module, fused.forward))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model computes with the faster code meanwhile."""
        try:
            for block in self._blocks:
                block.conv_fusion = True  # mace-torch's own switch: edge_index is an argument
            for module, forward in self._forwards:
                module.forward = forward
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("conv_fusion", None)
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)


class Fused(Way):
    """Fusion for every model that it is asked for."""

    name = "fused"
    kernels: ClassVar[bool] = True

    def __init__(self) -> None:
        self._fusions: WeakKeyDictionary[torch.nn.Module, tuple[Hashable, Fusion]] = (
            WeakKeyDictionary()
        )

    def active(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        return self.fusion(model).active()

    def fusion(self, model: torch.nn.Module) -> Fusion:
        """The fusion of `model`, made anew when its modules have changed.

        Raises:
            CannotServe: it isn't on the CPU, or there is no C++ compiler.
        """
        modules = modules_of(model)
        known = self._fusions.get(model)
        if known is None or known[0] != modules:
            if self.kernels:
                check_cpu(model)
            # Modules are built here, whose initial weights are drawn: a run that is continued
            # builds them at another place, and must draw the same numbers elsewhere
            with torch.random.fork_rng(devices=[]):
                known = self._fusions[model] = modules, Fusion(model, kernels=self.kernels)
        return known[1]


class Eager(Fused):
    """mace-torch's own products; on a CPU e3nn's linear layers without TorchScript, which makes up
    for the gradients of whole weights that adapters in weight space need."""

    name = "eager"
    kernels = False

    def active(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        on_cpu = next(model.parameters()).device.type == "cpu"
        return self.fusion(model).active() if on_cpu else contextlib.nullcontext()


def check_cpu(model: torch.nn.Module) -> None:
    """Raises CannotServe where the kernels can't run."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        raise CannotServe(f"its kernels are for the CPU, and the model is on {parameter.device}")
    if parameter.dtype not in (torch.float32, torch.float64):
        raise CannotServe(f"its kernels know float32 and float64, not {parameter.dtype}")
    start = time.perf_counter()
    try:
        library.load()
    except library.NoCompiler as error:
        raise CannotServe(str(error)) from error
    if time.perf_counter() - start > 1.0:
        logging.info("Built the CPU kernels, once for this machine")
