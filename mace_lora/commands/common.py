"""What several commands need: models from flags, files written whole, tables and bars."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mace_lora.errors import ConfigError
from mace_lora.files import whole_file
from mace_lora.upstream.known import TRUST_HELP

if TYPE_CHECKING:
    import torch

    from mace_lora.results.labelled import LabelledFrames

# Labels that tools can measure errors of, and what models read of frames beside atoms and cell
QUANTITIES = ("energy", "forces", "stress")
INPUTS = ("total_charge", "total_spin", "elec_temp", "head")

_INPUT_HELP = {
    "total_charge": "total charge, for models that read one",
    "total_spin": "spin multiplicity, for models that read one",
    "elec_temp": "electronic temperature, for models that read one",
    "head": "head that predicts a frame, for models of several",
}

BASE_HELP = (
    "the foundation model: mini, a name that mace-torch downloads (medium_off, ...), or a .model "
    "file"
)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The flag that has .model files run instead of read."""
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)


def load(
    path: str, flag: str, dtype: torch.dtype | None = None, trust: bool = False
) -> torch.nn.Module:
    """A model that a flag names."""
    from mace_lora.upstream import loading

    return loading.load(path, dtype=dtype, flag=flag, trust=trust)


def save(model: torch.nn.Module, path: str) -> None:
    """Write a model whole or not at all.

    Raises:
        ConfigError: the folder isn't there or can't be written to.
    """
    import torch

    try:
        with whole_file(path) as temporary:
            torch.save(model, temporary)
    except OSError as error:
        raise ConfigError(f"--output={path} can't be written: {error}") from None


def check_folder(path: str, flag: str) -> None:
    """Raises ConfigError where a file named by a flag can't be written, before any work."""
    if Path(path).is_dir():
        raise ConfigError(f"--{flag}={path} is a folder; the name of a file is needed")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"--{flag}={path}: there is no folder {Path(path).resolve().parent}")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags about labelled frames."""
    for quantity in QUANTITIES:
        key = f"REF_{quantity}"
        parser.add_argument(
            f"--{quantity}_key",
            default=key,
            help=f"name of the {quantity} in the files (default: {key}, or {quantity} where that "
            "is all a file has)",
        )
    for name in INPUTS:
        parser.add_argument(
            f"--{name}_key",
            default=name,
            help=f"name of the {_INPUT_HELP[name]} in the files (default: {name})",
        )
    parser.add_argument("--batch_size", type=int, default=16, help="frames at once (default: 16)")


def keys(options: argparse.Namespace) -> dict[str, str]:
    """The names of labels and inputs, as `add_data_arguments` gives them."""
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size={options.batch_size}: 1 or more is needed")
    return {name: getattr(options, f"{name}_key") for name in (*QUANTITIES, *INPUTS)}


def fit_to(frames: LabelledFrames, models: list[torch.nn.Module]) -> tuple[LabelledFrames, str]:
    """The frames that all `models` can predict, with what those read of them; a word on others.

    Raises:
        DataError: there are none, or something that a model reads is missing or makes no sense.
    """
    from mace_lora.model.description import atomic_numbers
    from mace_lora.results.labelled import known_to, with_inputs, without_stress_of_slabs
    from mace_lora.upstream.graphs import sees_cells
    from mace_lora.upstream.inputs import inputs_of

    frames, left_out = known_to(frames, [set(atomic_numbers(model)) for model in models])
    if any(sees_cells(model) for model in models):
        frames = without_stress_of_slabs(frames)
    inputs = {name: item for model in models for name, item in inputs_of(model).items()}
    return with_inputs(frames, inputs), left_out


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1, border: bool = True
) -> str:
    """A table in text, its first `left` columns flush left and the others flush right."""
    from prettytable import PrettyTable

    # PrettyTable wants different names, and doesn't mind spaces
    names = [name + " " * list(head)[:i].count(name) for i, name in enumerate(head)]
    made = PrettyTable(names, border=border)
    made.align = "r"
    for name in names[:left]:
        made.align[name] = "l"
    made.add_rows([list(row) for row in rows])
    text = str(made.get_string())
    return "\n".join(line.rstrip() for line in text.splitlines())


def bar(value: float, largest: float, width: int = 12) -> str:
    """`value` as a bar of blocks, `largest` as the full width; padded with spaces to it."""
    if not largest > 0:
        return " " * width
    eighths = round(8 * width * value / largest)
    parts: list[str] = ["", *"▏▎▍▌▋▊▉"]
    return ("█" * (eighths // 8) + parts[eighths % 8]).ljust(width)
