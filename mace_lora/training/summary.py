"""The end of a run: the last lines of its log, and the page."""

from __future__ import annotations

import logging

from mace_lora.frames.units import Units
from mace_lora.results import run_page
from mace_lora.training.files.saving import files_left
from mace_lora.training.record import Run
from mace_lora.trust import checks
from mace_lora.trust.frames import dimers


def write(run: Run) -> None:
    """Log the errors before and after and the files to take away; write the page.

    Raises:
        WriteError: a file that mace-torch goes on without could not be written.
    """
    if hasattr(run, "trained") and run.trained.history:
        _log_errors(run)
    if hasattr(run, "saved"):
        _write_page(run)
    for file, meaning in files_left(run).items():
        logging.info(f"  {file}: {meaning}")
    if hasattr(run, "saved") and run.saved.lost is not None:
        raise run.saved.lost


def _log_errors(run: Run) -> None:
    history = run.trained.history
    errors = history.summary().replace("Å", "A")  # the log may be ASCII
    logging.info(f"Validation, before -> after: {errors}")
    if not history.has_learnt():
        logging.warning(
            "The validation loss never fell below that of the foundation model: train "
            f"longer, or try another --lr (it was {run.asked.args.lr})"
        )


def _trust(run: Run) -> list[str]:
    """What `mace_lora trust` would say without dynamics, and without molecules: in seconds."""
    asked = checks.Asked(run.saved.model, getattr(run, "foundation", None), ps=0.0)
    found = [
        checks.check_e0s(asked),
        checks.check_wall(asked, "pairs of atoms", dimers(asked.elements), checks.WALL),
    ]
    for check in found:
        if check.verdict == checks.FAIL:
            logging.warning(f"Not to be trusted away from the training frames: {check}")
    return [str(check) for check in found]


def _write_page(run: Run) -> None:
    try:
        run_page.write(
            run.asked.args,
            run.asked.given,
            run.trained.n_frames,
            run.asked.config,
            run.injected,
            run.trained.history,
            run.saved.model,
            run.trained.valid_sets,
            lambda: files_left(run),
            _trust(run),
            Units.parse(run.asked.options.units),
        )
    except Exception as error:  # the models are saved, and a page is no reason to fail
        logging.warning(f"no report: {type(error).__name__}: {error}")
