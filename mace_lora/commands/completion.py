"""Print what makes a shell complete flags, their values and files of both commands.

Put one of the lines below into ~/.bashrc or ~/.zshrc (there, after compinit). Where starting Python
is slow, write the output to a file once, and let the shell read that.
"""

from __future__ import annotations

import argparse
from typing import cast

import shtab

from mace_lora import commands
from mace_lora.parsing import ExistingFile
from mace_lora.printing import Data
from mace_lora.training.arguments import build_parser as train

EXAMPLES = """\
  eval "$(mace_lora completion bash)"
  eval "$(mace_lora completion zsh)"
"""

_FILES = ("_file", "_dir", "_start", "config", "foundation_model", "output", "picture", "path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"])


def run(options: argparse.Namespace) -> Data:
    parsers = [_with_files(train()), _all_commands()]
    scripts = [shtab.complete(parser, options.shell) for parser in parsers]
    return {"shell": options.shell, "script": "\n".join(scripts)}


def text(data: Data) -> str:
    script: str = data["script"]
    return script


def _all_commands() -> argparse.ArgumentParser:
    """`mace_lora` with its commands in one parser, as shtab needs them."""

    def parser_of(prog: str) -> argparse.ArgumentParser:
        name = prog.split()[-1]
        return _with_files(train() if name == "train" else commands.build_parser(name))

    parser = argparse.ArgumentParser(prog="mace_lora")
    parser.add_argument("--version", action="version", version="")
    # argparse wants a class to make the parsers with, and calls it as any function
    chosen = parser.add_subparsers(parser_class=cast("type[argparse.ArgumentParser]", parser_of))
    for name, what in {"train": commands.TRAIN, **commands.COMMANDS}.items():
        chosen.add_parser(name, help=what)
    return parser


def _with_files(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Offer files where a flag takes one: by an attribute that shtab looks for."""
    for action in parser._actions:
        is_file = isinstance(action.type, type) and issubclass(action.type, ExistingFile)
        if is_file or action.dest.endswith(_FILES):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser
