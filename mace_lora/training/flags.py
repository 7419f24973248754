"""Flags that mace-torch answers with a traceback, or takes and does something else."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping

from mace_lora.errors import ConfigError
from mace_lora.upstream import names as upstream

# Entries of a head's table that mace-torch reads from a text
_AS_TEXT = ("E0s", "atomic_numbers", "config_type_weights")


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for flags that this run can't have."""
    _check_loss(args)
    if args.multiheads_finetuning and args.pt_train_file and args.E0s == "average":
        raise ConfigError(
            "--E0s=average and --multiheads_finetuning=True: mace-torch takes no average E0s for "
            "replay; give --E0s=estimated, or E0s of isolated atoms"
        )


def _check_loss(args: argparse.Namespace) -> None:
    if not args.compute_forces:
        raise ConfigError(
            "--compute_forces=False: every loss of mace-torch compares forces, so that it can't "
            "train without; to train on energies alone leave the flag out and give "
            "--forces_weight=0"
        )
    if args.loss == "dipole":
        raise ConfigError(
            "--loss=dipole is for models of dipoles alone, which can't be adapted by this command"
        )
    if args.loss == "dipole_polar":
        raise ConfigError(
            "--loss=dipole_polar is for models of dipoles and polarizabilities, which can't be "
            "adapted by this command"
        )
    if args.loss == "energy_forces_dipole" and args.model != "PolarMACE":
        raise ConfigError(
            f"--loss=energy_forces_dipole needs a model that predicts dipoles, --model=PolarMACE, "
            f"found --model={args.model}; --loss=weighted trains energies and forces"
        )
    if args.loss == "forces_only" and args.swa:
        raise ConfigError(
            "--loss=forces_only and --swa: stage two gives energies a larger weight, and there is "
            "none to give; leave out --swa"
        )


def check_heads(args: argparse.Namespace) -> None:
    """Bring `--heads` into the form that mace-torch reads: a text, with some texts inside.

    Raises:
        ConfigError: it is no table of tables.
    """
    if args.heads is None:
        return
    try:
        table = ast.literal_eval(args.heads) if isinstance(args.heads, str) else args.heads
    except (ValueError, TypeError, SyntaxError):
        table = None
    if not isinstance(table, Mapping) or not table or not all(map(_is_table, table.values())):
        raise ConfigError(
            f"--heads={args.heads}: a table of tables is needed, such as "
            "\"{'one': {'train_file': 'one.xyz', 'E0s': 'estimated'}}\""
        )
    args.heads = repr({str(name): _in_texts(head) for name, head in table.items()})


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _in_texts(head: Mapping[str, object]) -> dict[str, object]:
    """The table of a head; YAML gives E0s as a table in it, where mace-torch reads a text."""
    return {
        key: repr(value) if key in _AS_TEXT and isinstance(value, (dict, list)) else value
        for key, value in head.items()
    }


def replay_data(name: str, args: argparse.Namespace, head_config_pt: object, tag: str) -> object:
    """mace-torch's frames for replay, which it downloads unless they are in its cache.

    Raises:
        ConfigError: it can't get them.
    """
    try:
        return upstream.original("replay_data")(name, args, head_config_pt, tag)
    except RuntimeError as error:
        cause = error.__cause__ or error
        raise ConfigError(
            f"--pt_train_file={name} names a data set that mace-torch downloads, and it could not "
            f"({type(cause).__name__}: {cause}). Without a network, give a file of frames that "
            "the foundation model was trained on: --pt_train_file=replay.xyz, or train without "
            "replay: --multiheads_finetuning=False"
        ) from error
