"""The backend "cudagraph": forward and backward captured by CUDA once per shape, and replayed.

Small molecules in small batches are bound by the launches of thousands of small kernels. A captured
graph launches them at once. The capture is torch's `make_graphed_callables`; loss, clipping and
optimiser stay outside: they are few launches, and so all of mace-torch's work.

Experimental: everything but the capture itself is tested on CPUs; it has not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mace_lora.backends.base import Backend, CannotServe, PerModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mace_lora.backends.padding import Data, Shape

# Results that losses and metrics of mace-torch read
PER_STRUCTURE = ("energy", "stress", "virials", "dipole", "polarizability")
PER_ATOM = ("forces",)
# Modules that read more of a batch than is in padding.KEYS
_READ_MORE = ("joint_embedding", "lammps_mliap")
MOST_SHAPES = 8  # each keeps memory of its own; batches of further shapes are not captured
CLOSE = 1e-3  # in eV and Å: so far may results be from the model's own

Results = dict[str, "Tensor"]
Replay = Callable[["Data"], Results]
Forward = Callable[..., "dict[str, Tensor | None]"]


class CudaGraph(Backend):
    """Calls that ask for more than energies, forces, virials and stresses are not captured.

    Results of calls with `training=False` have no gradients.
    """

    name = "cudagraph"
    summary = "the model captured once per shape of padded batches, then replayed"
    devices = ("cuda",)
    dtypes = ("float32", "float64")
    experimental = True
    needs_fixed_shapes = True
    caches_weights = False

    def __init__(self) -> None:
        self._captures: PerModel[_Captures] = PerModel(self._make)

    def check(self, model: torch.nn.Module) -> None:
        super().check(model)
        if not hasattr(model, "interactions") or any(getattr(model, k, None) for k in _READ_MORE):
            raise CannotServe("the model reads more than atoms and their neighbours")
        if any(getattr(module, "draws", False) is True for module in model.modules()):
            raise CannotServe("dropout draws anew in each step, which a captured step can't")

    @contextlib.contextmanager
    def active(self, model: torch.nn.Module) -> Iterator[None]:
        import torch

        from mace_lora.backends.replacing import replaced

        captures = self._captures.of(model)
        forward = functools.partial(captures.forward, model)
        # Gradients come in memory that the next replay overwrites
        trained = [p for p in model.parameters() if p.requires_grad]
        hooks = [p.register_hook(torch.clone) for p in trained]  # type: ignore[no-untyped-call]
        try:
            with replaced([*captures.stand_ins, (model, "forward", forward)]):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _make(self, model: torch.nn.Module) -> _Captures:
        self.check(model)
        return _Captures(model)


class _Captures:
    """The captured calls of one model, by shape and by what is asked for."""

    def __init__(self, model: torch.nn.Module) -> None:
        from mace_lora.backends.replacing import plain_layers

        self.stand_ins = plain_layers(model)  # TorchScript compiles itself in the middle of a run
        self._r_max = float(model.get_buffer("r_max"))
        self._captured: dict[Hashable, dict[Shape, Replay]] = {}  # by what is asked for and trained
        self._failed = False

    def forward(
        self,
        model: torch.nn.Module,
        data: Data,
        training: bool = False,
        compute_force: bool = True,
        compute_virials: bool = False,
        compute_stress: bool = False,
        **more: object,
    ) -> dict[str, Tensor | None]:
        """Takes the place of the model's own forward."""
        import torch

        from mace_lora.backends.padding import pad, shape_for, sizes

        flags = compute_force, compute_virials, compute_stress
        plain: Forward = functools.partial(type(model).forward, model)
        trained = tuple(p for p in model.parameters() if training and p.requires_grad)
        captured = self._captured.setdefault((flags, training, *map(id, trained)), {})
        shape = shape_for(data, captured)
        is_new = shape not in captured
        if self._failed or any(more.values()) or (is_new and len(captured) == MOST_SHAPES):
            return plain(data, training, *flags, **more)
        padded = pad(data, shape, self._r_max)
        _, atoms, structures = sizes(data)
        try:
            if is_new:
                captured[shape] = _capture(plain, trained, padded, flags, training)
            found = captured[shape](padded)
            found = {k: v[: atoms if k in PER_ATOM else structures] for k, v in found.items()}
            if is_new:
                expected = plain({**data}, training, *flags)
                for name, value in found.items():
                    torch.testing.assert_close(value, expected[name], rtol=CLOSE, atol=CLOSE)
        except Exception as error:  # whatever an unknown model raises when it is captured
            self._failed = True
            why = " ".join(str(error).split())[-300:]
            logging.warning(f"--step=cudagraph can't serve this run, which goes on in eager: {why}")
            return plain(data, training, *flags)
        return {k: v.clone() for k, v in found.items()}  # the next replay overwrites them


def _capture(
    forward: Forward, trained: Sequence[Tensor], padded: Data, flags: Sequence[bool], training: bool
) -> Replay:
    """One call of a model on batches of the shape of `padded`, as captured graphs.

    Parameters are read where they are: the optimiser changes them in place. They are arguments of
    the captured function all the same, so that torch captures their gradients.
    """
    import torch
    from torch.nn.utils import parametrize

    names: list[str] = []

    def compute(*tensors: Tensor) -> tuple[Tensor, ...]:
        batch = {k: t.detach() for k, t in zip(padded, tensors[len(trained) :], strict=True)}
        with parametrize.cached(), torch.enable_grad():
            results = forward(batch, training, *flags)
        found = {k: v for k in (*PER_STRUCTURE, *PER_ATOM) if (v := results.get(k)) is not None}
        names[:] = found
        return tuple(v if training else v.detach() for v in found.values())

    edges = padded["edge_index"].shape[1]
    logging.info(f"Capturing {'training' if training else 'evaluation'} for up to {edges} edges")
    static = (*trained, *(t.clone() for t in padded.values()))
    replay: Any = torch.cuda.make_graphed_callables(compute, static, allow_unused_input=True)
    return lambda batch: dict(zip(names, replay(*trained, *batch.values()), strict=True))
