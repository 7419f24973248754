"""Flags that mace-torch answers with a traceback: said in words, with what to give instead."""

from __future__ import annotations

import argparse
import ast

import pytest
import torch
from helpers.running import here, results, same_weights, short_run

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


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--trust"], "--trust has no effect with --foundation_model=mini"),
        (["--lbfgs", "--warmup_steps=3"], "--warmup_steps has no effect with --lbfgs"),
        (["--lbfgs", "--schedule=cosine"], "--schedule has no effect with --lbfgs"),
        (["--lbfgs", "--lora_dropout=0.1"], "--lora_dropout has no effect with --lbfgs"),
    ],
)
def test_our_flags_that_would_do_nothing(tmp_path, small_data, more, expected):
    assert expected in here(tmp_path, *short_run(small_data, "mini", *more))
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(ConfigError, match=r"--device=mps: torch .*--device=cpu or cuda"):
        check_device("mps")
    with pytest.raises(ConfigError, match=r"--device=gpu: no kind of device"):
        check_device("gpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"single precision alone: give --default_dtype=float32"):
        check_device("mps", "float64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device=cuda: torch finds no CUDA device"):
        MaceLoraCalculator(base=base, device="cuda")


def test_replay_data_that_can_not_be_downloaded(foundation, tmp_path, small_data, monkeypatch):
    """As on a node of a cluster without a network; the cache is empty."""
    from mace.tools import multihead_tools

    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(multihead_tools.urllib.request, "urlretrieve", no_network)
    monkeypatch.setattr(multihead_tools, "get_cache_dir", lambda: str(tmp_path / "cache"))
    given = [f"--foundation_model={foundation}", "--multiheads_finetuning=True"]
    given += [f"--{part}_file={small_data[part]}" for part in ("train", "valid")]
    error = here(tmp_path, "--name=run", "--lora=True", "--pt_train_file=mp", *given)
    assert "--pt_train_file=mp names a data set that mace-torch downloads" in error
    assert "Name or service not known" in error
    assert "--pt_train_file=replay.xyz" in error
    missing = here(tmp_path, "--name=run", "--lora=True", "--pt_train_file=my.xyz", *given)
    assert "--pt_train_file=my.xyz: there is no such file" in missing


@pytest.mark.parametrize("name", ["small", "medium_off"])
def test_a_named_model_that_can_not_be_downloaded(name, tmp_path, small_data, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlretrieve", no_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    files = [f"--{part}_file={small_data[part]}" for part in ("train", "valid")]
    error = here(tmp_path, "--name=run", "--lora=True", f"--foundation_model={name}", *files)
    assert f"--foundation_model={name}: mace-torch can't load it" in error
    assert "Name or service not known" in error
    assert "give the path" in error


def test_the_last_epoch_is_validated(foundation, tmp_path, small_data):
    """With --eval_interval=5 and 3 epochs mace-torch gives the weights of the first one."""
    given = [f"--foundation_model={foundation}", "--lora=True", "--batch_size=5", "--lr=0.01"]
    given += [f"--{part}_file={small_data[part]}" for part in ("train", "valid")]
    given += ["--name=run", "--seed=1", "--max_num_epochs=3", "--error_table=PerAtomMAE"]
    folders = [tmp_path / "every", tmp_path / "fifth"]
    for folder, interval in zip(folders, (1, 5), strict=True):
        assert here(folder, *given, f"--eval_interval={interval}") == ""
    losses = [[r["loss"] for r in results(f) if r["mode"] == "eval"] for f in folders]
    assert losses[1] == [losses[0][0], losses[0][1], losses[0][3]]
    assert losses[0][3] == min(losses[0])
    assert same_weights(folders[0] / "run.model", folders[1] / "run.model")
