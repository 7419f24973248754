"""What a model, a checkpoint or an adapter directory holds, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from mace_lora.api.files import load_adapter
from mace_lora.errors import MaceLoraError
from mace_lora.files import size
from mace_lora.model import artefact
from mace_lora.model.description import describe
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.identity import without_bases
from mace_lora.model.injection import adapters
from mace_lora.model.layers import find_sites
from mace_lora.model.merging import changes
from mace_lora.printing import Data
from mace_lora.upstream import loading, rebuilding
from mace_lora.upstream.known import MINI


def inspect(name: str, base: str | None = None, trust: bool = False) -> Data:
    """What stands under a name: `what` says which of the three it is, the rest depends on it.

    Args:
        name: an adapter directory, a .model file, a checkpoint, or the name of a foundation model.
        base: the base model of an adapter, where its run's own is not at hand.
        trust: as in `load_foundation`.

    Raises:
        MaceLoraError: there is no such file, or it is none of these.
    """
    if Path(name).is_dir():
        known = None if base is None else loading.load(base, flag="base", trust=trust)
        return _adapter(Path(name), base, known)
    checkpoint = _checkpoint(Path(name)) if Path(name).is_file() else None
    return _model(name, trust) if checkpoint is None else checkpoint


# ---------------------------------------------------------------------------- models


def _model(name: str, trust: bool) -> Data:
    model = loading.load(name, flag="", trust=trust)
    sites, skipped = find_sites(model)
    kinds = Counter(site.layout.kind for site in sites)
    numel: Counter[str] = Counter()
    for site in sites:
        numel[site.layout.kind] += site.weight.numel()
    gates = [n for n, a in adapters(model) if not a.mergeable]
    return {
        "what": "model",
        "path": name,
        "bytes": size(name) if Path(name).is_file() else None,
        **describe(model),
        "fingerprint": fingerprint(model),
        "architecture": rebuilding.architecture(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": {kind: {"count": n, "parameters": numel[kind]} for kind, n in kinds.items()},
        "other_parameters": sum(s.numel for s in skipped),
        "gates": len(gates),
    }


def _checkpoint(path: Path) -> Data | None:
    """What a checkpoint holds; None where the file is none. Nothing in the file is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a pickled model, or no file of torch's at all: the model loader says it
        return None
    if not isinstance(content, dict):
        return None
    return {
        "what": "checkpoint",
        "path": str(path),
        "bytes": size(path),
        "parts": {
            str(key): _count(value) for key, value in content.items() if not _is_number(value)
        },
        "numbers": {str(key): value for key, value in content.items() if _is_number(value)},
        **_count(content),
        "run": _run_of(content),
    }


def _run_of(content: Data) -> Data | None:
    """Which run a checkpoint of this package belongs to, and where that stands; else None."""
    run, progress = content.get("run"), content.get("progress")
    if not (isinstance(run, dict) and isinstance(progress, dict)):
        return None
    kept = {key: run.get(key) for key in ("method", "options", "base")}
    return {**kept, "progress": progress}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, str, bool)) or value is None


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _count(value: object) -> dict[str, int]:
    sizes = [tensor.numel() for tensor in _tensors(value)]
    return {"tensors": len(sizes), "values": sum(sizes)}


# ---------------------------------------------------------------------------- adapters


def _adapter(folder: Path, base: str | None, known: torch.nn.Module | None) -> Data:
    content = artefact.read(folder)
    layers: dict[str, Data] = {}
    for name, tensor in content.tensors.items():
        layer, factor = artefact.split_factor(name)
        entry = layers.setdefault(layer, {"parameters": 0, "ranks": []})
        entry["parameters"] += tensor.numel()
        if factor.startswith("lora_A."):
            entry["ranks"].append(tensor.shape[1])
    found = {
        "what": "adapter",
        "path": str(folder),
        "bytes": size(folder),
        **content.config.to_json(),
        "base": content.base,
        "model": without_bases(content.model),
        "versions": content.versions,
        "parameters": sum(t.numel() for t in content.tensors.values()),
        "layers": layers,
    }
    model, found["sizes"] = _adapted(folder, base, known, content)
    if model is not None:
        for change in changes(model):
            norm = float(change.original.norm())
            update = float(change.update.norm())
            layers[change.name]["update"] = update
            layers[change.name]["relative_update"] = update / norm if norm else None
    return found


def _adapted(
    folder: Path, base: str | None, known: torch.nn.Module | None, content: artefact.Artefact
) -> tuple[torch.nn.Module | None, str]:
    """The adapted model, if its base is at hand without a download, and a word about it."""
    if known is not None:
        return load_adapter(known, folder), f"relative to the weights of {base}"
    name = content.base.get("name")
    if name != MINI and not (isinstance(name, str) and Path(name).is_file()):
        return None, "unknown: give the base model with --base"
    try:
        return load_adapter(name, folder), f"relative to the weights of {name}"
    except MaceLoraError as error:
        return None, f"unknown: {error}"
