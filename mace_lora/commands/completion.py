"""Print what makes a shell complete flags, their values and files of both commands.

Put one of the lines below into ~/.bashrc or ~/.zshrc (there, after compinit). Where starting Python
is slow, write the output to a file once, and let the shell read that.
"""

from __future__ import annotations

import argparse

import shtab

from mace_lora import commands
from mace_lora.parsing import ExistingFile
from mace_lora.printing import Data
from mace_lora.training import arguments

EXAMPLES = """\
  eval "$(mace_lora completion bash)"
  eval "$(mace_lora completion zsh)"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"])


def run(options: argparse.Namespace) -> Data:
    parsers = [arguments.build_parser(), _all_commands()]
    for parser in parsers:
        _complete_files(parser)
    scripts = [shtab.complete(parser, options.shell) for parser in parsers]
    return {"shell": options.shell, "script": "\n".join(scripts)}


def text(data: Data) -> str:
    script: str = data["script"]
    return script


def _all_commands() -> argparse.ArgumentParser:
    """`mace_lora` with its commands in one parser."""
    parser = argparse.ArgumentParser(prog="mace_lora")
    parser.add_argument("--version", action="version", version="")
    chosen = parser.add_subparsers()
    for name, what in commands.COMMANDS.items():
        parent = commands.build_parser(name, add_help=False)
        _complete_files(chosen.add_parser(name, help=what, parents=[parent]))
    return parser


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Offer files where a flag takes one: an attribute that shtab looks for."""
    for action in parser._actions:
        is_file = action.type in ExistingFile.__subclasses__() or action.type is ExistingFile
        if is_file or action.dest.endswith(("_file", "_dir", "foundation_model", "config")):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
