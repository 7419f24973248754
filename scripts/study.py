"""Compare ways of fine-tuning on equal terms: the same frames, seeds and number of steps.

    python scripts/study.py init --out results/init      # how the LoRA factors start
    python scripts/study.py mini --out results/mini      # from `mini` against from scratch
    python scripts/study.py methods --out results/methods  # every method, and mace-torch's --lora

Each variant is a run of the real command in a folder of its own under --out; finished runs are not
repeated. At the end every saved model is evaluated on the test frames, and one table is printed and
written to --out/table.md and --out/results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import ase.io
import torch
from reproduction.evaluation import load_model, predictions
from reproduction.protocol import architecture
from reproduction.runs import seconds_per_step, trainable

from mace_lora import load_foundation
from mace_lora.adapters.options import INITS
from mace_lora.adapters.registry import METHODS
from mace_lora.upstream.predicting import frames_to_batch, predict

DATA = Path(str(resources.files("mace_lora") / "data"))
LORA = ["--foundation_model=mini", "--E0s=estimated", "--adapter=lora"]


@dataclass(frozen=True)
class Variant:
    """A row of the table: a name, the flags that make it, and whose command runs them."""

    name: str
    flags: list[str] = field(default_factory=list)
    upstream: bool = False


def scratch() -> Variant:
    """Training the architecture of `mini` from random numbers."""
    settings = architecture("mini")
    return Variant("from scratch", [f"--{k}={v}" for k, v in settings.items()])


def variants(study: str) -> list[Variant]:
    """The rows of a study."""
    full = Variant("full fine-tuning", ["--foundation_model=mini", "--E0s=estimated"])
    if study == "mini":
        lora = [Variant(f"lora, rank {r}", [*LORA, f"--lora_rank={r}"]) for r in (4, 16)]
        return [scratch(), full, *lora]
    if study == "init":
        return [
            Variant(f"{init}, rank {rank}, alpha {alpha}", [*LORA, f"--lora_init={init}", *extra])
            for rank, alpha in ((4, 1), (16, 16))
            for extra in [[f"--lora_rank={rank}", f"--lora_alpha={alpha}"]]
            for init in INITS
        ]
    theirs = [
        Variant(
            f"mace-torch's --lora, rank {rank}, alpha {alpha}",
            ["--E0s=estimated", "--lora=True", f"--lora_rank={rank}", f"--lora_alpha={alpha}"],
            upstream=True,
        )
        for rank, alpha in ((4, 1), (16, 16))
    ]
    mine = [(f"{m}, its defaults", [f"--adapter={m}"]) for m in METHODS]
    mine += [
        ("dora, magnitudes alone", ["--adapter=dora", "--dora_rank=0"]),
        ("lora, preset balanced", ["--lora=True", "--lora_preset=balanced"]),
        ("elora, rank 4, alpha 2", ["--adapter=elora", "--elora_rank=4", "--elora_alpha=2"]),
    ]
    ours = [Variant(name, ["--foundation_model=mini", *flags]) for name, flags in mine]
    return [full, *theirs, *ours]


def run(variant: Variant, args: argparse.Namespace, seed: int, lr: float) -> Path:
    """Train one variant unless its model is there; the folder of the run."""
    name = re.sub(r"[^a-z0-9]+", "_", variant.name.lower()).strip("_")
    folder = Path(args.out) / f"{name}_lr{lr:g}_seed{seed}"
    if (folder / "seconds.txt").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    flags = [
        "--name=run",
        f"--train_file={args.train}",
        f"--valid_file={args.valid}",
        f"--seed={seed}",
        f"--max_num_epochs={args.epochs}",
        f"--eval_interval={args.eval_interval}",
        f"--batch_size={args.batch_size}",
        "--valid_batch_size=25",
        f"--lr={lr}",
        f"--energy_weight={args.energy_weight}",
        f"--forces_weight={args.forces_weight}",
        "--ema",
        "--ema_decay=0.99",
        "--scheduler_patience=10",
        "--error_table=PerAtomMAE",
        f"--default_dtype={args.dtype}",
        "--plot=False",
    ]
    command = [sys.executable, "-m", "mace_lora", "train"]
    if variant.upstream:  # mace-torch's own program, which needs the model as a file
        torch.save(load_foundation("mini", dtype=getattr(torch, args.dtype)), folder / "mini.model")
        command = [sys.executable, "-c", "from mace.cli.run_train import main; main()"]
        flags.append("--foundation_model=mini.model")
    elif any(flag.startswith(("--lora=", "--adapter=")) for flag in variant.flags):
        flags.append("--defaults=mace-torch")
    start = time.time()
    with open(folder / "output.txt", "w", encoding="utf-8") as log:
        subprocess.run(
            [*command, *flags, *variant.flags],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            check=True,
        )
    (folder / "seconds.txt").write_text(f"{time.time() - start:.1f}\n")
    return folder


def evaluate(model_file: Path, test: Path) -> dict[str, float]:
    """MAE of energy (meV per atom) and forces (meV/A) of a saved model on the frames of a file."""
    found = predictions(load_model(model_file), ase.io.read(test, index=":")).errors()
    return {"energy": found["energy_per_atom_mae"], "forces": found["forces_mae"]}


def adapter_bytes(folder: Path) -> int:
    """Size of the adapter directory; of mace-torch's whole model where there is none."""
    files = list(folder.glob("run_adapter/*")) or [folder / "run.model"]
    return sum(f.stat().st_size for f in files)


def inference_ratio(model_file: Path, frames: list[ase.Atoms], repeats: int = 15) -> float:
    """Energies and forces with the saved model against `mini`: ratio of medians, taken in turn."""
    model = torch.load(model_file, weights_only=False)
    base = load_foundation("mini", dtype=next(model.parameters()).dtype)
    times: dict[int, list[float]] = {0: [], 1: []}
    for repeat in range(repeats + 5):  # the first five warm TorchScript up
        for i, m in enumerate((model, base)):
            batch = frames_to_batch(frames, m)
            start = time.perf_counter()
            predict(m, [batch])
            if repeat >= 5:
                times[i].append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the mean over seeds, and the spread where there are several."""
    head = ["", "trained parameters", "lr", "force MAE, meV/Å", "energy MAE, meV/atom"]
    more = "inference" in rows[0]
    if more:
        head += ["step, ms", "file, KB", "inference time / base"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key in dict.fromkeys((r["variant"], r["lr"]) for r in rows):
        mine = [r for r in rows if (r["variant"], r["lr"]) == key]
        cells = []
        for what in ("forces", "energy"):
            values = [r[what] for r in mine]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        if more:
            values = [statistics.median(r[k] for r in mine) for k in ("step", "bytes", "inference")]
            cells += [f"{1e3 * values[0]:.0f}", f"{values[1] / 1000:.0f}", f"{values[2]:.2f}"]
        lines.append(f"| {key[0]} | {mine[0]['trainable']:,} | {key[1]:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", choices=["init", "mini", "methods"])
    parser.add_argument("--out", required=True, help="folder for the runs and the table")
    parser.add_argument("--train", default=DATA / "ethanol_train.xyz", type=Path)
    parser.add_argument("--valid", default=DATA / "ethanol_valid.xyz", type=Path)
    parser.add_argument("--test", default=DATA / "ethanol_test.xyz", type=Path)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--eval_interval", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=5)
    parser.add_argument("--forces_weight", type=float, default=100.0)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.005])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--energy_weight", type=float, default=1000.0)
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--only", default="", help="only variants with this text in their names")
    args = parser.parse_args()
    for name in ("train", "valid", "test"):
        setattr(args, name, getattr(args, name).resolve())
    rows = []
    frames = ase.io.read(args.test, index=":10")
    for variant in (v for v in variants(args.study) if args.only in v.name):
        for lr in args.lr:
            for seed in args.seeds:
                folder = run(variant, args, seed, lr)
                errors = evaluate(folder / "run.model", args.test)
                row = {"variant": variant.name, "lr": lr, "seed": seed, **errors}
                row |= {"trainable": trainable(folder), "step": seconds_per_step(folder)}
                row |= {"bytes": adapter_bytes(folder)}
                if args.study == "methods":
                    row |= {"inference": inference_ratio(folder / "run.model", frames)}
                rows.append(row)
                print(json.dumps(rows[-1]), flush=True)
    Path(args.out, "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    Path(args.out, "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
