"""The commands `mace_run_train` and `mace_lora`.

Whatever can be said of a command line without torch is said before torch is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mace_lora
from mace_lora import commands
from mace_lora.commands import COMMANDS, TRAIN
from mace_lora.errors import Diverged, MaceLoraError, did_you_mean
from mace_lora.printing import ignore_warnings, printable, say
from mace_lora.training.arguments import build_parser, check_files, parse

__all__ = ["build_parser", "main", "main_tools", "parse"]


@contextmanager
def _door() -> Iterator[None]:
    """Errors for people leave as a line on stderr and exit code 1, without a traceback."""
    ignore_warnings()
    printable()
    _share_cores()
    try:
        try:
            yield
        finally:
            say("", end="")  # argparse prints help without looking whether anybody reads it
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except MaceLoraError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # what shells take for Ctrl-C


def _share_cores() -> None:
    """Threads that wait for each other give their core up soon, as OpenMP has it where it knows of
    more threads than cores. It can't know of other programs: beside one of them that keeps a core
    busy, steps take up to a hundred times as long. Heard only before torch is imported.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def main(argv: Sequence[str] | None = None) -> None:
    """`mace_run_train`: upstream's command, with adapters."""
    with _door():
        args, config, options = parse(argv)
        check_files(args)
        from mace_lora.training.run import run  # imports torch and mace

        run(args, config, options)


def main_tools(argv: Sequence[str] | None = None) -> None:
    """`mace_lora COMMAND`, also `python -m mace_lora COMMAND`."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "train":
        return main(rest)
    with _door():
        if command in ("-h", "--help"):
            say(_usage())
        elif command == "--version":
            say(f"mace-lora {mace_lora.__version__}")
        elif command in COMMANDS:
            sys.exit(commands.run(command, rest))
        else:
            known = did_you_mean(command, ["train", *COMMANDS])
            print(f"error: unknown command {command!r}; {known}", file=sys.stderr)
            sys.exit(2)


def _usage() -> str:
    listed = {"train": TRAIN, **COMMANDS}
    width = max(map(len, listed)) + 2
    lines = [f"  {name:<{width}}{what}" for name, what in listed.items()]
    return "\n".join(
        [
            "usage: mace_lora COMMAND ...",
            "       mace_lora --version",
            "",
            "commands:",
            *lines,
            "",
            "mace_lora COMMAND --help says more, with examples",
        ]
    )
