"""Say what a model, a checkpoint or an adapter directory holds.

For an adapter: its method and options, the base model it belongs to, and per layer the rank, the
number of trained parameters and the size of its change, as a bar. The sizes of the changes need the
base model, which is found where the adapter's run found it, or given with --base.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from mace_lora.commands import common
from mace_lora.errors import ConfigError
from mace_lora.printing import Data
from mace_lora.upstream.known import ExistingModel

EXAMPLES = """\
  mace_lora info mini
  mace_lora info ethanol.model
  mace_lora info ethanol_adapter --base mini
  mace_lora info checkpoints/ethanol_run-1_latest.pt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", help="an adapter directory, a .model file, a checkpoint (.pt), or mini"
    )
    parser.add_argument("--base", type=ExistingModel, help=f"for an adapter: {common.BASE_HELP}")
    common.add_trust(parser)


def run(options: argparse.Namespace) -> Data:
    path = Path(options.path)
    if not path.is_dir():
        if options.base is not None:
            raise ConfigError(f"--base goes with an adapter directory, and {path} is not one")
        ExistingModel(options.path).check(options.path)
    from mace_lora.api import inspection

    return inspection.inspect(options.path, options.base, options.trust)


def text(data: Data) -> str:
    return {"model": _say_model, "checkpoint": _say_checkpoint, "adapter": _say_adapter}[
        data["what"]
    ](data)


def _elements(numbers: Iterable[int]) -> str:
    return " ".join(_symbol(z) for z in numbers)


def _symbol(number: int) -> str:
    from ase.data import chemical_symbols

    return str(chemical_symbols[number])


def _options(options: Data) -> str:
    """Those that say something: not False, 0 or empty."""
    said = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in options.items()}
    return ", ".join(f"{k}={v}" for k, v in said.items() if v)


def _bytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB" if number >= 1e6 else f"{number / 1e3:.1f} KB"


def _say_model(data: Data) -> str:
    facts = [data["class"], f"{data['parameters']:,} parameters", data["dtype"]]
    facts += [_bytes(data["bytes"])] if data["bytes"] else []
    lines = [
        f"{data['path']}: {', '.join(facts)}",
        f"elements: {_elements(data['atomic_numbers'])}",
        f"heads: {', '.join(data['heads'])}",
        f"cutoff: {data['r_max']:g} Å",
    ]
    lines += [f"{key}: {value}" for key, value in data["architecture"].items()]
    for head, row in zip(data["heads"], data["atomic_energies"] or [], strict=False):
        energies = ", ".join(
            f"{_symbol(z)} {e:.4f}" for z, e in zip(data["atomic_numbers"], row, strict=True)
        )
        lines.append(f"E0s (eV), {head}: {energies}")
    for key in ("scale", "shift"):
        if data[key] is not None:
            lines.append(f"{key}: {', '.join(f'{v:.6g}' for v in data[key])}")
    lines.append("weights that adapters can change, by kind of layer:")
    lines += [
        f"  {kind:<12} {part['count']:>3} with {part['parameters']:,} parameters"
        for kind, part in data["layers"].items()
    ]
    lines.append(f"  other        {data['other_parameters']:,} parameters (no matrices)")
    if data["gates"]:
        lines.append(f"{data['gates']} layers carry gates: loading this file needs mace_lora")
    lines.append(f"fingerprint: {data['fingerprint']}")
    return "\n".join(lines)


def _say_checkpoint(data: Data) -> str:
    lines = [
        f"{data['path']}: a checkpoint, {_bytes(data['bytes'])}, {data['tensors']} tensors with "
        f"{data['values']:,} values"
    ]
    if data["run"]:
        run, at = data["run"], data["run"]["progress"]
        options = _options(run["options"])
        lines += [
            f"  of a run with {run['method']} ({options}) on {run['base']['name']}",
            f"  at epoch {at['epoch']}, step {at['steps']}; validation loss "
            f"{at['initial_loss']:.4g} before training, {at['lowest_loss']:.4g} at the lowest",
        ]
    lines += [f"  {key}: {value}" for key, value in data["numbers"].items() if value is not None]
    lines += [
        f"  {key}: {part['tensors']} tensors, {part['values']:,} values"
        for key, part in data["parts"].items()
        if part["tensors"]
    ]
    return "\n".join(lines)


def _say_adapter(data: Data) -> str:
    base, model = data["base"], data["model"]
    lines = [
        f"{data['path']}: an adapter of method {data['method']}, {data['parameters']:,} parameters "
        f"in {len(data['layers'])} layers, {_bytes(data['bytes'])}",
        f"options: {_options(data['options'])}",
        f"base model: {base.get('name') or 'without a name'} ({base.get('class')}), fingerprint "
        f"{base['fingerprint'][:12]}" + (f", head {base['head']}" if base.get("head") else ""),
        f"fine-tuned for {_elements(model['atomic_numbers'])}, heads {', '.join(model['heads'])}, "
        f"in {model['dtype']}",
        "written by " + ", ".join(f"{k} {v}" for k, v in data["versions"].items()),
        f"size of the changes: {data['sizes']}",
    ]
    known = [e["relative_update"] for e in data["layers"].values() if e.get("relative_update")]
    largest = max(known, default=0.0)
    rows = []
    for name, entry in data["layers"].items():
        relative = entry.get("relative_update")
        rows.append(
            [
                name,
                " ".join(str(r) for r in dict.fromkeys(entry["ranks"])) or "full",
                f"{entry['parameters']:,}",
                "" if relative is None else f"{100 * relative:.2f} %",
                common.bar(relative or 0.0, largest),
            ]
        )
    head = ["layer", "rank", "params", "|ΔW|/|W|", ""]
    return "\n".join([*lines, common.table(head, rows, border=False)])
