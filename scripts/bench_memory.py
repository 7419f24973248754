#!/usr/bin/env python
"""Peak memory against atoms: of a prediction, and of a training step, on one frame of water.

    python scripts/bench_memory.py --frames DATA/water/train.xyz --models mini my.model

The first frame of the file is repeated to the sizes asked for. Each point is a process of its own,
whose peak (`ru_maxrss`, torch and the model included) is taken when it ends. A step is what
training does: energy and forces, their loss, gradients of the adapter (`--adapter=full` unless
another is named) and the optimiser.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import ase.io
import torch

from mace_lora import AdapterConfig, inject
from mace_lora.backends.choice import choose
from mace_lora.model.injection import adapter_parameters
from mace_lora.upstream import loading, predicting

WHAT = ("nothing", "predict", "step")
REPEATS = {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 11: (11, 1, 1)}
SEED = 0  # of the displacements: repeated cells are not all alike


def measured(frames: str, model: str, repeat: int, what: str, how: str, adapter: str) -> str:
    """atoms, edges, GB at the peak, CPU seconds: of this process."""
    torch.manual_seed(SEED)
    loaded = loading.load(model, dtype=torch.float64)
    frame = ase.io.read(frames, index=0).repeat(REPEATS[repeat])
    frame.rattle(0.02, seed=SEED)
    batch = predicting.frames_to_batch([frame], loaded)
    edges, seconds = batch["edge_index"].shape[1], 0.0
    if what == "predict":
        began = time.process_time()
        predicting.predict(loaded, [batch])
        seconds = time.process_time() - began
    elif what == "step":
        inject(loaded, AdapterConfig.create(adapter))
        optimiser = torch.optim.Adam(adapter_parameters(loaded).values())
        with choose(how, loaded).active(loaded):
            began = time.process_time()
            step(loaded, batch.to_dict(), optimiser)
            seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return f"{len(frame)} {edges} {peak:.3f} {seconds:.2f}"


def step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer
) -> None:
    """One step on labels of 0."""
    optimiser.zero_grad()
    output = model(batch, training=True, compute_force=True)
    loss = output["energy"].square().mean() / len(batch["positions"]) ** 2
    (loss + output["forces"].square().mean()).backward()
    optimiser.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", required=True, help="an xyz file; its first frame is repeated")
    parser.add_argument("--models", nargs="+", default=["mini"])
    parser.add_argument("--repeats", nargs="+", type=int, default=[1, 4, 8, 11], choices=REPEATS)
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT)
    parser.add_argument("--step", default="auto", help="how a step is computed: auto, eager, fused")
    parser.add_argument("--adapter", default="full")
    parser.add_argument("--point", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        given = (args.models[0], args.repeats[0], args.what[0], args.step, args.adapter)
        print(measured(args.frames, *given))
        return
    print("| model | what | atoms | edges | peak, GB | CPU s |\n|---|---|---|---|---|---|")
    for model in args.models:
        for what in args.what:
            for repeat in args.repeats:
                own = ["--models", model, "--what", what, "--repeats", str(repeat), "--point"]
                command = [sys.executable, __file__, *sys.argv[1:], *own]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                found = done.stdout.split()[-4:] if done.returncode == 0 else ["failed"] * 4
                print(f"| {model} | {what} | {' | '.join(found)} |", flush=True)
                if done.returncode:
                    print(done.stderr[-1500:], file=sys.stderr)


if __name__ == "__main__":
    main()
