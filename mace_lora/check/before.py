"""The part of the check that runs before each training: in a second, and on errors it ends."""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np
import torch

from mace_lora.check import units
from mace_lora.check.compared import compare, sample
from mace_lora.check.findings import ERROR
from mace_lora.errors import DataError
from mace_lora.frames.reading import XyzFrames
from mace_lora.upstream.answers import Answers

MOST_FRAMES, MOST_ATOMS, LEAST_FRAMES = 16, 800, 4


def before_training(
    file: XyzFrames,
    model: torch.nn.Module,
    labels: Collection[str],
    head: str | None = None,
    answers: Answers | None = None,
) -> None:
    """Compare some labels of a file with what a foundation model predicts; log what is doubtful.

    Args:
        file: frames, with labels as training takes them.
        model: the foundation model.
        labels: those that are trained on; the others may be whatever they are.
        head: of it.
        answers: what it has predicted so far.

    Raises:
        DataError: labels are in another unit, or of the other sign.
    """
    chosen = sample(file.configurations, MOST_FRAMES, MOST_ATOMS, LEAST_FRAMES)
    try:
        compared = compare(file, chosen, model, head, answers)
        found = [] if compared is None else units.findings(file.path, compared, file.factors)
    except (RuntimeError, ValueError, KeyError, np.linalg.LinAlgError) as error:
        # a model that can't predict these frames says nothing of them, and is no reason to stop
        logging.info(f"{file.path}: units not checked ({type(error).__name__}: {error})")
        return
    found = [finding for finding in found if finding.what in labels]
    for finding in found:
        if finding.severity != ERROR:
            logging.warning(str(finding))
    errors = [finding for finding in found if finding.severity == ERROR]
    if errors:
        parts = ",".join(finding.units for finding in errors if finding.units)
        raise DataError(
            "; ".join(map(str, errors))
            + (f". Add --units={parts}" if parts else "")
            + "; or train on it as it is: --check=False"
        )
