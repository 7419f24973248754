"""Mistyped flags, files that must be there, and flags in groups."""

from __future__ import annotations

import argparse

import pytest

from mace_lora import parsing
from mace_lora.errors import ArtefactError, ConfigError
from mace_lora.parsing import ExistingAdapter, ExistingFile


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="program")
    parser.add_argument("--base", required=True)
    parser.add_argument("--alpha", type=float)
    parser.add_argument("--data", nargs="+", type=ExistingFile, default=[])
    parser.add_argument("--adapter", type=ExistingAdapter)
    return parser


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bsae", "mini"], "unrecognized arguments: --bsae. Did you mean '--base'?"),
        (
            ["--base", "mini", "--alhpa=2"],
            "unrecognized arguments: --alhpa. Did you mean '--alpha'?",
        ),
        (["--base", "mini", "--xyzzy"], "unrecognized arguments: --xyzzy."),
        (["--base", "mini", "more"], "unrecognized arguments: more."),
    ],
)
def test_what_is_no_flag(parser, words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsing.parse(parser, words)
    assert capsys.readouterr().err.splitlines()[-1] == f"program: error: {said}"


def test_abbreviations_and_values_that_look_like_flags(parser):
    options = parsing.parse(parser, ["--ba=--alhpa", "--alph", "-2"])
    assert (options.base, options.alpha) == ("--alhpa", -2)


def test_files_that_must_be_there(parser, tmp_path):
    there = tmp_path / "a.xyz"
    there.touch()
    read = ["--base=mini", f"--data={there}"]
    parsing.check_named(parsing.parse(parser, [*read, f"--adapter={tmp_path}"]))
    with pytest.raises(ConfigError, match=r"--data=no.xyz: there is no such file"):
        parsing.check_named(parsing.parse(parser, ["--base=mini", "--data", str(there), "no.xyz"]))
    with pytest.raises(ArtefactError, match="--adapter=no: there is no such directory"):
        parsing.check_named(parsing.parse(parser, [*read, "--adapter=no"]))


def test_groups(parser):
    first = parser.add_argument_group("first")
    parsing.move_flags(parser, ["data", "base"], first)
    parsing.order_groups(parser, [first], rest="rest")
    words = parser.format_help().partition("\n\n")[2].split()
    order = [words.index(word) for word in ("first:", "--data", "--base", "rest:", "--alpha")]
    assert order == sorted(order)
    assert words.count("--base") == 1
    assert parsing.parse(parser, ["--base=x", "--alpha=2"]).alpha == 2
