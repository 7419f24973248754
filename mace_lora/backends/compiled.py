"""The way "compile": forward and backward as two graphs, compiled by inductor for a few shapes.

Inductor keeps what it compiles in the cache folder. The graphs hold no weights, so every later run
of the same architecture and shape finds them there, see `stored`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mace_lora.backends import library, stored
from mace_lora.backends.base import CannotServe
from mace_lora.backends.padding import KEYS, Padded, Shape
from mace_lora.backends.static import Recorded, Static
from mace_lora.backends.tracing import Flags, Inputs, trace, zeros_for_none
from mace_lora.files import whole_file

# Seconds to compile one shape that this machine has not compiled yet: MACE-OFF23 medium, 2 cores
UNKNOWN_SECONDS = 120.0


class Compiled(Static):
    """Training and evaluation as graphs compiled by inductor."""

    name = "compile"

    def record(
        self, inputs: Inputs, data: Padded, shape: Shape, flags: Flags, training: bool
    ) -> Recorded:
        _use_our_cache()
        what = "training step" if training else "evaluation"
        logging.info(
            f"Compiling the {what} for up to {shape.structures - 1} structures, "
            f"{shape.atoms - 1} atoms, {shape.edges} edges; minutes the first time ..."
        )
        start = time.perf_counter()
        try:
            graph = Graph(inputs, data, flags, training)
        except Exception as error:  # whatever tracing or compiling an unknown model raises
            text = " ".join(str(error).split())[-300:]
            raise CannotServe(f"{type(error).__name__}: {text}") from error
        seconds = time.perf_counter() - start
        done = "Loaded" if graph.was_stored else "Compiled"
        logging.info(f"{done} the {what} in {seconds:.0f} s")
        if training:
            _remember(_key(inputs.whole.model, shape), seconds)
        return graph


def expected_seconds(model: torch.nn.Module, shapes: Iterable[Shape]) -> float:
    """What compiling the training step will cost: as long as last time, if there was one.

    Never more than what is expected of a shape that was never compiled, so that a run which was
    found worth compiling is found so again.
    """
    known = _costs()
    return sum(min(known.get(_key(model, s), UNKNOWN_SECONDS), UNKNOWN_SECONDS) for s in shapes)


def _key(model: torch.nn.Module, shape: Shape) -> str:
    tensors = [(n, tuple(p.shape), str(p.dtype)) for n, p in model.named_parameters()]
    text = repr((tensors, shape, torch.__version__))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _costs_file() -> Path:
    return library.cache_folder() / "compile_seconds.json"


def _costs() -> dict[str, float]:
    try:
        return json.loads(_costs_file().read_text())
    except (OSError, ValueError):
        return {}


def _remember(key: str, seconds: float) -> None:
    """Note the shortest time so far: later runs find what this one has compiled."""
    seconds = min(seconds, _costs().get(key, seconds))
    with whole_file(_costs_file()) as temporary:
        temporary.write_text(json.dumps({**_costs(), key: round(seconds, 1)}))


class Graph(Recorded):
    """One compiled shape; `forward` also gives what `backward` needs of it."""

    def __init__(self, inputs: Inputs, data: Padded, flags: Flags, training: bool) -> None:
        key = stored.key_of(inputs.whole, data.shape, flags, training, list(inputs.trained))
        self.names: list[str] = []
        with stored.alone(key):
            found = stored.load(key)
            if found is not None:
                self.names, self._graphs = found
            self.was_stored = found is not None and self._is_right(inputs, data, flags, training)
            if not self.was_stored:
                self._compile(inputs, data, flags, training)
                stored.store(key, self.names, self._graphs)

    def _compile(self, inputs: Inputs, data: Padded, flags: Flags, training: bool) -> None:
        joint, example, self.names = trace(inputs, data, flags, training=training)
        if training:
            self._graphs = list(_compile_pair(joint, example, len(self.names)))
        else:
            self._graphs = [_compile(joint, example)]

    def _is_right(self, inputs: Inputs, data: Padded, flags: Flags, training: bool) -> bool:
        """Whether it computes this model: results and gradients of one batch."""
        trained = [t.detach().requires_grad_(training) for t in inputs.trained.values()]
        fixed = [t.detach() for t in inputs.fixed.values()]
        batch = {k: data[k].detach() for k in KEYS}
        expected = inputs.call(trained, fixed, dict(batch), training, flags)
        if list(expected) != self.names:
            return False
        found, kept = self.forward([*(t.detach() for t in trained), *fixed, *batch.values()])
        pairs = list(zip(expected.values(), found, strict=True))
        if training:
            along = [torch.linspace(0.5, 1.5, v.numel()).to(v).view_as(v) for v in found]
            reached = [(v, a) for v, a in zip(pairs, along, strict=True) if v[0].requires_grad]
            right = torch.autograd.grad(
                [v[0] for v, _ in reached], trained, [a for _, a in reached], allow_unused=True
            )
            pairs += zip(zeros_for_none(right, trained), self.backward(kept, along), strict=True)
        return all(_agree(one.detach(), other) for one, other in pairs)

    def forward(self, inputs: list[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        with torch.no_grad():
            found = self._graphs[0](inputs)
        n = len(self.names)
        return found[:n], found[n:]

    def backward(self, kept: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._graphs[1]([*kept, *cotangents])


def _agree(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-8 if one.dtype == torch.float64 else 1e-3
    return bool((one - other).abs().max() <= tolerance * one.abs().max() + 1e-12)


def _compile_pair(
    joint: torch.fx.GraphModule, example: list[Tensor], n_results: int
) -> tuple[stored.Runner, stored.Runner]:
    """The joint graph of forward and backward, cut where least has to be kept in between."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    n_primals = len(example) - n_results
    for i, node in enumerate(joint.graph.find_nodes(op="placeholder")):
        # the partitioner knows inputs and cotangents by these names
        kind, number = ("primals", i) if i < n_primals else ("tangents", i - n_primals)
        node.name = node.target = f"{kind}_{number + 1}"
    joint.recompile()
    first, second = min_cut_rematerialization_partition(joint, example, num_fwd_outputs=n_results)
    forward = _compile(first, example[:n_primals])
    with torch.no_grad():
        kept = forward(list(example[:n_primals]))[n_results:]
    return forward, _compile(second, [*kept, *example[n_primals:]], backward=True)


def _compile(
    graph: torch.fx.GraphModule, example: list[Tensor], backward: bool = False
) -> stored.Runner:
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # without the shape environment of a trace, inductor leaves its cache aside
    mode = graph.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode
    mode.shape_env = mode.shape_env or ShapeEnv()
    fakes = [mode.from_tensor(t, static_shapes=True) for t in example]
    with torch.no_grad(), tracing(TracingContext(mode)):
        return compile_fx_inner(graph, fakes, is_backward=backward)


def _use_our_cache() -> None:
    """Inductor's own is a temporary folder, and it names it in the environment when imported."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, os.path.abspath(default_cache_dir())):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(library.cache_folder() / "inductor")
