"""Fold an adapter into its base model and write a plain MACE model.

The result needs mace-torch alone: MACECalculator, mace_create_lammps_model and all other tools of
mace-torch take it. The merge is proved on a few frames: the written model predicts what base and
adapter predict. Where an adapter depends on its input (mmea) the gates stay in the model, which
then needs mace_lora to be loaded.
"""

from __future__ import annotations

import argparse
import math
from copy import deepcopy
from typing import TYPE_CHECKING

from mace_lora.commands import common
from mace_lora.errors import ConfigError
from mace_lora.files import size
from mace_lora.parsing import ExistingAdapter
from mace_lora.printing import Data
from mace_lora.upstream.known import ExistingModel

if TYPE_CHECKING:
    import ase
    import torch

EXAMPLES = """\
  mace_lora merge --base mini --adapter ethanol_adapter --output ethanol.model
  mace_lora merge --base mini --adapter ethanol_adapter --output half.model --alpha 0.5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, type=ExistingModel, help=common.BASE_HELP)
    parser.add_argument(
        "--adapter", required=True, type=ExistingAdapter, help="the adapter directory"
    )
    parser.add_argument("--output", required=True, help="the .model file to write")
    common.add_trust(parser)
    parser.add_argument(
        "--alpha",
        type=float,
        default=1.0,
        help="strength of the adapter: 1 as trained, 0.5 half of each weight's change, 0 none; "
        "E0s, scale and shift are the run's in any case",
    )


def run(options: argparse.Namespace) -> Data:
    if not math.isfinite(options.alpha):
        raise ConfigError(f"--alpha={options.alpha}: a finite number is needed")
    common.check_folder(options.output, "output")
    import torch

    from mace_lora.api.files import load_adapter
    from mace_lora.model import artefact
    from mace_lora.model.injection import adapters
    from mace_lora.model.merging import changes, merge
    from mace_lora.upstream import gated

    # in the adapter's precision from the start: constants that are cast keep that of the file
    dtype = getattr(torch, artefact.read(options.adapter).model["dtype"])
    base = common.load(options.base, "base", dtype, options.trust)
    model = load_adapter(base, options.adapter)
    updates = list(changes(model))
    gates = [name for name, adapter in adapters(model) if not adapter.mergeable]
    adapted = deepcopy(model)
    merge(model, keep_gates=True, scale=options.alpha)
    difference = _proof(adapted, model) if options.alpha == 1.0 else None
    if gates:
        gated.mark(model)
    common.save(model, options.output)
    return {
        "output": options.output,
        "bytes": size(options.output),
        "alpha": options.alpha,
        "weights_merged": len(updates),
        "gates_kept": len(gates),
        "largest_relative_difference": difference,
    }


def _proof(adapted: torch.nn.Module, merged: torch.nn.Module) -> float:
    """The largest relative difference of the predictions. Raises MergeMismatch above rounding."""
    from mace_lora.upstream import predicting

    batches = [predicting.frames_to_batch(_clusters(merged), merged)]
    before = predicting.predict(adapted, batches)
    found = predicting.prove_merge(before, merged, batches, "nothing was written")
    return max((relative for _, relative in found.values()), default=0.0)


def _clusters(model: torch.nn.Module) -> list[ase.Atoms]:
    """A few random clusters of all the elements that the model knows."""
    import ase
    import numpy as np

    rng = np.random.default_rng(0)
    numbers = [int(z) for z in model.get_buffer("atomic_numbers")]
    grid = 1.5 * np.stack(np.meshgrid(*[range(2)] * 3), axis=-1).reshape(-1, 3)
    return [
        ase.Atoms(rng.choice(numbers, size=8), grid + rng.normal(scale=0.15, size=(8, 3)))
        for _ in range(4)
    ]


def text(data: Data) -> str:
    lines = [
        f"{data['output']}: {data['bytes'] / 1e6:.2f} MB, {data['weights_merged']} weights merged"
    ]
    if data["largest_relative_difference"] is not None:
        lines.append(
            "checked on 4 random clusters; largest relative difference to base and adapter: "
            f"{data['largest_relative_difference']:.1e}"
        )
    else:
        lines.append(f"the adapter's changes were scaled by {data['alpha']:g}")
    if data["gates_kept"]:
        lines.append(
            f"{data['gates_kept']} gates depend on their input and stay: loading this file needs "
            "mace_lora installed"
        )
    return "\n".join(lines)
