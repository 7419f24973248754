"""Take an adapter out of a model that it was merged into.

The result is the model that the training run started from: the base model with the run's elements
and E0s. Its fingerprint is compared with the one in the adapter's adapter_config.json.
"""

from __future__ import annotations

import argparse

from mace_lora.commands import common
from mace_lora.files import size
from mace_lora.parsing import ExistingAdapter
from mace_lora.printing import Data
from mace_lora.upstream.known import ExistingModel

EXAMPLES = """\
  mace_lora unmerge --model ethanol.model --adapter ethanol_adapter --output start.model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=ExistingModel, help="the merged .model file")
    parser.add_argument(
        "--adapter", required=True, type=ExistingAdapter, help="the adapter that was merged into it"
    )
    parser.add_argument("--output", required=True, help="the .model file to write")
    common.add_trust(parser)


def run(options: argparse.Namespace) -> Data:
    from mace_lora.api.extraction import unmerge

    common.check_folder(options.output, "output")
    model, exact = unmerge(
        common.load(options.model, "model", trust=options.trust), options.adapter
    )
    common.save(model, options.output)
    return {"output": options.output, "bytes": size(options.output), "fingerprint_matches": exact}


def text(data: Data) -> str:
    lines = [f"{data['output']}: {data['bytes'] / 1e6:.2f} MB"]
    if data["fingerprint_matches"]:
        lines.append("its weights are exactly those that the adapter's run started from")
    else:
        lines.append(
            "its weights are not to the last bit those that the adapter's run started from: "
            "rounding (runs in float32), or the adapter was not merged into this model; "
            "compare it with the base by mace_lora eval"
        )
    return "\n".join(lines)
