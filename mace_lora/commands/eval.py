"""Errors of a model, and of adapters on it, on labelled frames.

A table per file: all frames, each configuration type, each element, with a column per model. A
second file shows what fine-tuning has made the model forget: frames of the kind that the base model
was trained on. Energies in meV per atom, forces in meV/Å, stress in meV/Å³.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mace_lora.commands import common
from mace_lora.errors import ConfigError
from mace_lora.parsing import ExistingAdapter, ExistingFile
from mace_lora.upstream.known import ExistingModel

if TYPE_CHECKING:
    import torch

    from mace_lora.results.evaluation import Frames, Values

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
    parser.add_argument("--picture", help="a PNG of predictions against labels, to write")
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
    parser.add_argument("--head", help="the head of the model, where it has several")
    common.add_data_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from mace_lora.model.description import check_head
    from mace_lora.results.evaluation import UNITS, known_to, predict, read_frames, with_fitted_e0s
    from mace_lora.results.pictures import parity

    paths = [options.data, *([options.forgetting] if options.forgetting else [])]
    files = [read_frames(p, common.keys(options), options.group_by) for p in paths]
    if options.picture:
        common.check_folder(options.picture, "picture")
    compared = _models(options)
    for model in compared.values():
        check_head(model, options.head, "--head")
    known = [{int(z) for z in model.atomic_numbers} for model in compared.values()]
    files, left_out = zip(*(known_to(frames, known) for frames in files), strict=True)
    predictions: list[dict[str, Values]] = [{} for _ in files]
    for name, model in compared.items():
        for frames, values in zip(files, predictions, strict=True):
            values[name] = predict(model, frames, options.batch_size, options.head)
            if options.fit_e0s:
                values[name] = with_fitted_e0s(frames, values[name])
    if options.picture:
        parity(list(zip(files, predictions, strict=True)), options.picture)
    return {
        "units": UNITS,
        "metric": options.metric,
        "picture": options.picture,
        "left_out": [said for said in left_out if said],
        "files": [
            _result(path, frames, values)
            for path, frames, values in zip(paths, files, predictions, strict=True)
        ],
    }


def _models(options: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """The model and the adapted ones, by the names of their files."""
    from mace_lora.api.files import load_adapter

    found = {Path(options.model).stem: common.load(options.model, "model")}
    for folder in options.adapter:
        name = Path(folder).resolve().name
        if name in found:
            name = str(folder)
        if name in found:
            raise ConfigError(f"--adapter names {folder} twice")
        found[name] = load_adapter(options.model, folder)
    return found


def _result(path: str, frames: Frames, values: dict[str, Values]) -> dict[str, Any]:
    from mace_lora.results.evaluation import as_json, errors

    return {
        "path": path,
        "frames": len(frames.atoms),
        "models": {name: as_json(errors(frames, v)) for name, v in values.items()},
    }


def text(data: dict[str, Any]) -> str:
    parts = []
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


def _table(results: dict[str, list[dict[str, Any]]], metric: str, quantity: str) -> str:
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


def _offsets(file: dict[str, Any]) -> list[str]:
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
