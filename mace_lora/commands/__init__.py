"""The commands of `mace_lora` for living with adapters, one file each.

A command is a module with a docstring (its help), `EXAMPLES`, `add_arguments(parser)`,
`run(options)`, which does the work and returns plain data, and `text(data)`, which puts it in
words. What is heavy (torch, mace, ase, matplotlib) it imports where it works, not at its top, so
that its help and the complaint about a missing file come at once.

Exit codes: 0 done, 1 refused or failed (the reason is on stderr), or the result has `problems`,
2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from collections.abc import Sequence
from typing import Protocol, cast

from mace_lora import parsing
from mace_lora.printing import Data, say

# name -> what it does, in a line
COMMANDS = {
    "info": "what a model, a checkpoint or an adapter directory holds",
    "merge": "base model + adapter -> a plain MACE model",
    "unmerge": "merged model - adapter -> the model that the run started from",
    "extract": "the best low-rank adapter of a fully fine-tuned model",
    "eval": "errors on labelled frames, several adapters side by side",
    "check": "units, keys and oddities of labelled frames, before they are trained on",
    "tune": "which method, rank and learning rate suit your frames, by short runs",
    "trust": "whether a fine-tuned model holds away from its training frames",
    "select": "which frames of a pool to label next, by the spread of a committee",
    "md": "molecular dynamics with a model, and whether it is sound",
    "slurm": "where the batch scripts for SLURM are",
    "doctor": "what is installed, what works, what doesn't, in plain words",
    "completion": "flags and files at the press of Tab, in bash and zsh",
}
TRAIN = "fine-tune or train: the same program as mace_run_train"
_EXIT_CODES = "exit codes: 0 done; 1 refused or failed, with the reason on stderr; 2 wrong usage"


class Command(Protocol):
    """What a module of this folder offers."""

    __doc__: str | None
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> Data: ...

    def text(self, data: Data) -> str: ...


def command(name: str) -> Command:
    """The command called `name`."""
    return cast(Command, importlib.import_module(f"mace_lora.commands.{name}"))


def build_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    module = command(name)
    parser = argparse.ArgumentParser(
        prog=f"mace_lora {name}",
        description=module.__doc__,
        epilog=f"examples:\n{module.EXAMPLES}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def run(name: str, argv: Sequence[str]) -> int:
    """Run the command `name`; its exit code.

    Raises:
        MaceLoraError: with the reason why it can't be done.
    """
    module = command(name)
    options = parsing.parse(build_parser(name), argv)
    parsing.check_named(options)
    logging.getLogger().setLevel(logging.ERROR)  # mace-torch speaks of its loading
    data = module.run(options)
    say(json.dumps(data, indent=2) if options.json else module.text(data))
    return 1 if data.get("problems") else 0
