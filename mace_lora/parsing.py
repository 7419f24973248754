"""Reading a command line: help for a mistyped flag, files that must be there, flags in groups.

Nothing here, nor in what the doors import before a command line is understood, imports torch.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from mace_lora.errors import ArtefactError, ConfigError, closest


class ExistingFile(str):
    """The type of a flag that names something to read; `check_named` looks whether it is there."""

    def check(self, called: str) -> None:
        """Raises an error that calls it `called`, such as --data=test.xyz, where it is missing."""
        path = Path(self).expanduser()
        if not path.exists():
            beside = [p.name for p in itertools.islice(path.parent.glob("*"), 1000)]
            hint = closest(path.name, beside)
            raise ConfigError(f"{called}: there is no such file. {hint}".rstrip(" ."))


class ExistingAdapter(ExistingFile):
    """An adapter: a directory, a .zip file of one, or a repository, `hf://owner/name`."""

    def check(self, called: str) -> None:
        if not self.startswith("hf://") and not Path(self).expanduser().exists():
            raise ArtefactError(
                f"{called}: there is no such directory; an adapter is a directory with "
                "adapter_config.json in it"
            )


def check_named(options: argparse.Namespace) -> None:
    """Look for every file that the flags name, before any work begins.

    Raises:
        MaceLoraError: one is not there.
    """
    for name, value in vars(options).items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ExistingFile):
                item.check(f"--{name}={item}")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, raises: bool = False
) -> argparse.Namespace:
    """The flags of `argv`; a mistyped one ends the program with exit code 2, and a suggestion.

    Raises:
        ConfigError: instead of that, if it `raises`.
    """
    if raises:
        setattr(parser, "error", _raise)  # noqa: B010  # a method, to mypy
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = all_flags(parser)
    # before argparse, which would rather say that the flag that was meant is missing
    words = [word.split("=")[0] for word in itertools.takewhile("--".__ne__, argv)]
    _refuse(
        parser, [w for w in words if w.startswith("--") and not any(f.startswith(w) for f in flags)]
    )
    _suggest_choices(parser)
    options, unknown = parser.parse_known_args(argv)
    _refuse(parser, unknown)  # among them keys of a configuration file
    return options


def _raise(message: str) -> NoReturn:
    raise ConfigError(message.removeprefix("argument "))


def _refuse(parser: argparse.ArgumentParser, unknown: list[str]) -> None:
    if unknown:
        flags = [word.split("=")[0] for word in unknown if word.startswith("--")]
        hints = [closest(flag, all_flags(parser)) for flag in flags]
        parser.error(" ".join([f"unrecognized arguments: {' '.join(unknown)}.", *hints]).rstrip())


# argparse can't say in public which flags a parser has, nor move them from one group to another.
# The names with underscores below are private, and the same since Python 2.7.


def _suggest_choices(parser: argparse.ArgumentParser) -> None:
    """Let the error for a value that is none of a flag's choices say which one is close."""
    check = parser._check_value

    def check_value(action: argparse.Action, value: object) -> None:
        try:
            check(action, value)
        except argparse.ArgumentError as error:
            hint = closest(str(value), map(str, action.choices or ()))
            error.message = f"{error.message}. {hint}".rstrip()
            raise

    setattr(parser, "_check_value", check_value)  # noqa: B010  # a method, to mypy


def all_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Every flag of the parser, as it is written: --name."""
    return [flag for action in parser._actions for flag in action.option_strings]


def let_have_value(parser: argparse.ArgumentParser, name: str, kind: Callable[[str], bool]) -> None:
    """Let a switch be given as --name=False, too."""
    switch = next(action for action in parser._actions if action.dest == name)
    # in place: configargparse keeps notes of its own on each
    switch.__class__ = argparse._StoreAction
    switch.nargs, switch.const, switch.type = "?", True, kind


def as_flags(parser: argparse.ArgumentParser, values: Mapping[str, object]) -> list[str]:
    """`values` by the names of flags as a command line; None stands for a flag that is not given.

    Raises:
        ConfigError: there is no such flag, or it is a switch that can't be given this value.
    """
    by_name = {action.dest: action for action in parser._actions if action.option_strings}
    words: list[str] = []
    for name, value in values.items():
        if name not in by_name:
            raise ConfigError(f"there is no option {name!r}. {closest(name, by_name)}".rstrip())
        action = by_name[name]
        flag = action.option_strings[-1]
        if value is None:
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ConfigError(f"{name}={value!r}: True or False is needed")
            if value == action.const:
                words.append(flag)
            elif str(value) != str(action.default):
                raise ConfigError(f"{name}={value}: mace-torch has no flag that says so")
        elif isinstance(value, (list, tuple)) and action.nargs not in (None, "?"):
            words += [flag, *map(_word, value)]
        else:
            words.append(f"{flag}={_word(value)}")
    return words


def _word(value: object) -> str:
    """A value as the command line has it; torch's and numpy's as plain ones."""
    if isinstance(value, (dict, list, tuple)):
        return str(_plain(value))
    return str(_plain(value)).removeprefix("torch.")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def move_flags(
    parser: argparse.ArgumentParser, names: Sequence[str], group: argparse._ArgumentGroup
) -> None:
    """Show the flags called `names` in `group`, in this order; nothing but --help changes."""
    by_name = {action.dest: action for action in parser._actions}
    for name in names:
        for other in parser._action_groups:
            if by_name[name] in other._group_actions:
                other._group_actions.remove(by_name[name])
        group._group_actions.append(by_name[name])


def order_groups(
    parser: argparse.ArgumentParser, first: Sequence[argparse._ArgumentGroup], rest: str
) -> None:
    """Show the groups `first` before all others; the flags in no group are headed `rest`."""
    others = [group for group in parser._action_groups if group not in first]
    parser._optionals.title = rest
    parser._action_groups[:] = [*first, *others]
