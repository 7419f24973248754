"""The adapter directory: `adapter_model.safetensors` and `adapter_config.json`, nothing executable;
and a `README.md` for people (`card`).

The tensors are the adapter's factors by `<weight>.<factor>`, such as
`readouts.0.linear.lora_A.0`, and where contractions are adapted, the basis of their weights
(`basis.<weight>`, see `bases`). The configuration says which method
with which options, which base model they belong to (by fingerprint), and what else the fine-tuning
changed (elements kept, E0s, scale and shift, heads), so that base and adapter give exactly the
merged model. A key that is not known is an error: ignoring it would change predicted energies.

Format 2 differs from format 1 in the names of low-rank factors alone; both are read.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mace_lora.config import AdapterConfig
from mace_lora.errors import ArtefactError, ConfigError
from mace_lora.files import whole_folder
from mace_lora.model import card, places
from mace_lora.model.bases import Bases, bases_of, carry
from mace_lora.model.description import Description
from mace_lora.model.identity import check_any_basis, stored_bases, without_bases
from mace_lora.model.injection import adapter_parameters

FORMAT = 2
TENSORS = "adapter_model.safetensors"
CONFIG = card.CONFIG
BASIS = "basis."  # in front of the weight whose paths a tensor says
# How factors were called in format 1
_FORMER_NAMES = {"A": "lora_A", "B": "lora_B", "gain": "lora_gain"}
_KEYS = {"format", "versions", "method", "options", "base", "model"}


@dataclass(frozen=True)
class Artefact:
    """The content of an adapter directory.

    Attributes:
        config: method and options.
        tensors: the factors, by `<weight>.<factor>`.
        base: which model to start from: its name, class, fingerprint, and the head taken from it.
        model: the model that was adapted: its fingerprint, elements, heads, E0s (eV), scale, shift,
            and the `bases` of contractions that are adapted.
        versions: of the packages that wrote it.
    """

    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    base: Description
    model: Description
    versions: dict[str, str] = field(default_factory=dict)


def write(
    folder: str | Path,
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    base: Description,
    model: Description,
) -> None:
    """Write the directory whole or not at all; an older adapter of the same name is replaced.

    Raises:
        ArtefactError: something else has that name, which is left as it is.
    """
    check_free(folder)
    content = {
        "format": FORMAT,
        "versions": versions(),
        **config.to_json(),
        "base": without_bases(base),
        "model": without_bases(model),
    }
    bases = stored_bases(model)
    if any(name.startswith(f"{weight}.") for name in tensors for weight in bases):
        tensors = {**tensors, **{BASIS + weight: b for weight, b in bases.items()}}
    with whole_folder(folder) as new:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, new / TENSORS)
        (new / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        written = {TENSORS, CONFIG}
        if card.is_ours(Path(folder) / card.CARD):
            (new / card.CARD).write_text(card.text(content), encoding="utf-8")
            written.add(card.CARD)
        # safetensors lets the owner alone read what it writes; colleagues read adapters too
        (new / TENSORS).chmod((new / CONFIG).stat().st_mode)
        for other in Path(folder).glob("*"):  # notes that someone has put beside the adapter
            if other.is_file() and other.name not in written:
                shutil.copy2(other, new)


def check_free(folder: str | Path) -> None:
    """Raises ArtefactError where an adapter can't be written without loss of something else."""
    folder = Path(folder)
    if folder.is_dir():
        inside = {path.name for path in folder.iterdir()}
        if inside and CONFIG not in inside:
            raise ArtefactError(
                f"{folder} is a folder with other files in it ({', '.join(sorted(inside)[:3])}), "
                "no adapter directory: name another for the adapter; nothing was overwritten"
            )
        if any(path.is_dir() for path in folder.iterdir()):
            raise ArtefactError(f"{folder} holds folders: name another for the adapter")
    elif folder.exists():
        raise ArtefactError(f"{folder} is a file: name another folder for the adapter")


def read(folder: str | Path) -> Artefact:
    """Read and check an adapter. Nothing in it can run code.

    Args:
        folder: a directory, a .zip file of one, or `hf://owner/name`; see `places.directory`.

    Raises:
        ArtefactError: a file is missing, unreadable, of a newer format, or has unknown keys.
    """
    if not isinstance(folder, (str, Path)):
        raise ArtefactError(
            f"an adapter is named by the path of its directory, found {type(folder).__name__}"
        )
    with places.directory(folder, (CONFIG, TENSORS)) as found:
        return _read(found)


def _read(folder: Path) -> Artefact:
    content = _read_config(folder / CONFIG)
    try:
        config = AdapterConfig.from_json(
            {"method": content["method"], "options": content["options"]}
        )
    except (ConfigError, TypeError) as error:
        raise ArtefactError(f"{folder / CONFIG}: {error}") from None
    try:
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError:
        raise ArtefactError(f"{folder} has no {TENSORS}: is it an adapter directory?") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtefactError(f"{folder / TENSORS} can't be read: {error}") from None
    bases = {k.removeprefix(BASIS): tensors.pop(k) for k in list(tensors) if k.startswith(BASIS)}
    if content["format"] == 1:
        tensors = current_names(tensors)
    model = {**content["model"], "bases": bases} if bases else content["model"]
    return Artefact(config, tensors, content["base"], model, content["versions"])


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"no {path}: is {path.parent} an adapter directory?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds no table of settings")
    version = content.get("format")
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise ArtefactError(
            f"{path} is of format {version!r}; this version of mace_lora reads 1 to {FORMAT}"
        )
    if set(content) != _KEYS:
        missing, unknown = sorted(_KEYS - set(content)), sorted(set(content) - _KEYS)
        raise ArtefactError(f"{path}: missing keys {missing}, unknown keys {unknown}")
    for key in ("base", "model", "versions"):
        if not isinstance(content[key], dict):
            raise ArtefactError(f"{path}: {key!r} must be a table, found {content[key]!r}")
    for key in ("base", "model"):
        _check_description(f"{path}: {key}", content[key])
    return content


def _check_description(where: str, table: Description) -> None:
    """Raises ArtefactError unless `table` describes a model as `description.describe` does."""
    numbers, heads = table.get("atomic_numbers", []), table.get("heads", [])
    checks = {
        "fingerprint": isinstance(table.get("fingerprint"), str),
        "dtype": table.get("dtype") in ("float32", "float64"),
        "atomic_numbers": _is_list_of(numbers, int)
        and all(0 < z < 119 for z in numbers)
        and len(set(numbers)) == len(numbers),
        "heads": _is_list_of(heads, str),
    }
    for key in ("atomic_energies", "scale", "shift"):
        checks[key] = key in table
    if "any_basis" in table:
        checks["any_basis"] = check_any_basis(table["any_basis"])
    if all(checks.values()):
        energies, size = table["atomic_energies"], (len(heads), len(numbers))
        checks["atomic_energies"] = energies is None or (
            _is_list_of(energies, list)
            and len(energies) == size[0]
            and all(_is_list_of(row, float) and len(row) == size[1] for row in energies)
        )
        for key in ("scale", "shift"):
            values = table[key]
            checks[key] = values is None or (
                _is_list_of(values, float) and len(values) in (1, len(heads))
            )
    wrong = [key for key, fine in checks.items() if not fine]
    if wrong:
        key = wrong[0]
        raise ArtefactError(f"{where}: {key!r} is missing or wrong: {str(table.get(key))[:80]}")


def _is_list_of(values: object, kind: type) -> bool:
    """A non-empty list of this kind; floats must be finite."""
    if not isinstance(values, list) or not values:
        return False
    if not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
        return False
    return kind is not float or all(math.isfinite(v) for v in values)


def split_factor(name: str) -> tuple[str, str]:
    """`<weight>.<factor>` in its two parts: factors are called `lora_A.0`, `D`, `shift_bias`."""
    head, _, last = name.rpartition(".")
    if last.isdigit():
        head, _, factor = head.rpartition(".")
        last = f"{factor}.{last}"
    return head, last


def current_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factors of format 1, of an adapter or a checkpoint, under the names that they have today."""
    renamed = {}
    for name, tensor in tensors.items():
        weight, factor = split_factor(name)
        kind, dot, number = factor.partition(".")
        renamed[f"{weight}.{_FORMER_NAMES.get(kind, kind)}{dot}{number}"] = tensor
    return renamed


@torch.no_grad()
def load_factors(
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    started: Description | None = None,
    here: Bases | None = None,
) -> None:
    """Copy factors into the adapters of `model`: all of them, and no others.

    Args:
        tensors: by `<weight>.<factor>`.
        started: the model that they belong to, `Artefact.model`; where its contractions are in
            another basis, their factors are carried over.
        here: the basis of `model`, where its kernels don't tell it.

    Raises:
        ArtefactError: names or shapes differ, or an update doesn't exist in the basis of `model`,
            which is left as it was.
    """
    if there := stored_bases(started or {}):
        tensors = carry(model, tensors, there, bases_of(model) if here is None else here)
    own = adapter_parameters(model)
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise ArtefactError(
            f"the adapter doesn't fit the model: {len(missing)} factors missing "
            f"({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])})"
        )
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ArtefactError(
                f"factor {name} has shape {tuple(tensors[name].shape)} in the file and "
                f"{tuple(parameter.shape)} in the model"
            )
        if not torch.isfinite(tensors[name]).all():
            raise ArtefactError(f"factor {name} holds values that are not finite")
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def versions() -> dict[str, str]:
    """Of the packages on which the numbers depend."""
    return {name: metadata.version(name) for name in ("mace-lora", "mace-torch", "torch", "e3nn")}
