"""Make a low-rank adapter of a fully fine-tuned model.

The change of each weight is cut to a low rank by a singular value decomposition per irrep (lora) or
per path (elora): no adapter of that rank is closer, in the Frobenius norm. Printed is what it
leaves of each change, and with --data the errors of base, fine-tuned model and adapter on labelled
frames.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mace_lora.commands import common
from mace_lora.config import AdapterConfig
from mace_lora.files import size
from mace_lora.parsing import ExistingFile
from mace_lora.printing import Data
from mace_lora.upstream.known import ExistingModel

if TYPE_CHECKING:
    import torch

    from mace_lora.results.labelled import LabelledFrames

# Relative changes below this are rounding, and not shown
NOTHING = 1e-6

EXAMPLES = """\
  mace_lora extract --base mini --finetuned full.model --rank 8 --output full_adapter
  mace_lora extract --base mini --finetuned full.model --rank 8 --output full_adapter \\
      --data test.xyz
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, type=ExistingModel, help=common.BASE_HELP)
    parser.add_argument(
        "--finetuned", required=True, type=ExistingModel, help="the fully fine-tuned .model file"
    )
    parser.add_argument("--output", required=True, help="the adapter directory to write")
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapter (default: 4)")
    parser.add_argument(
        "--method",
        choices=["lora", "elora"],
        default="lora",
        help="lora: one decomposition per irrep of a layer; elora: one per path (default: lora)",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["all"],
        help="layers to adapt, as in --lora_targets (default: all)",
    )
    parser.add_argument("--head", help="the head of the base model, where it has several")
    parser.add_argument("--data", type=ExistingFile, help="labelled frames to measure the error on")
    common.add_data_arguments(parser)
    common.add_trust(parser)


def run(options: argparse.Namespace) -> Data:
    from mace_lora.api.extraction import extract
    from mace_lora.api.files import load_adapter
    from mace_lora.model import artefact
    from mace_lora.results.labelled import read_frames

    artefact.check_free(options.output)
    config = AdapterConfig.create(
        options.method,
        rank=options.rank,
        alpha=float(options.rank),
        targets=tuple(options.targets),
    )
    finetuned = common.load(options.finetuned, "finetuned", trust=options.trust)
    dtype = next(finetuned.parameters()).dtype
    frames = read_frames(options.data, common.keys(options)) if options.data else None
    base = common.load(options.base, "base", dtype, options.trust)
    found = extract(base, finetuned, config, options.head)
    found.base["name"] = options.base
    found.save(options.output)
    result: Data = {
        "output": options.output,
        "bytes": size(options.output),
        "method": options.method,
        "rank": options.rank,
        "layers": [vars(layer) for layer in found.layers],
    }
    if frames is not None:
        models_by_name = {
            "base": base,
            "fine-tuned": finetuned,
            "adapter": load_adapter(base, options.output),
        }
        result["data"] = options.data
        result |= _measure(frames, models_by_name, options)
    return result


def _measure(
    frames: LabelledFrames, models: dict[str, torch.nn.Module], options: argparse.Namespace
) -> Data:
    """The errors of several models, and what is to be said of the frames."""
    from mace_lora.results.evaluation import errors, head_of_each, predict_values

    frames, left_out = common.fit_to(frames, list(models.values()))
    found = {}
    for name, model in models.items():
        heads = head_of_each(frames, model, name, options.head)
        found[name] = errors(frames, predict_values(model, frames, heads, options.batch_size))[0]
    said = [*frames.said, *([left_out] if left_out else [])]
    return {"errors": {name: row.mae for name, row in found.items()}, "said": said}


def text(data: Data) -> str:
    from mace_lora.results.evaluation import UNITS

    rows = [
        [
            layer["name"],
            f"{100 * layer['change']:.2f} %",
            f"{100 * layer['error']:.1f} %",
            common.bar(layer["error"], 1.0) if layer["adapted"] else "no adapter",
        ]
        for layer in data["layers"]
        if layer["change"] > NOTHING
    ]
    if not rows:
        rows = [["none has changed by more than rounding", "", "", ""]]
    lines = [
        "the change of each weight, and the part of it that the adapter leaves out:",
        common.table(["weight", "|ΔW|/|W|", "left out", ""], rows, border=False),
        f"{data['output']}: {data['method']} of rank {data['rank']}, {data['bytes'] / 1e3:.1f} KB",
    ]
    if "errors" in data:
        measured = [q for q in UNITS if q in data["errors"]["base"]]
        table = [
            [name, *(f"{mae[q]:.2f}" for q in measured)] for name, mae in data["errors"].items()
        ]
        lines += data["said"]
        lines.append(f"{data['data']}: MAE")
        lines.append(common.table(["", *(f"{q} ({UNITS[q]})" for q in measured)], table))
    return "\n".join(lines)
