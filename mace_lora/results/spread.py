"""What the spread of a committee says of its error: calibrated, and checked on other frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mace_lora.errors import ConfigError
from mace_lora.results import labelled
from mace_lora.results.labelled import Array, LabelledFrames, Values

QUANTITIES = ("energy", "forces")
LEAST_MEMBERS = 2
WITHIN_ONE = 0.6827  # of normal errors, within one standard deviation


@dataclass(frozen=True)
class Reliability:
    """How well standard deviations tell errors.

    Attributes:
        correlation: Spearman's rank correlation of standard deviation and absolute error.
        coverage: shares of labels within one and within two standard deviations of the mean: 0.68
            and 0.95 of errors that are distributed normally.
        rmse: of the mean, eV per atom or eV/A.
    """

    correlation: float
    coverage: tuple[float, float]
    rmse: float


def mean(members: Sequence[Values]) -> Values:
    """What a committee predicts."""
    return Values(*(np.mean([getattr(m, q) for m in members], axis=0) for q in labelled.QUANTITIES))


def deviations(members: Sequence[Values]) -> dict[str, Array]:
    """Standard deviations over the members, as they are: (n_frames,) and (n_atoms, 3).

    Raises:
        ConfigError: fewer than two members have no spread.
    """
    if len(members) < LEAST_MEMBERS:
        raise ConfigError(f"a spread needs {LEAST_MEMBERS} members or more, found {len(members)}")
    return {q: np.std([getattr(m, q) for m in members], axis=0, ddof=1) for q in QUANTITIES}


def factors(frames: LabelledFrames, members: Sequence[Values]) -> dict[str, float]:
    """By which standard deviations are multiplied for 68 % of errors to lie within one.

    That is as of normal errors, on these frames; 1 without labels.
    Members that saw the same frames agree more than they are right, so factors are mostly above 1.
    """
    found = {}
    for quantity, spread in deviations(members).items():
        error = getattr(mean(members), quantity) - getattr(frames.labels, quantity)
        usable = np.isfinite(error) & (spread > 0)
        ratios = np.abs(error[usable] / spread[usable])
        found[quantity] = float(np.quantile(ratios, WITHIN_ONE)) if ratios.size else 1.0
    return found


def reliability(
    frames: LabelledFrames, members: Sequence[Values], factor: Mapping[str, float]
) -> dict[str, Reliability]:
    """By quantity with labels, on frames that the factors were not chosen on."""
    from scipy.stats import spearmanr

    found = {}
    for quantity, spread in deviations(members).items():
        error = getattr(mean(members), quantity) - getattr(frames.labels, quantity)
        known = np.isfinite(error)
        if known.sum() < LEAST_MEMBERS:
            continue
        size, wide = np.abs(error[known]), factor[quantity] * spread[known]
        found[quantity] = Reliability(
            float(spearmanr(wide, size).statistic),
            (float((size <= wide).mean()), float((size <= 2 * wide).mean())),
            float(np.sqrt((size**2).mean())),
        )
    return found
