"""Whether a fine-tuned model can be trusted away from its training frames.

E0s, the repulsion of every two elements, compressed frames, ordinary molecules, for crystals the
equation of state, energy conservation and heating are compared with the model that it was trained
from. Without --base the model is judged by itself. Exit code 1 where a check fails. Limits are for
faults: they don't say how accurate a model is (see `mace_lora eval`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mace_lora.commands import common
from mace_lora.errors import ConfigError
from mace_lora.parsing import ExistingFile
from mace_lora.printing import Data
from mace_lora.upstream.known import ExistingModel

if TYPE_CHECKING:
    import ase
    import numpy as np
    import torch


EXAMPLES = """\
  mace_lora trust ethanol.model --base mini --data test.xyz
  mace_lora trust ethanol.model --base mini --data test.xyz --output trust.html --json
"""
MOST_FRAMES = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=ExistingModel, help="the model to be trusted or not")
    parser.add_argument("--base", type=ExistingModel, help="the model that it was trained from")
    parser.add_argument(
        "--data",
        type=ExistingFile,
        help=f"labelled frames of what it is for; {MOST_FRAMES} of them are taken",
    )
    parser.add_argument("--output", help="a page to write, with pictures: an .html file")
    parser.add_argument(
        "--ps", type=float, default=0.5, help="picoseconds of heating, 0: no dynamics (default 0.5)"
    )
    parser.add_argument(
        "--head", help="the head of the model, where it has several (default: last)"
    )
    common.add_data_arguments(parser)
    common.add_trust(parser)


def run(options: argparse.Namespace) -> Data:
    if not 0 <= options.ps < 1e4:
        raise ConfigError(f"--ps={options.ps}: a number of picoseconds, 0 or more, is needed")
    if options.output:
        common.check_folder(options.output, "output")
    import torch

    from mace_lora.model.description import check_head
    from mace_lora.trust.checks import FAIL, Asked, all_checks

    loaded = common.load(options.model, "model", torch.float64, options.trust)
    start = None
    if options.base:
        start = common.load(options.base, "base", torch.float64, options.trust)
    frames, energies, said = _data(options, [loaded, *([start] if start is not None else [])])
    check_head(loaded, options.head, "--head")
    asked = Asked(loaded, start, frames, energies, options.head, options.ps)
    checks = list(all_checks(asked))
    if options.output:
        from mace_lora.trust.page import write

        write(Path(options.output), f"Can {Path(options.model).name} be trusted?", asked, checks)
    return {
        "model": str(options.model),
        "base": options.base,
        "output": options.output,
        "said": said,
        "checks": [vars(check) for check in checks],
        "problems": [check.name for check in checks if check.verdict == FAIL],
    }


def _data(
    options: argparse.Namespace, models: list[torch.nn.Module]
) -> tuple[list[ase.Atoms], np.ndarray, list[str]]:
    """Frames, their energies per atom, and what is to be said of the file."""
    import numpy as np

    if not options.data:
        return [], np.empty(0), []
    from mace_lora.results.labelled import read_frames

    found = read_frames(options.data, common.keys(options), most=MOST_FRAMES)
    fitting, left_out = common.fit_to(found, models)
    said = [*fitting.said, *([left_out] if left_out else [])]
    return list(fitting.atoms), fitting.labels.energy, said


def text(data: Data) -> str:
    from mace_lora.trust.checks import COLUMNS, cells

    lines = [*data["said"]]
    lines.append(common.table(COLUMNS, [cells(check) for check in data["checks"]], left=2))
    lines += [f"{c['name']}: {c['why']}" for c in data["checks"] if c["why"]]
    if data["problems"]:
        lines.append(f"not to be trusted: {', '.join(data['problems'])}")
    else:
        lines.append("no check failed")
    if data["output"]:
        lines.append(f"all of this with pictures: {data['output']}")
    return "\n".join(lines)
