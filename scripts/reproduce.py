"""Reproduce the tables of the fine-tuning papers: data, protocol, runs, evaluation, table, plots.

    scripts/reproduce.sh rmd17 aspirin --adapter=mmea
    scripts/reproduce.sh acac --adapter=full,lora,elora,dora --foundation_model=medium_off
    scripts/reproduce.sh all --adapter=all --device=cuda
    scripts/reproduce.sh study                # small-model study with `mini`, on a laptop
    scripts/reproduce.sh transfer --help      # methods away from their training frames

Every run is the real command in a folder of its own, --out/runs/<data set>/<molecule>/<run>, with
the configuration that made it (config.yaml), its log (output.txt), the merged model, predictions,
parity plot and result.json. --out/table.md and table.json cover all finished runs under --out.

Give the same command again after an interruption: finished runs are not repeated, an unfinished
one goes on from its last checkpoint. Any other flag (--lr=0.01, --device=cuda, --lora_rank=16) is
passed to mace_run_train and becomes part of the run's name; options of one adapter reach its runs
alone.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fetch_data import prepare
from reproduction import datasets, plots, protocol, runs, tables
from reproduction.transfer import command as transfer

from mace_lora.errors import ConfigError, MaceLoraError

# The molecules of the study: what its budget allows
STUDY = (("rmd17", ["aspirin", "ethanol"]), ("acac", []), ("3bpa", []))


@dataclass(frozen=True)
class Plan:
    """The runs that a command line asks for, and where their results go."""

    runs: list[runs.Run]
    out: Path


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Our options, and those for `mace_run_train`.

    Raises:
        ConfigError: something that is neither.
    """
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce.sh",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("target", choices=[*datasets.SYSTEMS, "all", "study"])
    add("molecules", nargs="*", help="of rmd17; all of them if none is named")
    known = ", ".join(protocol.methods())
    add("--adapter", metavar="NAMES", help=f"comma-separated, or all: {known}")
    add("--foundation_model", help="medium_off (default), any name of mace-torch's, a path, mini")
    add("--data_dir", type=Path, help="folder with the data sets; downloaded if not given")
    add("--out", type=Path, default=Path("results/reproduction"))
    add("--config", type=Path, help="protocol; default configs/<data set>.yaml")
    add("--seeds", type=int, nargs="+", help="default: the seed of the protocol")
    add("--train_frames", type=int, nargs="+", help="default: those of the protocol")
    add("--test_frames", type=int, help="evaluate so many of each test set, not all")
    add("--steps", type=int, help="optimiser steps, instead of the protocol's epochs")
    add("--only", default="", help="only runs with this text in their path")
    add("--dry_run", action="store_true", help="show what would be run")
    args, rest = parser.parse_known_args(argv)
    extra = protocol.flags(rest)
    if args.target == "study":
        args.foundation_model = args.foundation_model or "mini"
        args.config = args.config or protocol.CONFIGS / "study.yaml"
        args.adapter = args.adapter or "all"
        args.steps = args.steps or 500
    if args.adapter is None:
        raise ConfigError(f"name what to run with --adapter=NAMES; known: all, {known}")
    args.foundation_model = args.foundation_model or "medium_off"
    return args, extra


def plan(args: argparse.Namespace, extra: dict[str, Any]) -> Plan:
    """Data prepared, and every run with its settings; method by method, so that a table is soon
    complete for the first ones.
    """
    groups = STUDY if args.target == "study" else ((args.target, args.molecules),)
    systems = [s for dataset, names in groups for s in datasets.select(dataset, names)]
    found = []
    for method in protocol.select(args.adapter, study=args.target == "study"):
        for seed in args.seeds or [None]:
            for system in systems:
                for n_train in args.train_frames or [system.n_train]:
                    run = _run(args, extra, system, method, seed, n_train)
                    if args.only in str(run.folder):
                        found.append(run)
    if not found:
        raise ConfigError(f"--only={args.only}: no run has this in its path")
    return Plan(found, args.out)


def _run(
    args: argparse.Namespace,
    extra: dict[str, Any],
    system: datasets.System,
    method: protocol.Method,
    seed: int | None,
    n_train: int,
) -> runs.Run:
    settings = protocol.settings(args.config, system, method, args.foundation_model, extra)
    if args.steps is not None:
        given_wins = {k: v for k, v in extra.items() if k in settings}
        settings = protocol.fit_budget(settings, n_train, args.steps) | given_wins
    seed = int(settings.pop("seed", 123)) if seed is None else seed
    settings.pop("seed", None)
    given = [
        f"{k}={v}" for k, v in extra.items() if k in settings and k not in protocol.NOT_IN_NAMES
    ]
    name = "-".join([method.name, *given, f"n{n_train}", f"seed{seed}"]).replace("/", "_")
    folder = args.out / "runs" / system.dataset / system.name / name
    data = args.out / "data" / system.dataset / system.name
    return runs.Run(system, method, seed, n_train, settings, folder, data, args.test_frames)


def carry_out(plan: Plan, data_dir: Path | None) -> list[str]:
    """Run what is not finished, the table and the plots after each; what failed, a line each."""
    for system in dict.fromkeys(run.system for run in plan.runs):
        prepare(system, data_dir, plan.out / "data")
    failed = []
    for i, run in enumerate(plan.runs):
        where = f"[{i + 1}/{len(plan.runs)}] {run.label}"
        print(f"{where} ...", flush=True)
        try:
            result, new = runs.execute(run)
        except runs.RunFailed as error:
            failed.append(f"{run.label}: {error}")
            print(f"error: {failed[-1]}", flush=True)
            continue
        print(f"{where}: {summary(result)}{'' if new else ' (was finished)'}", flush=True)
        if new:
            plots.parity(result, run.folder)
            tables.write(plan.out)
    table = tables.write(plan.out)
    plots.learning_curves(tables.results(plan.out), plan.out)
    plots.error_against_frames(table, plan.out)
    return failed


def summary(result: tables.Row) -> str:
    """`MD: energy 12.3 meV, forces 45.6 meV/A (MAE)` for each test set."""
    measure = protocol.MEASURE[result["dataset"]]
    stage = list(result["errors"])[-1]
    texts = []
    for test, errors in result["errors"][stage].items():
        energy, forces = (errors[f"{what}_{measure}"] for what in ("energy", "forces"))
        texts.append(f"{test}: energy {energy:.1f} meV, forces {forces:.1f} meV/Å")
    return f"{'; '.join(texts)} ({measure.upper()})"


def stop(*_: object) -> None:
    """A signal between two runs: nothing is lost."""
    sys.exit(runs.REQUEUE)


def run_tables() -> tuple[Path | None, list[str]]:
    """The folder of the results (None if there are none to come), and what failed."""
    args, extra = parse()
    planned = plan(args, extra)
    if args.dry_run:
        print("\n".join(str(run.folder) for run in planned.runs))
        return None, []
    return planned.out, carry_out(planned, args.data_dir)


def run_transfer() -> tuple[Path | None, list[str]]:
    """As `run_tables`, for the comparison of methods away from their training frames."""
    options = transfer.parse(sys.argv[2:])
    if options.dry_run:
        print("\n".join(str(run.folder) for run in options.runs))
        return None, []
    return options.out, transfer.carry_out(options, prepare)


def main() -> None:
    warnings.filterwarnings("ignore", message="The TorchScript type system")  # e3nn, every model
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, stop)
    try:
        out, failed = run_transfer() if sys.argv[1:2] == ["transfer"] else run_tables()
    except runs.Interrupted as message:
        print(f"{message}; give the same command again to continue")
        sys.exit(runs.REQUEUE)
    except KeyboardInterrupt:
        print("stopped; give the same command again to continue")
        sys.exit(130)
    except MaceLoraError as error:
        sys.exit(f"error: {error}")
    if out is None:
        return
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"Table and runs are in {out}")
    if failed:
        sys.exit("error: failed, and tried again by the same command:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
