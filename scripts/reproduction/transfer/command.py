"""Compare methods away from the training frames: accuracy, memory, repulsive walls, dynamics.

    scripts/reproduce.sh transfer                                   # everything, from `mini`
    scripts/reproduce.sh transfer --train aspirin --steps 2000 --methods=full_fast,full_ours
    scripts/reproduce.sh transfer --foundation_model=spice2022.model

Every run is the real command in a folder of its own. Give the same command again after an
interruption. --out/table.md and table.json cover all finished runs; scripts/README.md says what
the columns mean. Any other flag (--energy_weight=1, --device=cuda) goes to mace_run_train and into
the runs' names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mace_lora.errors import ConfigError
from reproduction import protocol, runs
from reproduction.datasets import RMD17, System
from reproduction.transfer import assess, methods, plan, table
from reproduction.transfer.dynamics import Lengths

OURS = {"lr": "--rates", "seed": "--seeds", "max_num_epochs": "--steps"}
Prepare = Callable[[System, "Path | None", Path], Path]


@dataclass(frozen=True)
class Options:
    """What a command line asks for."""

    runs: list[plan.TransferRun]
    systems: list[System]
    foundation_model: str
    others: str
    numbers: plan.Numbers
    lengths: Lengths
    out: Path
    data_dir: Path | None
    dry_run: bool


def parse(argv: list[str]) -> Options:
    """The comparison that a command line asks for.

    Raises:
        ConfigError: something in it is not understood.
    """
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce.sh transfer",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add, lengths, n = parser.add_argument, Lengths(), plan.Numbers()
    known = ", ".join(methods.CANDIDATES)
    add("--foundation_model", default="mini", help="mini, a name of mace-torch's, or a path")
    add("--train", nargs="+", default=list(plan.TRAINING_SETS), choices=plan.TRAINING_SETS)
    add("--methods", default="all", help=f"comma-separated, or all: {known}")
    add("--rates", nargs="+", type=float, default=methods.RATES, help="the same for all methods")
    add("--steps", nargs="+", type=int, default=[500, 2000, 5000])
    add("--seeds", nargs="+", type=int, default=[1])
    add("--train_frames", type=int, default=50)
    add("--others", default=",".join(RMD17), help="molecules of rMD17; that of training is not")
    add("--test_frames", type=int, default=n.test, help="of the target")
    add("--others_frames", type=int, default=n.others, help="of each of the others")
    add("--compressed_frames", type=int, default=n.compressed)
    add("--md_ps", type=float, default=lengths.langevin_ps, help="0: no dynamics")
    add("--md_seeds", type=int, default=lengths.seeds)
    add("--md_temperatures", nargs="+", type=float, default=lengths.temperatures)
    add("--nve_ps", type=float, default=lengths.nve_ps)
    add("--data_dir", type=Path, help="folder with the data sets; downloaded if not given")
    add("--out", type=Path, default=Path("results/transfer"))
    add("--dry_run", action="store_true", help="show what would be run")
    args, rest = parser.parse_known_args(argv)
    extra = protocol.flags(rest)
    for flag, ours in OURS.items():
        if flag in extra:
            raise ConfigError(f"--{flag} is said by {ours} here, which takes several values")
    systems = [plan.TRAINING_SETS[name] for name in args.train]
    plan.needed(systems, args.others)  # a wrong name is told before anything is run
    folder = args.out / plan.called(args.foundation_model)
    return Options(
        runs=[
            run
            for steps in args.steps
            for seed in args.seeds
            for run in plan.make(
                methods.select(args.methods),
                *(systems, args.rates, steps, seed, args.train_frames),
                *(args.foundation_model, extra, folder),
            )
        ],
        systems=systems,
        foundation_model=args.foundation_model,
        others=args.others,
        numbers=plan.Numbers(args.test_frames, args.others_frames, args.compressed_frames),
        lengths=Lengths(tuple(args.md_temperatures), args.md_seeds, args.md_ps, args.nve_ps),
        out=args.out,
        data_dir=args.data_dir,
        dry_run=args.dry_run,
    )


def carry_out(options: Options, prepare: Prepare) -> list[str]:
    """Train and evaluate what is not finished, then simulate with the best rates; what failed."""
    for system in plan.needed(options.systems, options.others):
        prepare(system, options.data_dir, options.out / "data")
    failed, done = [], []
    for i, run in enumerate(options.runs):
        where = f"[{i + 1}/{len(options.runs)}] {run.label}"
        print(f"{where} ...", flush=True)
        plan.write_start(run, options.foundation_model)
        try:
            result, _ = runs.execute(run)
        except runs.RunFailed as error:
            failed.append(f"{run.label}: {error}")
            print(f"error: {failed[-1]}", flush=True)
            continue
        found = assess.errors(run, result, options.others, options.numbers)
        done.append((run, found))
        forces, energy = (found["target"][what] for what in ("forces", "energy"))
        print(f"{where}: target {forces:.1f} meV/Å, {energy:.2f} meV/atom", flush=True)
        table.write(options.out)
    if options.lengths.langevin_ps:
        simulate(options, done)
    table.write(options.out)
    return failed


def simulate(options: Options, done: list[tuple[plan.TransferRun, assess.Found]]) -> None:
    """Dynamics with the models of the best learning rates, the rest would not be shown."""
    best = table.best_rates([found for _, found in done])
    for run, found in done:
        if any(found is b for b in best):
            print(f"dynamics: {run.label} ...", flush=True)
            assess.dynamics(run, options.others, options.numbers, options.lengths)
