"""A run whose loss is no number any more, or has exploded, ends with words.

mace-torch takes NaN for the best loss so far, and saves the model that gave it.
"""

from __future__ import annotations

import argparse
import math

from mace_lora.errors import Diverged
from mace_lora.training.again import flags_for_best
from mace_lora.training.record import Progress

# So many times the loss before training (or 1, if that is more) is no training any more
EXPLODED = 1e6


def has_diverged(loss: float, initial: float) -> bool:
    """Whether `loss` is not finite, or far above the `initial` one, as far as that is known."""
    if not math.isfinite(loss):
        return True
    return math.isfinite(initial) and loss > EXPLODED * max(initial, 1.0)


def diverged(
    args: argparse.Namespace, at: Progress, what: str, loss: float, where: str
) -> Diverged:
    """The error for the loss called `what` at `where`, both in words."""
    # LBFGS takes no notice of --lr
    flag, advice = f"--lr={args.lr:g}", f"try --lr={args.lr / 10:g}"
    if args.lbfgs:
        flag, advice = "--lbfgs", "leave out --lbfgs"
    if at.epoch > 0:
        advice = (
            f"the best epoch so far is kept in {args.checkpoints_dir}. For a model of it "
            f"repeat the command with {' '.join(flags_for_best(args, at.epoch))}; to train "
            f"on, {advice}, with --restart_latest or from the start"
        )
    return Diverged(f"the {what} is {loss:g} at {where}: training has diverged at {flag}; {advice}")
