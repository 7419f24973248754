#!/usr/bin/env python
"""How fast a training step is, against mace-torch's own `--lora`, on the same batch in one process.

    python scripts/bench_step.py --frames rmd17/aspirin/train.xyz

Both programs take mace-torch's own `take_step` (Adam with amsgrad, EMA, clipping at 10) on a model
of the size of MACE-OFF23 medium with untrained weights, whose arithmetic is the same. Steps of all
contenders take turns, so that a busy machine slows all of them alike, and a result is the ratio of
the median times. Memory is the peak of a process of its own. On a GPU: `--device=cuda`, which also
checks that captured steps give the gradients of eager.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import bench_parts
import torch
from bench_parts import CLOCKS, CUEQ, UPSTREAM, Contender, Data, medium, take_turns

from mace_lora.backends.registry import BACKENDS
from mace_lora.config import AdapterConfig
from mace_lora.upstream import loading

STEPS_CHECKED = 5
# The whole run: rMD17's quick validation
RUN_FRAMES = 50
RUN_FLAGS = (
    *("--name=run", "--lora=True", "--lora_rank=4", "--batch_size=5", "--valid_batch_size=10"),
    *("--E0s=estimated", "--lr=0.005", "--ema", "--amsgrad", "--default_dtype=float64", "--seed=1"),
    *("--forces_weight=100", "--energy_weight=1", "--error_table=PerAtomMAE"),
)


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
        self.frames = ase.io.read(args.frames, index=f":{max([*args.growth, *args.batch_size])}")
        self.elements = sorted({int(z) for f in self.frames for z in f.numbers})
        self.backends = [b for b in args.backends if b != "eager"]

    def data(self, n: int, dtype: torch.dtype, base: torch.nn.Module | None = None) -> Data:
        base = (base or medium(self.elements, channels=1)).to(dtype)
        return Data(self.frames[:n], base, self.args.device)

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
        yield "full, against full", AdapterConfig.create("full"), f64, self.base
        yield "LoRA, rank 4, float32", lora, f32, self.base
        if set(self.elements) <= {1, 6, 7, 8}:
            yield "LoRA, rank 4, mini", lora, f64, lambda: loading.load("mini", dtype=f64)

    def names(self) -> list[str]:
        """Who takes turns; the first one is what the others are compared with."""
        names = [UPSTREAM, "eager", *self.backends]
        if self.args.device != "cuda" or importlib.util.find_spec("cuequivariance_torch") is None:
            return names
        return [*names, UPSTREAM + CUEQ, *(b + CUEQ for b in self.backends)]

    def steps(self) -> None:
        names = self.names()
        for size in self.args.batch_size:
            rows = []
            for title, config, dtype, base in self.cases():
                data = self.data(size, dtype, base() if "mini" in title else None)
                all_of_them = {n: Contender(n, data, base, config) for n in names}
                for what, seconds in self._measured(all_of_them, everything=not rows):
                    first = seconds[UPSTREAM]
                    ratios = [f"{seconds[n]:.4f} s, {seconds[n] / first:.2f}" for n in names[1:]]
                    rows.append([title, what, f"{first:.4f} s", *ratios])
                    print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
            table(
                f"{size} frames, {data.sizes()[0]} edges, {self.args.device}, "
                f"{torch.get_num_threads()} threads: {self.args.clock} seconds, and the ratio to "
                "mace-torch",
                ["case", "what", *names],
                rows,
            )

    def _measured(
        self, all_of_them: dict[str, Contender], everything: bool
    ) -> Iterator[tuple[str, dict[str, float]]]:
        rounds = self.args.rounds
        yield "step", take_turns({n: c.step for n, c in all_of_them.items()}, rounds)
        if not everything:
            return
        others = {
            "step, batch made from the data set": "step_and_batch",
            "evaluation": "evaluate",
            "floor: energies and forces": "forward",
        }
        for what, method in others.items():
            turns = {n: getattr(c, method) for n, c in all_of_them.items()}
            yield what, take_turns(turns, rounds)

    def growth(self) -> None:
        rows = []
        names = [UPSTREAM, "eager", *self.backends]
        for n in self.args.growth:
            data = self.data(n, torch.float64)
            config = AdapterConfig.create("lora", rank=4)
            try:
                all_of_them = {m: Contender(m, data, self.base, config) for m in names}
                steps = {m: c.step for m, c in all_of_them.items()}
                seconds = take_turns(steps, max(3, self.args.rounds // 3), warm_up=2)
            except torch.cuda.OutOfMemoryError:
                print(f"{n} frames don't fit into the memory", file=sys.stderr)
                break
            edges, atoms, _ = data.sizes()
            numbers = [f"{seconds[m]:.4f}" for m in names]
            ratio = f"{seconds[names[-1]] / seconds[UPSTREAM]:.2f}"
            per_edge = f"{1e6 * seconds[names[-1]] / edges:.1f}"
            rows.append([str(n), str(atoms), str(edges), *numbers, ratio, per_edge])
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
        columns = ["frames", "atoms", "edges", *names, "ratio", "µs per edge"]
        table("How the cost of a step grows (float64, LoRA, rank 4)", columns, rows)

    def memory(self) -> None:
        """Peak memory of processes that take three steps each, as batches grow."""
        rows = []
        names = [UPSTREAM, "eager", *self.backends]
        for n in sorted({*self.args.growth, self.args.batch_size[0]}):
            found = [self._memory_of(name, n) for name in names]
            rows.append([str(n), str(self.data(n, torch.float64).sizes()[0]), *found])
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
        title = "Memory of a process (GB): before the first step, and at the peak"
        table(title, ["frames", "edges", *names], rows)

    def _memory_of(self, name: str, n: int) -> str:
        command = [sys.executable, __file__, "--frames", self.args.frames, "--peak", name]
        command += ["--device", self.args.device, "--channels", str(self.args.channels)]
        command += ["--growth", "--batch_size", str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == -signal.SIGKILL or "OutOfMemoryError" in done.stderr:
            return "doesn't fit"
        if done.returncode:
            raise SystemExit(f"{name}, {n} frames: {done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        return f"{found['before']:.2f}, {found['peak']:.2f}"

    def peak(self, name: str) -> None:
        data = self.data(self.args.batch_size[0], torch.float64)
        contender = Contender(name, data, self.base, AdapterConfig.create("lora", rank=4))
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

    def whole_run(self) -> None:
        """Wall time of the two commands, from start to finished model, evaluations included."""
        frames = ase.io.read(self.args.frames, index=f":{2 * RUN_FRAMES}")
        ours = [sys.executable, "-m", "mace_lora", "train", f"--step={self.backends[-1]}"]
        theirs = [sys.executable, "-c", "from mace.cli.run_train import main; main()"]
        rows = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            # mace-torch fits E0s in the precision of the file, and fails where it is another
            torch.save(self.base().double(), folder / "medium.model")
            for part, of in (("train", frames[:RUN_FRAMES]), ("valid", frames[RUN_FRAMES:])):
                ase.io.write(folder / f"{part}.xyz", of)
            flags = [*RUN_FLAGS, f"--max_num_epochs={self.args.whole_run}"]
            flags += [f"--device={self.args.device}", f"--foundation_model={folder}/medium.model"]
            flags += [f"--{part}_file={folder}/{part}.xyz" for part in ("train", "valid")]
            for who, command in ((UPSTREAM, theirs), (f"--step={self.backends[-1]}", ours)):
                (folder / who).mkdir()
                start = time.perf_counter()
                environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
                done = subprocess.run(
                    [*command, *flags, *([] if who == UPSTREAM else ["--defaults=mace-torch"])],
                    cwd=folder / who,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise SystemExit(f"{who} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
                seconds = time.perf_counter() - start
                rows.append([who, f"{seconds:.0f} s"])
        title = (
            f"Whole runs: {self.args.whole_run} epochs, {RUN_FRAMES} training and "
            f"{len(frames) - RUN_FRAMES} validation frames, batches of 5"
        )
        table(title, ["command", "wall time"], rows)

    def check(self) -> None:
        """The largest differences from eager's: of the first gradients, and after whole steps."""
        data = self.data(self.args.batch_size[0], torch.float64)
        rows, config = [], AdapterConfig.create("lora", rank=4, init="orthogonal")
        found = {}
        for name in ("eager", *self.backends):
            torch.manual_seed(1)
            contender = Contender(name, data, self.base, config)
            gradients = dict(enumerate(contender.gradients()))
            found[name] = gradients, contender.after(STEPS_CHECKED - 1)
        for name in self.backends:
            worst = [_apart(a, b) for a, b in zip(found["eager"], found[name], strict=True)]
            rows.append([name, *(f"{w:.1e}" for w in worst)])
        after = f"weights and averages after {STEPS_CHECKED} steps"
        title = "Against eager, the largest difference relative to the largest value of a tensor"
        table(title, ["backend", "first gradients", after], rows)


def _apart(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> float:
    return max(
        ((one[k] - other[k]).abs().max() / one[k].abs().max()).item()
        for k in one
        if one[k].abs().max() > 0
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", required=True, help="frames of one molecule, extended xyz")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), help="beside eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, nargs="+", default=None)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--growth", type=int, nargs="*", default=None, help="frames of batches")
    parser.add_argument("--whole_run", type=int, default=None, help="epochs of whole runs; 0: none")
    parser.add_argument("--quick", action="store_true", help="LoRA of rank 4 alone, no growth")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    args.backends = args.backends or (["cudagraph"] if on_cuda else ["fused"])
    args.batch_size = args.batch_size or ([5, 64] if on_cuda else [5])
    if args.growth is None:
        args.growth = [1, 5, 20, 64, 128, 256, 512] if on_cuda else [1, 5, 20]
    if args.whole_run is None:
        args.whole_run = 500 if on_cuda and not args.quick else 0
    bench_parts.use_clock(args.clock)
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
    if args.whole_run:
        bench.whole_run()


if __name__ == "__main__":
    main()
