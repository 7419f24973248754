"""Flags that mace-torch answers with a traceback: said in words, with what to give instead."""

from __future__ import annotations

import argparse
import ast

import pytest
import torch

from mace_lora import MaceLoraCalculator
from mace_lora.errors import ConfigError
from mace_lora.training import flags
from mace_lora.upstream.devices import check_device
from mace_lora.upstream.known import build_parser


def arguments(*given: str) -> argparse.Namespace:
    return build_parser().parse_args(["--name=run", *given])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--compute_forces=False"], "leave the flag out and give --forces_weight=0"),
        (["--loss=energy_forces_dipole"], "--model=PolarMACE, found --model=MACE"),
        (["--loss=dipole"], "models of dipoles alone"),
        (["--loss=dipole_polar"], "models of dipoles and polarizabilities"),
        (["--loss=forces_only", "--swa"], "leave out --swa"),
        (
            ["--multiheads_finetuning=True", "--pt_train_file=mp", "--E0s=average"],
            "give --E0s=estimated",
        ),
    ],
)
def test_what_no_run_can_have(given, expected):
    with pytest.raises(ConfigError) as error:
        flags.check(arguments(*given))
    assert given[0].partition("=")[0] in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--loss=energy_forces_dipole", "--model=PolarMACE"],
        ["--error_table=DipoleRMSE"],
        ["--loss=forces_only"],
        ["--E0s=average"],
    ],
)
def test_what_a_run_can_have(given):
    flags.check(arguments(*given))


def test_tables_inside_the_table_of_heads():
    """A YAML file gives E0s as a table, where mace-torch calls a method of a text."""
    energies = {1: -13.6, 6: -1027.0}
    args = arguments()
    args.heads = {"a": {"E0s": energies, "atomic_numbers": [1, 6], "train_file": ["x", "y"]}}
    flags.check_heads(args)
    head = ast.literal_eval(args.heads)["a"]
    assert ast.literal_eval(head["E0s"]) == energies
    assert head["atomic_numbers"] == "[1, 6]"
    assert head["train_file"] == ["x", "y"]
    args.heads = "['a']"
    with pytest.raises(ConfigError, match="a table of tables is needed"):
        flags.check_heads(args)


def test_devices_that_are_not_there(base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    check_device("cpu", "float64")
    check_device("cuda:0", "float64")
    with pytest.raises(ConfigError, match=r"--device=cuda:1: torch finds 1 such devices"):
        check_device("cuda:1")
    with pytest.raises(ConfigError, match=r"--device=mps: no MPS .*--device=cpu or cuda"):
        check_device("mps")
    with pytest.raises(ConfigError, match=r"--device=gpu: no kind of device"):
        check_device("gpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"single precision alone: give --default_dtype=float32"):
        check_device("mps", "float64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device=cuda: torch finds no CUDA device"):
        MaceLoraCalculator(base=base, device="cuda")
