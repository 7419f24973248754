"""What is read of mace-torch without importing it is what mace-torch says of itself."""

from __future__ import annotations

from mace.calculators.foundations_models import mace_mp_names, polar_model_names
from mace.tools import build_default_arg_parser

from mace_lora.upstream import known


def test_the_same_flags_with_the_same_defaults():
    ours, theirs = known.build_parser(), build_default_arg_parser()
    assert ours.format_help() == theirs.format_help()
    assert ours.parse_args(["--name=x"]) == theirs.parse_args(["--name=x"])


def test_the_same_models():
    missing = {*mace_mp_names, *polar_model_names} - {None, *known.foundation_models()}
    assert not missing
    assert {"small_off", "mace_omol", "medium-mpa-0", "polar-1-m"} <= {*known.foundation_models()}
