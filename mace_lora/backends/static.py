"""What the ways with fixed shapes share: padded batches in, results of the real structures out.

A subclass records the model once per shape, as a compiled or a captured graph. Batches that no
shape holds, and calls that ask for more than energies, forces, virials and stresses, are computed
by the model itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mace_lora.backends.base import CannotServe, Way, draws, modules_of
from mace_lora.backends.fusing import Fusion, check_cpu
from mace_lora.backends.padding import KEYS, Data, Padded, Shape, pad, sizes
from mace_lora.backends.tracing import PER_ATOM, Flags, Inputs

# Modules that compute more from a batch than is in padding.KEYS
_UNKNOWN = ("joint_embedding", "lammps_mliap")


class Recorded:
    """A model at one shape.

    Attributes:
        names: of the results.
    """

    names: list[str]

    def forward(self, inputs: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The results, and what `backward` needs, from the tensors of `Inputs` and the data."""
        raise NotImplementedError

    def backward(self, kept: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients of the trained parameters."""
        raise NotImplementedError


class Static(Way):
    """A way that records a model once per shape.

    Args:
        shapes: the shapes that batches are padded to.
    """

    caches_weights: ClassVar[bool] = False

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = sorted(set(shapes))
        self._models: dict[torch.nn.Module, _Model] = {}

    def record(
        self, inputs: Inputs, data: Padded, shape: Shape, flags: Flags, training: bool
    ) -> Recorded:
        """The model at one shape.

        Raises:
            CannotServe: it can't be recorded.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def active(self, model: torch.nn.Module) -> Iterator[None]:
        known = self._models.get(model)
        if known is None or known.modules != modules_of(model):
            known = self._models[model] = _Model(self, model)
        with known.fusion.active():
            model.forward = known.forward
            try:
                yield
            finally:
                model.__dict__.pop("forward", None)


class _Model:
    """One model: its graphs, and the call that chooses among them."""

    def __init__(self, way: Static, model: torch.nn.Module) -> None:
        if not hasattr(model, "interactions") or any(getattr(model, k, None) for k in _UNKNOWN):
            raise CannotServe(
                f"a {type(model).__name__} reads more than atoms and their neighbours"
            )
        if draws(model):
            raise CannotServe("dropout draws anew in each step, which a recorded step can't")
        on_cpu = next(model.parameters()).device.type == "cpu"
        if on_cpu:
            check_cpu(model)
        self.way, self.modules = way, modules_of(model)
        with torch.random.fork_rng(devices=[]):  # see `fusing.Fused.fusion`
            self.fusion = Fusion(model, kernels=on_cpu)
        self.r_max = float(model.r_max)
        self._class_forward: Callable[..., Any] = type(model).forward.__get__(model)
        self._model = model
        self._recorded: dict[tuple[Shape, Flags, bool], tuple[Recorded, Inputs]] = {}

    def forward(
        self,
        data: Data,
        training: bool = False,
        compute_force: bool = True,
        compute_virials: bool = False,
        compute_stress: bool = False,
        **more: Any,
    ) -> dict[str, Tensor | None]:
        """Takes the place of the model's own forward."""
        shape = self._shape_of(data)
        flags = (compute_force, compute_virials, compute_stress)
        if shape is None or any(more.values()):
            plain = data.unpadded() if isinstance(data, Padded) else data
            return self._class_forward(
                plain, training, compute_force, compute_virials, compute_stress, **more
            )
        padded = data if isinstance(data, Padded) else pad(data, shape, self.r_max)
        try:
            recorded, inputs = self._record(padded, flags, training)
        except CannotServe as reason:
            logging.warning(
                f"--step={self.way.name} can't serve this run, which goes on in "
                f"{self.fusion.name}: {reason}"
            )
            self.way.shapes = []
            return self.forward(data, training, *flags)
        given = [*(t.detach() for t in inputs.fixed.values()), *(padded[k] for k in KEYS)]
        values = _Run.apply(recorded, given, *inputs.trained.values())
        _, n_atoms, n_structures = padded.real
        return {
            name: value[: n_atoms if name in PER_ATOM else n_structures]
            for name, value in zip(recorded.names, values, strict=True)
        }

    def _shape_of(self, data: Data) -> Shape | None:
        if isinstance(data, Padded):
            return data.shape if data.shape in self.way.shapes else None
        real = sizes(data)
        return next((s for s in self.way.shapes if s.holds(real)), None)

    def _record(self, data: Padded, flags: Flags, training: bool) -> tuple[Recorded, Inputs]:
        key = (data.shape, flags, training)
        if key not in self._recorded:
            inputs = Inputs.of(self._model, self.fusion)
            recorded = self.way.record(inputs, data, data.shape, flags, training)
            self._recorded[key] = recorded, inputs
        return self._recorded[key]


class _Run(torch.autograd.Function):
    """A recorded model as one operation of autograd."""

    @staticmethod
    def forward(ctx, recorded: Recorded, given: list[Tensor], *trained: Tensor):
        results, kept = recorded.forward([*(t.detach() for t in trained), *given])
        ctx.recorded = recorded
        ctx.save_for_backward(*kept)
        return tuple(results)

    @staticmethod
    def backward(ctx, *cotangents: Tensor):
        gradients = ctx.recorded.backward(ctx.saved_tensors, cotangents)
        return None, None, *gradients
