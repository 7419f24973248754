#!/usr/bin/env python
"""What a fused training step computes and moves, and how far each kind of work is from what the
cores can do.

    python scripts/bench_floor.py --frames rmd17/aspirin/train.xyz --threads 1

Every operation of torch, in forward, forces and gradients, is timed and counted: multiplications
and additions of products, linear layers and radial networks, and bytes read and written once. The
floor of an operation is what these take at the rates that the same cores reach in a product of
large matrices and in a sum of long vectors. Small operations can't reach it: each call costs some
microseconds, told as `calls`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ase.io
import torch
from bench_parts import Contender, Data, medium, timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mace_lora.backends import activations, kernels
from mace_lora.backends.kernels import call
from mace_lora.config import AdapterConfig
from mace_lora.upstream import loading

# Operations per term and channel of the contraction, its derivatives by x, the second ones, by p
_PER_TERM = (4, 10, 22, 9)
_PER_NUMBER = {"silu_by_x": 6, "silu_twice": 16, "pairs": 0}
_PARTS = {
    "conv": "convolution (our kernel)",
    "contract": "symmetric contraction (our kernel)",
    "matrix": "linear layers and radial networks (matrix products)",
    "other": "all else: sums, copies, activations, optimiser",
}


@dataclass
class Sum:
    """Of one kind of work: seconds, floating-point operations, bytes, seconds at best, calls."""

    seconds: float = 0.0
    flops: float = 0.0
    moved: float = 0.0
    floor: float = 0.0
    calls: int = 0


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Times and counts every operation while it is active.

    Args:
        flops: operations per second at best.
        moved: bytes per second at best.
    """

    def __init__(self, flops: float, moved: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates = flops, moved
        self.parts: dict[str, Sum] = defaultdict(Sum)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        if func.is_view:
            return out
        part, flops = _work(func, args, kwargs or {}, out)
        self._add(part, flops, seconds, tree_leaves((args, kwargs, out)))
        return out

    def call(self, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        """In the place of `kernels.call`: our kernels are no operations of torch."""
        start = time.perf_counter()
        call(name, dtype, *arguments)
        seconds = time.perf_counter() - start
        self._add(*_work_of_ours(name, arguments), seconds, arguments)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Operations of torch and our kernels are counted meanwhile."""
        modules = (kernels, activations)
        try:
            for module in modules:
                module.call = self.call  # type: ignore[attr-defined]
            with self:
                yield
        finally:
            for module in modules:
                module.call = call  # type: ignore[attr-defined]

    def _add(self, part: str, flops: float, seconds: float, used: Iterable[object]) -> None:
        tensors = [t for t in used if isinstance(t, Tensor)]
        moved = float(sum(t.numel() * t.element_size() for t in tensors))
        found = self.parts[part]
        found.seconds += seconds
        found.flops += flops
        found.moved += moved
        found.floor += max(flops / self.rates[0], moved / self.rates[1])
        found.calls += 1


def _work_of_ours(name: str, arguments: Sequence[Any]) -> tuple[str, float]:
    """Which part of a step a call of a kernel belongs to, and its floating-point operations."""
    if name in _PER_NUMBER:
        return "other", float(_PER_NUMBER[name] * arguments[0].numel())
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    tables = [t for t in tensors if t.dim() == 2 and t.dtype == torch.int64]
    if name.startswith("conv"):
        _, edges, _, channels, *_ = (a for a in arguments if isinstance(a, int))
        entries = next(t.shape[0] for t in tables if t.shape[1] == 3)
        # per edge the coefficients times y once, then per channel one product for each entry
        return "conv", 2.0 * edges * entries * (channels + 1)
    kind = arguments[0] if isinstance(arguments[0], int) else 3
    atoms, channels = tensors[0].shape[:2]
    terms = next(t.shape[0] for t in tables if t.shape[1] == 4)
    return "contract", float(_PER_TERM[kind]) * atoms * channels * terms


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[str, float]:
    """Which part of a step an operation belongs to, and its floating-point operations."""
    if func.overloadpacket in flop_registry:
        return "matrix", float(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
    return "other", float(sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)))


def peak(dtype: torch.dtype) -> tuple[float, float]:
    """Operations per second in a product of large matrices, bytes per second in a long sum."""
    n, long = 1024, 20_000_000
    a, b = torch.rand(n, n, dtype=dtype), torch.rand(n, n, dtype=dtype)
    x, y, z = (torch.rand(long, dtype=dtype) for _ in range(3))
    flops = 2 * n**3 / _best(lambda: torch.mm(a, b))
    return flops, 3 * x.numel() * x.element_size() / _best(lambda: torch.add(x, y, out=z))


def _best(function: Callable[[], object], rounds: int = 7) -> float:
    return min(timed(function) for _ in range(rounds))


def measure(contender: Contender, rounds: int, rates: tuple[float, float]) -> dict[str, Sum]:
    """By part, the mean of some steps."""
    for _ in range(3):
        contender.step()
    counted = Counting(*rates)
    with counted.counting():
        for _ in range(rounds):
            contender.step()
    return {
        part: Sum(*(value / rounds for value in vars(s).values()))
        for part, s in counted.parts.items()
    }


def show(title: str, parts: dict[str, Sum], step: float) -> None:
    whole = sum(s.seconds for s in parts.values())
    print(f"\n{title}; {1e3 * step:.0f} ms a step, {1e3 * whole:.0f} ms of it in operations\n")
    print("| part | ms | Gflop/s | GB/s | floor, ms | times the floor | calls |")
    print("|---|---|---|---|---|---|---|")
    rows = [(_PARTS[part], parts[part]) for part in _PARTS if part in parts]
    total = Sum(*(sum(getattr(s, name) for s in parts.values()) for name in vars(Sum())))
    for name, s in [*rows, ("all", total)]:
        print(
            f"| {name} | {1e3 * s.seconds:.1f} | {1e-9 * s.flops / s.seconds:.1f} | "
            f"{1e-9 * s.moved / s.seconds:.1f} | {1e3 * s.floor:.1f} | "
            f"{s.seconds / s.floor:.1f} | {s.calls:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", required=True, help="labelled frames, such as aspirin's")
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["medium", "mini"])
    parser.add_argument("--methods", nargs="+", default=["lora"])
    parser.add_argument("--dtypes", nargs="+", default=["float64"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    frames = list(ase.io.iread(args.frames, f":{args.batch}"))
    elements = sorted({int(z) for frame in frames for z in frame.numbers})
    for dtype in (getattr(torch, name) for name in args.dtypes):
        rates = peak(dtype)
        print(f"{dtype}, {args.threads} threads at best: {1e-9 * rates[0]:.0f} Gflop/s, ", end="")
        print(f"{1e-9 * rates[1]:.0f} GB/s")
        for name in args.models:
            for method in args.methods:

                def base(name: str = name) -> torch.nn.Module:
                    return medium(elements) if name == "medium" else loading.load(name)

                data = Data(frames, base().to(dtype), "cpu")
                step = Contender("fused", data, base, AdapterConfig.create(method))
                plain = _best(step.step, args.rounds)
                show(f"{name}, {method}, {dtype}", measure(step, args.rounds, rates), plain)


if __name__ == "__main__":
    main()
