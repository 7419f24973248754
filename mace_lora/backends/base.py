"""What every backend is, and says of itself as data.

A backend's file imports torch, and what it computes with, only when it is used: `--help` asks all
of them for their facts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar
from weakref import WeakKeyDictionary

from mace_lora.errors import MaceLoraError

if TYPE_CHECKING:
    import torch

Made = TypeVar("Made")


class CannotServe(MaceLoraError, RuntimeError):
    """A backend can't compute this model on this machine; the message says why."""


class Backend:
    """A way for any model, with or without adapters, to compute.

    Class facts:
        name: its value of `--step`.
        summary: what it does, in one line of `--help`.
        devices: types of torch devices that it computes on; empty: on any.
        dtypes: names of the precisions that it knows; empty: any.
        experimental: taken only when asked for by name.
        needs_fixed_shapes: batches are padded to a few sizes, and what was done for the first
            batch of a size is repeated for the others.
        caches_weights: effective weights may be kept from one call of the model to the next, as
            long as no parameter changes.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ()
    dtypes: ClassVar[tuple[str, ...]] = ()
    experimental: ClassVar[bool] = False
    needs_fixed_shapes: ClassVar[bool] = False
    caches_weights: ClassVar[bool] = True

    def check(self, model: torch.nn.Module) -> None:
        """
        Raises:
            CannotServe: the model can't be computed where it is; it is untouched.
        """
        parameter = next(model.parameters())
        if self.devices and parameter.device.type not in self.devices:
            where = " or ".join(self.devices)
            raise CannotServe(f"it computes on {where}, and the model is on {parameter.device}")
        dtype = str(parameter.dtype).removeprefix("torch.")
        if self.dtypes and dtype not in self.dtypes:
            raise CannotServe(f"it knows {' and '.join(self.dtypes)}, not {dtype}")

    def active(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """The model computes with this backend for the length of a block, with the same results.

        Raises:
            CannotServe: on entering, with the model untouched.
        """
        raise NotImplementedError


class PerModel(Generic[Made]):
    """What a backend makes of a model once, and anew when the model's modules have changed.

    Args:
        make: makes it; it must not refer to the model itself, which would never be freed.
    """

    def __init__(self, make: Callable[[torch.nn.Module], Made]) -> None:
        self._make = make
        self._made: WeakKeyDictionary[torch.nn.Module, tuple[Hashable, Made]] = WeakKeyDictionary()

    def of(self, model: torch.nn.Module) -> Made:
        """What was made of `model`."""
        import torch

        modules = _modules_of(model)
        known = self._made.get(model)
        if known is None or known[0] != modules:
            # Modules are built here, whose initial weights are drawn: a run that is continued
            # builds them at another place, and must draw the same numbers elsewhere
            with torch.random.fork_rng(devices=[]):
                known = self._made[model] = modules, self._make(model)
        return known[1]


def _modules_of(model: torch.nn.Module) -> Hashable:
    """Changes when adapters are injected into `model` or merged, or when it is cast or moved.

    And when its coupling coefficients change, of which kernels are made; E0s are read at each step.
    """
    parameter = next(model.parameters())
    modules = list(model.modules())
    # not by named_buffers: this is asked at every step
    buffers = (item for module in modules for item in module._buffers.items())
    couplings = [(id(b), b._version) for n, b in buffers if b is not None and "U_matrix" in n]
    return parameter.dtype, parameter.device, *map(id, modules), *couplings
