"""Errors of a model, and of adapters on it, on labelled frames.

A table per file: all frames, each configuration type, each element, with a column per model. A
second file shows what fine-tuning has made the model forget: frames of the kind that the base model
was trained on. Energies in meV per atom, forces in meV/Å, stress in meV/Å³.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mace_lora.commands import common
from mace_lora.errors import ConfigError, did_you_mean
from mace_lora.parsing import ExistingAdapter, ExistingFile
from mace_lora.printing import Data
from mace_lora.upstream.known import ExistingModel

if TYPE_CHECKING:
    import torch

    from mace_lora.results.labelled import LabelledFrames, Values

EXAMPLES = """\
  mace_lora eval --model ethanol.model --data test.xyz
  mace_lora eval --model mini --adapter lora_adapter dora_adapter --data test.xyz \\
      --forgetting other_molecules.xyz --picture parity.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=ExistingModel, help=common.BASE_HELP)
    parser.add_argument(
        "--adapter",
        nargs="+",
        default=[],
        type=ExistingAdapter,
        help="adapter directories of this model",
    )
    parser.add_argument(
        "--data", required=True, type=ExistingFile, help="labelled frames, in extended xyz"
    )
    parser.add_argument(
        "--forgetting", type=ExistingFile, help="a second file, to see what was forgotten"
    )
    parser.add_argument("--picture", help="a PNG file to write, of predictions against labels")
    parser.add_argument(
        "--metric", choices=["mae", "rmse"], default="mae", help="in the table (default: mae)"
    )
    parser.add_argument(
        "--fit_e0s",
        action="store_true",
        help="shift each model's energies by one number per element, the best fit to each file: "
        "for labels of another method, which count energies from other E0s",
    )
    parser.add_argument(
        "--group_by",
        default="config_type",
        help="the key of a frame that says its configuration type (default: config_type)",
    )
    parser.add_argument(
        "--head", help="the head that predicts, where a model has several and frames name none"
    )
    common.add_data_arguments(parser)
    common.add_trust(parser)


def run(options: argparse.Namespace) -> Data:
    from mace_lora.results.evaluation import UNITS, head_of_each, predict_values, with_fitted_e0s
    from mace_lora.results.labelled import read_frames
    from mace_lora.results.pictures import parity

    paths = [options.data, *([options.forgetting] if options.forgetting else [])]
    files = [read_frames(p, common.keys(options), options.group_by) for p in paths]
    if options.picture:
        common.check_folder(options.picture, "picture")
    compared = _models(options)
    _check_head(options.head, compared)
    models = [column.model for column in compared.values()]
    fitting = [common.fit_to(frames, models) for frames in files]
    files = [frames for frames, _ in fitting]
    heads = [
        {
            name: head_of_each(frames, column.model, name, column.head)
            for name, column in compared.items()
        }
        for frames in files
    ]
    predictions: list[dict[str, Values]] = [{} for _ in files]
    for name, column in compared.items():
        for frames, head, values in zip(files, heads, predictions, strict=True):
            values[name] = predict_values(column.model, frames, head[name], options.batch_size)
            if options.fit_e0s:
                values[name] = with_fitted_e0s(frames, values[name])
    if options.picture:
        parity(list(zip(files, predictions, strict=True)), options.picture)
    return {
        "units": UNITS,
        "metric": options.metric,
        "picture": options.picture,
        "left_out": [left_out for _, left_out in fitting if left_out],
        "said": list(dict.fromkeys(said for frames in files for said in frames.said)),
        "heads": _heads_used(heads, compared),
        "files": [
            _result(path, frames, values)
            for path, frames, values in zip(paths, files, predictions, strict=True)
        ],
    }


class _Column(NamedTuple):
    """One of the models that are compared, and the head of it that was asked for."""

    model: torch.nn.Module
    head: str | None


def _models(options: argparse.Namespace) -> dict[str, _Column]:
    """The model and the adapted ones, by the names of their files."""
    from mace_lora.api.files import load_adapter
    from mace_lora.model import artefact
    from mace_lora.model.description import heads as heads_of

    adapted: dict[str, _Column] = {}
    base, base_head = common.load(options.model, "model", trust=options.trust), options.head
    own = Path(options.model).stem
    for folder in options.adapter:
        name = Path(folder).resolve().name
        if name in (own, *adapted):
            name = str(folder)
        if name in (own, *adapted):
            raise ConfigError(f"--adapter names {folder} twice")
        adapted[name] = _Column(load_adapter(base, folder), options.head)
        if options.head not in heads_of(base):  # the one that the adapter's run started from
            base_head = artefact.read(folder).base.get("head") or base_head
    return {own: _Column(base, base_head), **adapted}


def _check_head(head: str | None, compared: dict[str, _Column]) -> None:
    """Raises ConfigError where --head names a head that none of the models has."""
    from mace_lora.model.description import heads as heads_of

    known = dict.fromkeys(h for column in compared.values() for h in heads_of(column.model))
    if head is not None and head not in known:
        raise ConfigError(f"--head={head}: no model has such a head; {did_you_mean(head, known)}")


def _heads_used(
    heads: list[dict[str, list[str]]], compared: dict[str, _Column]
) -> dict[str, list[str]]:
    """By model the heads that have predicted; empty where all models have but one."""
    from mace_lora.model.description import heads as heads_of

    if all(len(heads_of(column.model)) == 1 for column in compared.values()):
        return {}
    return {name: sorted({h for file in heads for h in file[name]}) for name in compared}


def _result(path: str, frames: LabelledFrames, values: dict[str, Values]) -> Data:
    from mace_lora.results.evaluation import as_json, errors

    return {
        "path": path,
        "frames": len(frames.atoms),
        "models": {name: as_json(errors(frames, v)) for name, v in values.items()},
    }


def text(data: Data) -> str:
    parts = list(data["said"])
    if data["heads"]:
        used = (f"{', '.join(heads)} of {name}" for name, heads in data["heads"].items())
        parts.append(f"heads: {'; '.join(used)}")
    for file in data["files"]:
        parts.append(f"{file['path']}: {file['frames']} frames")
        for quantity, unit in data["units"].items():
            if any(quantity in row["mae"] for row in next(iter(file["models"].values()))):
                parts.append(f"{quantity}, {data['metric'].upper()} in {unit}")
                parts.append(_table(file["models"], data["metric"], quantity))
        parts += _offsets(file)
    parts += data["left_out"]
    if data["picture"]:
        parts.append(f"picture: {data['picture']}")
    return "\n".join(parts)


def _table(results: dict[str, list[Data]], metric: str, quantity: str) -> str:
    names = list(results)
    rows = []
    for i, row in enumerate(results[names[0]]):
        part = {"all": "all", "group": "type", "element": "element"}[row["part"]]
        cells = [results[n][i][metric].get(quantity) for n in names]
        if any(c is not None for c in cells):
            label = f"{part} {row['name']}" if part != "all" else part
            shown = ("" if c is None else f"{c:.2f}" for c in cells)
            rows.append([label, row["count"], *shown])
    return common.table(["", "count", *names], rows)


def _offsets(file: Data) -> list[str]:
    """A word on models whose energies are far from the labels, most likely by other E0s."""
    from mace_lora.results.evaluation import FAR

    found = {name: rows[0]["mae"].get("energy", 0.0) for name, rows in file["models"].items()}
    far = [name for name, error in found.items() if error > FAR]
    if not far:
        return []
    return [
        f"The energies of {', '.join(far)} are off by more than 1 eV per atom:",
        "do the labels use other E0s? --fit_e0s takes that out",
    ]
