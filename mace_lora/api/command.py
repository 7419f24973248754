"""The command `mace_run_train` as a function."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mace_lora import parsing
from mace_lora.api.result import Result
from mace_lora.errors import ConfigError, MaceLoraError, Stopped
from mace_lora.training import surroundings
from mace_lora.training.arguments import build_parser, check_files, parse
from mace_lora.training.epochs.signals import EXIT_CODE, INTERRUPTED
from mace_lora.training.record import Run
from mace_lora.training.run import run


def train(flags: Sequence[str] | Mapping[str, object]) -> Result | None:
    """Train, as `mace_run_train` does with these flags.

    What a run changes in its process (log, precision, random numbers, ...) is put back, so that it
    can be called again and again. Files go where the command writes them: to `work_dir`, by default
    the working folder.

    Args:
        flags: those of the command, as a list of words, `["--name=a", "--lora=True", ...]`, or by
            name, `{"name": "a", "lora": True, ...}`.

    Returns:
        Model, errors and files; None without an adapter, after a dry run, for a committee
        (`members=4`, whose runs are processes of their own), and in all processes but the first.

    Raises:
        MaceLoraError: as the command's messages; `Stopped` after SIGTERM or SIGUSR1.
        KeyboardInterrupt: after Ctrl-C; a checkpoint is written, where training had begun.
    """
    if isinstance(flags, str) or not isinstance(flags, (Mapping, Sequence)):
        raise ConfigError(
            f"flags are given as a list of words or by name, found {type(flags).__name__}: "
            'train({"name": "a", ...})'
        )
    by_name = isinstance(flags, Mapping)
    argv = parsing.as_flags(build_parser(), flags) if isinstance(flags, Mapping) else list(flags)
    again = "call train again with restart_latest=True" if by_name else ""
    record = call(argv, again)
    return Result.of(record) if record is not None and hasattr(record, "saved") else None


def call(argv: Sequence[str], again: str = "") -> Run | None:
    """Run the command in this process, and leave that as it was.

    Args:
        argv: its flags.
        again: how to go on after an interruption, for messages.

    Raises:
        MaceLoraError, KeyboardInterrupt: as `train`.
    """
    with surroundings.put_back(), _no_exit():
        args, config, options = parse([str(word) for word in argv], raises=True)
        check_files(args)
        return run(args, config, replace(options, again=again))
    return None  # after --help


@contextmanager
def _no_exit() -> Iterator[None]:
    """What would end a program comes out as an exception that programs catch."""
    try:
        yield
    except SystemExit as left:
        if left.code == INTERRUPTED:
            raise KeyboardInterrupt("the run was interrupted") from None
        if left.code == EXIT_CODE:
            raise Stopped("a signal has ended the run; its checkpoint is written") from None
        if left.code not in (None, 0):  # not after --help
            raise ConfigError(f"the command has ended with exit code {left.code}") from left


@contextmanager
def in_python(names: Mapping[str, str], paths: Mapping[Path, str]) -> Iterator[None]:
    """Errors speak of arguments in Python, not of flags.

    Args:
        names: argument by flag, where they differ.
        paths: what files are called that the caller doesn't know.
    """
    try:
        yield
    except MaceLoraError as error:
        text = str(error)
        for path, name in paths.items():
            for written in (f"--{name}={path}", os.fspath(path)):
                text = text.replace(written, name)
        error.args = (re.sub(r"--(\w+)", lambda m: names.get(m[1], m[1]), text),)
        raise
