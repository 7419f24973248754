"""The end of a run: the last lines of its log, and the page."""

from __future__ import annotations

import logging
from pathlib import Path

from mace_lora.frames.units import Units
from mace_lora.results import run_page, verdict
from mace_lora.training import defaults
from mace_lora.training.files.saving import files_left
from mace_lora.training.record import Run
from mace_lora.trust import checks
from mace_lora.trust.frames import dimers


def write(run: Run) -> None:
    """Log the errors before and after and the files to take away; write the page.

    Raises:
        WriteError: a file that mace-torch goes on without could not be written.
    """
    if not hasattr(run, "trained"):  # --dry_run
        return
    judged: list[str] = []
    if run.trained.history:
        judged = run.judged = _judge(run)
        _log_errors(run)
    if hasattr(run, "saved"):
        _write_settings(run)
        _write_page(run, judged)
    for file, meaning in files_left(run).items():
        logging.info(f"  {file}: {meaning}")
    if hasattr(run, "saved") and run.saved.lost is not None:
        raise run.saved.lost
    logging.info("Done")


def _judge(run: Run) -> list[str]:
    """The verdict, told in the log; the same for the page."""
    trained, args = run.trained, run.asked.args
    sets = {id(dataset): errors for dataset, errors in run.evaluated}
    found = verdict.judge(
        trained.history,
        {head: sets.get(id(part), {}) for head, part in trained.train_sets.items()},
        {head: len(part) for head, part in trained.valid_sets.items()},
        vars(args),
    )
    for sentence in found.bad:
        logging.warning(_ascii(sentence[0].upper() + sentence[1:]))
    following = verdict.command(found, args.name, str(Path(args.model_dir) / f"{args.name}.yaml"))
    for sentence in (*found.told, *([f"to try next: {following}"] if following else [])):
        logging.info(_ascii(sentence[0].upper() + sentence[1:]))
    return verdict.lines(found, following)


def _ascii(text: str) -> str:
    return text.replace("Å", "A").replace("³", "^3")


def _log_errors(run: Run) -> None:
    history = run.trained.history
    errors = _ascii(history.summary())  # the log may be
    logging.info(f"Validation, before -> after: {errors}")


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


def _write_settings(run: Run) -> None:
    try:
        defaults.write(run)
    except OSError as error:  # the models are saved, and the log has the settings
        logging.warning(f"no file of settings: {error}")


def _write_page(run: Run, judged: list[str]) -> None:
    try:
        run_page.write(
            run.asked.args,
            run.asked.given,
            run.asked.options.argv,
            run.trained.n_frames,
            run.asked.config,
            run.injected,
            run.trained.history,
            run.saved.model,
            run.trained.valid_sets,
            lambda: files_left(run),
            _trust(run),
            judged,
            Units.parse(run.asked.options.units),
        )
    except Exception as error:  # the models are saved, and a page is no reason to fail
        logging.warning(f"no report: {type(error).__name__}: {error}")
