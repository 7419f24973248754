"""How to go on with a run that has stopped: command lines to copy."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from mace_lora.training.epochs import processes
from mace_lora.training.options import RunOptions

# What stands first in a command line, by the name of the file that was started
_PROGRAMS = {"mace_lora": "mace_lora train", "__main__.py": "python -m mace_lora train"}


def command(options: RunOptions, *more: str) -> str:
    """The command that started this run, with `more` flags."""
    if processes.launched():
        return f"the command that started it, with {' '.join(more)}"
    program = _PROGRAMS.get(Path(sys.argv[0]).name, "mace_run_train")
    anew = tuple(f"{flag.split('=')[0]}=" for flag in more)
    kept = [word for word in options.argv if word not in more and not word.startswith(anew)]
    return f"{program} {shlex.join([*kept, *more])}"


def flags_for_best(args: argparse.Namespace, epochs: int) -> list[str]:
    """Flags with which a run of which `epochs` are done only saves the best of them."""
    # the default of --start_swa depends on the number of epochs
    stage_two = [f"--start_swa={args.start_swa}"] if args.swa else []
    return ["--restart_latest", f"--max_num_epochs={epochs}", *stage_two]


def advice(args: argparse.Namespace, options: RunOptions, epochs: int) -> str:
    """How to go on after `epochs` that are done, and how to save the best of them."""
    if options.again:
        return f"To go on: {options.again}"
    text = f"To go on:\n  {command(options, '--restart_latest')}\n"
    if epochs == 0:
        return f"{text}No epoch is done yet, so that there is no best one to save"
    best = command(options, *flags_for_best(args, epochs))
    return f"{text}To save the best epoch so far as {args.name}.model:\n  {best}"
