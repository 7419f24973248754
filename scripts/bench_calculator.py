#!/usr/bin/env python
"""How long energies, forces and stress take, beside MACECalculator, call by call in one process.

    python scripts/bench_calculator.py --threads 2

A molecule of 21 atoms (aspirin) and a crystal of 216 (diamond), whose atoms move by 0.01 A from one
call to the next, as in a dynamics. Models are `mini` and one of the size of MACE-OFF23 medium with
untrained weights, whose arithmetic is the same, or those of `--model`. A result is the ratio of the
median times, with the largest difference between the two programs' results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import ase
import bench_parts
import numpy as np
import torch
from ase.build import bulk
from bench_parts import CLOCKS, medium, take_turns, timed
from mace.calculators import MACECalculator

from mace_lora import MaceLoraCalculator
from mace_lora.upstream import loading

# Aspirin, from revised MD17; A
_ASPIRIN = """\
C 2.240 -0.587 0.210
C 0.778 1.804 -0.189
C 2.871 0.637 0.423
C 2.159 1.791 0.094
C -3.567 0.291 -0.047
C 0.852 -0.701 -0.074
C 0.126 0.492 -0.241
O -0.874 -2.296 -0.536
O -1.781 1.185 1.297
O 1.313 -2.966 -0.440
C 0.325 -2.064 -0.377
C -2.068 0.635 0.250
O -1.145 0.346 -0.709
H 1.058 -3.896 -0.586
H 2.830 -1.530 0.427
H 0.200 2.707 -0.141
H 3.839 0.710 0.839
H 2.722 2.701 0.386
H -4.173 -0.062 0.796
H -3.997 1.227 -0.498
H -3.707 -0.425 -0.886
"""
OURS, THEIRS = "MaceLoraCalculator", "MACECalculator"
COMPARED = ("energy", "forces", "stress")


def aspirin() -> ase.Atoms:
    rows = [line.split() for line in _ASPIRIN.splitlines()]
    return ase.Atoms([r[0] for r in rows], [[float(x) for x in r[1:]] for r in rows])


def diamond() -> ase.Atoms:
    return bulk("C", "diamond", a=3.57, cubic=True).repeat(3)


class Walk:
    """A calculator that follows atoms on their way; two with one seed see the same frames."""

    def __init__(self, calculator: Any, atoms: ase.Atoms) -> None:
        self.calculator, self.atoms = calculator, atoms.copy()
        self.step = 0

    def __call__(self) -> float:
        self.step += 1
        noise = np.random.default_rng(self.step).normal(size=self.atoms.positions.shape)
        self.atoms.positions += 0.01 * noise
        return timed(lambda: self.calculator.calculate(self.atoms))


def differences(one: Walk, other: Walk) -> float:
    """The largest of any result, relative to the largest value of that result."""
    assert one.step == other.step
    pairs = [(np.asarray(a.calculator.results[key]) for a in (one, other)) for key in COMPARED]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="*", default=[], help=".model files beside those two")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine")
    parser.add_argument("--channels", type=int, default=128, help="of the medium model")
    parser.add_argument("--default_dtype", choices=["float32", "float64"], default="float64")
    args = parser.parse_args()
    bench_parts.use_clock(args.clock)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.default_dtype)
    torch.set_default_dtype(dtype)
    models: dict[str, Callable[[], torch.nn.Module]] = {
        "mini": lambda: loading.load("mini", dtype=dtype),
        "medium": lambda: medium([1, 6, 7, 8], args.channels),
    }
    models |= {path: lambda path=path: loading.load(path, dtype=dtype) for path in args.model}
    print(f"{args.default_dtype}, {torch.get_num_threads()} threads, {args.clock} seconds\n")
    print(f"| model | atoms | {THEIRS} | {OURS} | ratio | difference |\n|{'---|' * 6}")
    for name, make in models.items():
        model = make()
        for atoms in (aspirin(), diamond()):
            settings = {"default_dtype": args.default_dtype}
            calculators = {
                THEIRS: MACECalculator(models=[deepcopy(model)], **settings),
                OURS: MaceLoraCalculator(model, **settings),
            }
            walks = {who: Walk(calculator, atoms) for who, calculator in calculators.items()}
            seconds = take_turns(walks, args.rounds)
            ratio = seconds[OURS] / seconds[THEIRS]
            times = " | ".join(f"{seconds[who]:.4f} s" for who in (THEIRS, OURS))
            apart = differences(walks[OURS], walks[THEIRS])
            print(f"| {name} | {len(atoms)} | {times} | {ratio:.2f} | {apart:.0e} |", flush=True)


if __name__ == "__main__":
    main()
