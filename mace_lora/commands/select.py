"""Frames of a pool that are worth a label: those of which the members of a committee disagree most,
and which differ from each other.

A frame's score is the largest standard deviation of the force on one of its atoms. One by one the
frame is taken that has the largest product of score and distance to those taken already, where
frames are compared by the mean of their atoms' features in the first member. The committee is one
that `mace_lora train --members 4` has left.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mace_lora.commands import common
from mace_lora.errors import ConfigError
from mace_lora.parsing import ExistingAdapter, ExistingFile
from mace_lora.printing import Data
from mace_lora.upstream.known import ExistingModel

if TYPE_CHECKING:
    import numpy as np

EXAMPLES = """\
  mace_lora select pool.xyz --base mini --adapter my_model_committee --number 50 --output next.xyz
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pool", type=ExistingFile, help="frames without labels, as ASE reads them")
    parser.add_argument("--base", required=True, type=ExistingModel, help=common.BASE_HELP)
    parser.add_argument(
        "--adapter", required=True, type=ExistingAdapter, help="the folder of a committee"
    )
    parser.add_argument("--number", type=int, default=50, help="how many to take (default: 50)")
    parser.add_argument("--output", help="an .xyz file to write, the most worthwhile frame first")
    parser.add_argument("--head", help="the head that predicts, where the model has several")


def run(options: argparse.Namespace) -> Data:
    if options.number < 1:
        raise ConfigError(f"--number={options.number}: 1 or more is needed")
    if options.output:
        common.check_folder(options.output, "output")
    import ase.io
    import numpy as np

    from mace_lora.api.calculator import MaceLoraCalculator
    from mace_lora.files import whole_file
    from mace_lora.frames.reading import read_atoms
    from mace_lora.model import committee

    if not committee.is_one(options.adapter):
        raise ConfigError(
            f"--adapter={options.adapter} is no committee: train one with --members 4"
        )
    frames = read_atoms(options.pool)
    if not frames:
        raise ConfigError(f"{options.pool} holds no frames")
    head = {"head": options.head} if options.head else {}
    calculator = MaceLoraCalculator(options.base, options.adapter, **head)
    scores, features = [], []
    for atoms in frames:
        calculator.calculate(atoms)
        spread = np.linalg.norm(calculator.results["forces_std"], axis=1)
        scores.append(float(spread.max()))
        features.append(np.mean(calculator.get_descriptors(atoms)[0], axis=0))
    chosen = choose(np.array(scores), np.array(features), min(options.number, len(frames)))
    if options.output:
        with whole_file(options.output) as new:
            ase.io.write(new, [frames[i] for i in chosen], format="extxyz")
    return {
        "pool": str(options.pool),
        "frames": len(frames),
        "output": options.output,
        "chosen": [{"frame": i, "force_std": scores[i]} for i in chosen],
        "median_force_std": float(np.median(scores)),
    }


def choose(scores: np.ndarray, features: np.ndarray, number: int) -> list[int]:
    """Frames by score times distance to those chosen before, the highest score first.

    Args:
        scores: (n,), what a frame is worth on its own, 0 or more.
        features: (n, k); each column counts as much as it varies.
        number: of frames, at most n.
    """
    import numpy as np

    spread = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    chosen = [int(np.argmax(scores))]
    nearest = np.full(len(scores), np.inf)
    while len(chosen) < number:
        nearest = np.minimum(nearest, np.linalg.norm(scaled - scaled[chosen[-1]], axis=1))
        worth = scores * nearest
        worth[chosen] = -1.0
        chosen.append(int(np.argmax(worth)))
    return chosen


def text(data: Data) -> str:
    lines = [f"{len(data['chosen'])} of {data['frames']} frames of {data['pool']}, best first:"]
    shown = data["chosen"][:20]
    lines += [
        f"  frame {row['frame']}: forces uncertain by {1e3 * row['force_std']:.0f} meV/Å"
        for row in shown
    ]
    if len(data["chosen"]) > len(shown):
        lines.append(f"  ... and {len(data['chosen']) - len(shown)} more")
    lines.append(f"the median of the pool is {1e3 * data['median_force_std']:.0f} meV/Å")
    if data["output"]:
        lines.append(f"written to {data['output']}")
    return "\n".join(lines)
