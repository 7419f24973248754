"""Say what a model, a checkpoint or an adapter directory holds.

For an adapter: its method and options, the base model it belongs to, and per layer the rank, the
number of trained parameters and the size of its change, as a bar. The sizes of the changes need the
base model, which is found where the adapter's run found it, or given with --base.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols

from mace_lora.api.files import load_adapter
from mace_lora.commands import common
from mace_lora.errors import ConfigError, MaceLoraError
from mace_lora.model import artefact
from mace_lora.model.description import describe
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.injection import adapters
from mace_lora.model.layers import find_sites
from mace_lora.model.merging import changes
from mace_lora.upstream import loading, rebuilding

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
    parser.add_argument("--base", help=f"for an adapter: {common.BASE_HELP}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    path = Path(options.path)
    if path.is_dir():
        return _adapter(path, options.base)
    if options.base is not None:
        raise ConfigError(f"--base goes with an adapter directory, and {path} is none")
    if path.is_file():
        kept = _checkpoint(path)
        if kept is not None:
            return kept
    return _model(options.path)


# ---------------------------------------------------------------------------- models


def _model(name: str) -> dict[str, Any]:
    model = common.load(name, "")
    sites, skipped = find_sites(model)
    kinds = Counter(site.layout.kind for site in sites)
    numel = Counter()
    for site in sites:
        numel[site.layout.kind] += site.weight.numel()
    gates = [n for n, a in adapters(model) if not a.mergeable]
    return {
        "what": "model",
        "path": name,
        "bytes": common.size(name) if Path(name).is_file() else None,
        **describe(model),
        "fingerprint": fingerprint(model),
        "architecture": rebuilding.architecture(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": {kind: {"count": n, "parameters": numel[kind]} for kind, n in kinds.items()},
        "other_parameters": sum(s.numel for s in skipped),
        "gates": len(gates),
    }


def _checkpoint(path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds; None where the file is none. Nothing in the file is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a pickled model, or no file of torch's at all: the model loader says it
        return None
    if not isinstance(content, dict):
        return None
    tensors: dict[str, torch.Tensor] = {}
    _collect(content, "", tensors)
    return {
        "what": "checkpoint",
        "path": str(path),
        "bytes": common.size(path),
        "parts": {
            str(key): _count(value) for key, value in content.items() if not _is_number(value)
        },
        "numbers": {str(key): value for key, value in content.items() if _is_number(value)},
        "tensors": len(tensors),
        "values": sum(t.numel() for t in tensors.values()),
        "run": _run_of(content),
    }


def _run_of(content: dict[str, Any]) -> dict[str, Any] | None:
    """Which run a checkpoint of this package belongs to, and where that stands; else None."""
    run, progress = content.get("run"), content.get("progress")
    if not (isinstance(run, dict) and isinstance(progress, dict)):
        return None
    kept = {key: run.get(key) for key in ("method", "options", "base")}
    return {**kept, "progress": progress}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool)) or value is None


def _collect(value: Any, name: str, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value
    elif isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{name}.{key}", found)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            _collect(inner, f"{name}.{i}", found)


def _count(value: Any) -> dict[str, int]:
    tensors: dict[str, torch.Tensor] = {}
    _collect(value, "", tensors)
    return {"tensors": len(tensors), "values": sum(t.numel() for t in tensors.values())}


# ---------------------------------------------------------------------------- adapters


def _adapter(folder: Path, base: str | None) -> dict[str, Any]:
    content = artefact.read(folder)
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in content.tensors.items():
        layer, factor = artefact.split_factor(name)
        entry = layers.setdefault(layer, {"parameters": 0, "ranks": []})
        entry["parameters"] += tensor.numel()
        if factor.startswith("A."):
            entry["ranks"].append(tensor.shape[1])
    found = {
        "what": "adapter",
        "path": str(folder),
        "bytes": common.size(folder),
        **content.config.to_json(),
        "base": content.base,
        "model": content.model,
        "versions": content.versions,
        "parameters": sum(t.numel() for t in content.tensors.values()),
        "layers": layers,
    }
    model, found["sizes"] = _adapted(folder, base, content)
    if model is not None:
        for change in changes(model):
            norm = float(change.original.norm())
            update = float(change.update.norm())
            layers[change.name]["update"] = update
            layers[change.name]["relative_update"] = update / norm if norm else None
    return found


def _adapted(
    folder: Path, base: str | None, content: artefact.Artefact
) -> tuple[torch.nn.Module | None, str]:
    """The adapted model, if its base is at hand without a download, and a word about it."""
    if base is not None:
        return load_adapter(base, folder), f"relative to the weights of {base}"
    name = content.base.get("name")
    if name != loading.MINI and not (isinstance(name, str) and Path(name).is_file()):
        return None, "unknown: give the base model with --base"
    try:
        return load_adapter(name, folder), f"relative to the weights of {name}"
    except MaceLoraError as error:
        return None, f"unknown: {error}"


# ---------------------------------------------------------------------------- in words


def text(data: dict[str, Any]) -> str:
    return {"model": _say_model, "checkpoint": _say_checkpoint, "adapter": _say_adapter}[
        data["what"]
    ](data)


def _elements(numbers: list[int]) -> str:
    return " ".join(chemical_symbols[z] for z in numbers)


def _options(options: dict[str, Any]) -> str:
    """Those that say something: not False, 0 or empty."""
    said = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in options.items()}
    return ", ".join(f"{k}={v}" for k, v in said.items() if v)


def _bytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB" if number >= 1e6 else f"{number / 1e3:.1f} KB"


def _say_model(data: dict[str, Any]) -> str:
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
            f"{chemical_symbols[z]} {e:.4f}"
            for z, e in zip(data["atomic_numbers"], row, strict=True)
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


def _say_checkpoint(data: dict[str, Any]) -> str:
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


def _say_adapter(data: dict[str, Any]) -> str:
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
