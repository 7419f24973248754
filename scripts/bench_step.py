#!/usr/bin/env python
"""How fast a training step is, against mace-torch's own `--lora`, on the same batch in one process.

    python scripts/bench_step.py --frames rmd17/revised_aspirin/train.xyz

Both programs take mace-torch's own `take_step` (Adam with amsgrad, EMA, clipping at 10) on a model
of the size of MACE-OFF23 medium with untrained weights, whose arithmetic is the same. Steps of all
contenders take turns, so that a busy machine slows all of them alike, and a result is the ratio of
the median times. Memory is the peak of a process of its own. On a GPU: `--device=cuda`, which also
checks that the captured step gives the gradients of eager.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import ase.io  # noqa: E402
import mace  # noqa: E402, F401  (prepares e3nn for current torch versions)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from e3nn import o3  # noqa: E402
from mace import modules  # noqa: E402
from torch_ema import ExponentialMovingAverage  # noqa: E402

from mace_lora.config import AdapterConfig  # noqa: E402
from mace_lora.host import models, upstream  # noqa: E402
from mace_lora.host.speed import Speed  # noqa: E402
from mace_lora.injection import inject  # noqa: E402
from mace_lora.step.padding import plan, sizes  # noqa: E402

Step = Callable[[], float]
WANTED = {"forces": True, "virials": False, "stress": False}
UPSTREAM = "mace-torch --lora"


def medium(elements: list[int], channels: int = 128) -> torch.nn.Module:
    """A ScaleShiftMACE of the size of MACE-OFF23 medium, untrained, for `elements`."""
    torch.manual_seed(0)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    return modules.ScaleShiftMACE(
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=len(elements),
        hidden_irreps=o3.Irreps(f"{channels}x0e + {channels}x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=-np.ones((1, len(elements))),
        avg_num_neighbors=14.0,
        atomic_numbers=elements,
        correlation=3,
        gate=torch.nn.functional.silu,
        radial_MLP=[64, 64, 64],
        heads=["Default"],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )


class Contender:
    """A model with adapters and all that a step of it needs.

    Args:
        name: UPSTREAM, or a value of `--step`.
        batch: what it trains on.
        base: makes the model.
        config: the adapter; its rank is upstream's too.
    """

    def __init__(
        self, name: str, batch: Any, base: Callable[[], torch.nn.Module], config: AdapterConfig
    ) -> None:
        self.model = base().to(batch.positions.device)
        self.batch, self.name = batch, name
        if name == UPSTREAM:
            rank = config.options.rank if config.method == "lora" else 4
            upstream.original("inject")(self.model, rank=rank, alpha=1.0)
            self._take = upstream.original("take_step")
            self._evaluate: Any = upstream.original("evaluate")
        else:
            inject(self.model, config)
            speed = Speed(name)
            self._take, self._evaluate = speed.take_step, speed.evaluate
            if name in ("compile", "cudagraph"):
                loader = _Loader([batch])
                speed.plan(self.model, loader, {"valid": loader}, epochs=1)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-4, amsgrad=True)
        self.ema = ExponentialMovingAverage(trained, decay=0.99)
        self.loss_fn = modules.WeightedEnergyForcesLoss(1.0, 100.0).to(batch.positions.device)

    def step(self) -> float:
        """Seconds of one training step."""
        return _timed(
            lambda: self._take(
                model=self.model,
                loss_fn=self.loss_fn,
                batch=self.batch,
                optimizer=self.optimizer,
                ema=self.ema,
                output_args=WANTED,
                max_grad_norm=10.0,
                device=self.batch.positions.device,
            )
        )

    def evaluate(self) -> float:
        """Seconds to evaluate the batch: energies, forces and metrics."""
        return _timed(
            lambda: self._evaluate(
                model=self.model,
                loss_fn=self.loss_fn,
                data_loader=[self.batch],
                output_args=WANTED,
                device=self.batch.positions.device,
            )
        )

    def gradients(self) -> list[torch.Tensor]:
        self.step()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


class _Loader:
    """Batches as a loader of one frame each, for planning shapes."""

    batch_size = 1

    def __init__(self, batches: list[Any]) -> None:
        self.dataset = batches

    def __len__(self) -> int:
        return len(self.dataset)


def _timed(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(steps: dict[str, Step], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """The median seconds of each, over `rounds` in which each has one turn."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    return {name: statistics.median(values) for name, values in seconds.items()}


def _memory(key: str) -> float:
    """GB of this process by Linux's own account: VmRSS in use, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e6


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


class Bench:
    """The measurements, each a table. Memory on a CPU needs Linux."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.frames = ase.io.read(args.frames, index=f":{max(args.growth)}")
        self.elements = sorted({int(z) for f in self.frames for z in f.numbers})
        self.ways = [w for w in args.ways if w != "eager"]

    def batch(self, n: int, dtype: torch.dtype, base: torch.nn.Module | None = None) -> Any:
        base = (base or medium(self.elements, channels=1)).to(dtype)
        torch.set_default_dtype(dtype)
        return models.frames_to_batch(self.frames[:n], base).to(self.args.device)

    def base(self) -> torch.nn.Module:
        return medium(self.elements, self.args.channels)

    def cases(self) -> Iterator[tuple[str, AdapterConfig, torch.dtype, Callable[[], Any]]]:
        f64, f32 = torch.float64, torch.float32
        lora = AdapterConfig.create("lora", rank=4)
        yield "LoRA, rank 4", lora, f64, self.base
        if self.args.quick:
            return
        yield "LoRA, rank 16", AdapterConfig.create("lora", rank=16), f64, self.base
        yield "ELoRA, rank 16", AdapterConfig.create("elora"), f64, self.base
        yield "MMEA, rank 16", AdapterConfig.create("mmea"), f64, self.base
        yield "LoRA, rank 4, float32", lora, f32, self.base
        if set(self.elements) <= {1, 6, 7, 8}:
            yield "LoRA, rank 4, mini", lora, f64, lambda: models.load("mini", dtype=f64)

    def steps(self) -> None:
        rows = []
        for title, config, dtype, base in self.cases():
            batch = self.batch(self.args.batch_size, dtype, base() if "mini" in title else None)
            names = [UPSTREAM, "eager", *self.ways]
            all_of_them = {n: Contender(n, batch, base, config) for n in names}
            seconds = take_turns({n: c.step for n, c in all_of_them.items()}, self.args.rounds)
            measured = {"step": seconds}
            if not rows:  # the floor of a step: energies and forces alone
                evaluations = {n: c.evaluate for n, c in all_of_them.items()}
                measured["evaluation"] = take_turns(evaluations, self.args.rounds)
            for what, values in measured.items():
                first = values[UPSTREAM]
                ratios = [f"{values[n]:.3f} s, {values[n] / first:.2f}" for n in names[1:]]
                rows.append([title, what, f"{first:.3f} s", *ratios])
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
        edges = batch.edge_index.shape[1]
        table(
            f"{self.args.batch_size} frames, {edges} edges, {torch.get_num_threads()} threads: "
            "seconds, and the ratio to mace-torch",
            ["case", "what", UPSTREAM, "eager", *self.ways],
            rows,
        )

    def growth(self) -> None:
        rows = []
        for n in self.args.growth:
            batch = self.batch(n, torch.float64)
            config = AdapterConfig.create("lora", rank=4)
            names = [UPSTREAM, *(w for w in self.ways if w != "compile")]
            all_of_them = {m: Contender(m, batch, self.base, config) for m in names}
            steps = {m: c.step for m, c in all_of_them.items()}
            seconds = take_turns(steps, max(3, self.args.rounds // 3), warm_up=2)
            edges, atoms, _ = sizes(batch.to_dict())
            numbers = [f"{seconds[m]:.3f}" for m in names]
            ratio = f"{seconds[names[1]] / seconds[UPSTREAM]:.2f}"
            per_edge = f"{1e6 * seconds[names[1]] / edges:.0f}"
            rows.append([str(n), str(atoms), str(edges), *numbers, ratio, per_edge])
        columns = ["frames", "atoms", "edges", *names, "ratio", "µs per edge"]
        table("How the cost of a step grows (float64, LoRA, rank 4)", columns, rows)

    def memory(self) -> None:
        """Peak memory of processes that take three steps each."""
        rows = []
        for name in (UPSTREAM, "eager", *(w for w in self.ways if w != "compile")):
            command = [sys.executable, __file__, "--frames", self.args.frames, "--peak", name]
            command += ["--device", self.args.device, "--channels", str(self.args.channels)]
            command += ["--batch_size", str(self.args.batch_size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append([name, f"{found['before']:.2f}", f"{found['peak']:.2f}"])
        table("Memory of a process (GB)", ["way", "before the first step", "peak"], rows)

    def peak(self, name: str) -> None:
        batch = self.batch(self.args.batch_size, torch.float64)
        config = AdapterConfig.create("lora", rank=4)
        contender = Contender(name, batch, self.base, config)
        if self.args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 1e9
        else:
            Path("/proc/self/clear_refs").write_text("5")  # building the model had a peak too
            before = _memory("VmRSS")
        for _ in range(3):
            contender.step()
        on_cuda = self.args.device == "cuda"
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_cuda else _memory("VmHWM")
        print(json.dumps({"before": before, "peak": peak}))

    def padding(self) -> None:
        """Shapes for shuffled batches of frames of different molecules."""
        frames = [f for path in self.args.mixed for f in ase.io.read(path, index=":50")]
        elements = sorted({int(z) for f in frames for z in f.numbers})
        model = medium(elements, channels=1).double()
        sizes_of = [sizes(models.frames_to_batch([f], model).to_dict()) for f in frames]
        draw, rows = np.random.default_rng(0), []
        for n in (5, 10, 32):
            batches = [
                tuple(int(s) for s in np.sum([sizes_of[i] for i in chosen], axis=0))
                for chosen in (draw.choice(len(frames), n, replace=False) for _ in range(300))
            ]
            shapes, waste = plan(batches)
            edges = ", ".join(str(s.edges) for s in shapes)
            rows.append([str(n), edges, f"{100 * waste:.1f} %"])
        title = f"Padding of mixed molecules, {len(self.args.mixed)} data sets"
        table(title, ["frames per batch", "edges of the shapes", "wasted edges"], rows)

    def check(self) -> None:
        """The largest difference of the first gradients from eager's, relative to each tensor."""
        batch = self.batch(self.args.batch_size, torch.float64)
        rows, config = [], AdapterConfig.create("lora", rank=4, init="orthogonal")
        found = {}
        for name in ("eager", *self.ways):
            torch.manual_seed(1)
            found[name] = Contender(name, batch, self.base, config).gradients()
        for name in self.ways:
            pairs = zip(found["eager"], found[name], strict=True)
            worst = max(
                ((a - b).abs().max() / a.abs().max().clamp_min(1e-300)).item()
                for a, b in pairs
                if a.abs().max() > 0
            )
            rows.append([name, f"{worst:.1e}"])
        table("Gradients against eager (relative)", ["way", "largest difference"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", required=True, help="frames of one molecule, extended xyz")
    parser.add_argument("--mixed", nargs="*", default=[], help="data sets for the padding table")
    parser.add_argument("--ways", nargs="+", default=None, help="fused compile cudagraph")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=5)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--growth", type=int, nargs="*", default=[1, 5, 20])
    parser.add_argument("--quick", action="store_true", help="LoRA of rank 4 alone, no growth")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.ways = args.ways or (["cudagraph"] if args.device == "cuda" else ["fused"])
    args.growth = [n for n in args.growth if n > 0] or [args.batch_size]
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_default_dtype(torch.float64)
    bench = Bench(args)
    if args.peak:
        bench.peak(args.peak)
        return
    bench.check()
    bench.steps()
    if not args.quick:
        bench.growth()
        bench.memory()
    if args.mixed:
        bench.padding()


if __name__ == "__main__":
    main()
