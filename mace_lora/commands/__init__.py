"""The commands of `mace_lora` for living with adapters, one file each.

A command is a module with a docstring (its help), `EXAMPLES`, `add_arguments(parser)`,
`run(options)`, which does the work and returns plain data, and `text(data)`, which puts it in
words. Exit codes: 0 done, 1 refused or failed (the reason is on stderr), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from collections.abc import Sequence

from mace_lora.printing import say

# name -> what it does, in a line
COMMANDS = {
    "info": "what a model, a checkpoint or an adapter directory holds",
    "merge": "base model + adapter -> a plain MACE model",
    "unmerge": "merged model - adapter -> the model that the run started from",
    "extract": "the best low-rank adapter of a fully fine-tuned model",
    "eval": "errors on labelled frames, several adapters side by side",
}
_EXIT_CODES = "exit codes: 0 done; 1 refused or failed, with the reason on stderr; 2 wrong usage"


def run(name: str, argv: Sequence[str]) -> int:
    """Run the command `name`; its exit code.

    Raises:
        MaceLoraError: with the reason why it can't be done.
    """
    module = importlib.import_module(f"mace_lora.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"mace_lora {name}",
        description=module.__doc__,
        epilog=f"examples:\n{module.EXAMPLES}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.ERROR)  # mace-torch speaks of its loading
    data = module.run(options)
    say(json.dumps(data, indent=2) if options.json else module.text(data))
    return 0
