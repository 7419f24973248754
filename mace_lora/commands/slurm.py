"""Where the batch scripts are: sbatch "$(mace_lora slurm)/one_gpu.sbatch" FLAGS, from any folder.

`one_gpu.sbatch` and `multi_node.sbatch` run `mace_lora train` in the folder from which they are
submitted, and go back to the queue with a checkpoint when their time is up. `requeue.sh` is what
scripts of your own need for that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mace_lora.printing import Data

EXAMPLES = """\
  mace_lora slurm    # their folder
  sbatch "$(mace_lora slurm)/one_gpu.sbatch" --config=my.yaml --name=my_model
  cp "$(mace_lora slurm)/one_gpu.sbatch" .    # to edit
"""
FOLDER = Path(__file__).parents[1] / "data" / "slurm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # there are none


def run(options: argparse.Namespace) -> Data:
    del options
    return {"folder": str(FOLDER), "scripts": sorted(path.name for path in FOLDER.iterdir())}


def text(data: Data) -> str:
    return str(data["folder"])
