"""The end of a run: the last lines of its log, and the page."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from mace_lora.frames.units import Units
from mace_lora.model import card
from mace_lora.results import run_page, verdict
from mace_lora.results.compared import Compared, as_text, compare, table
from mace_lora.training import defaults
from mace_lora.training.files.saving import files_left
from mace_lora.training.record import Run
from mace_lora.trust import checks
from mace_lora.trust.frames import dimers

# On the card of an adapter, beside the options of its method
_TOLD = (
    *("lr", "schedule", "weight_decay", "max_num_epochs", "batch_size", "seed", "loss"),
    *("energy_weight", "forces_weight", "stress_weight", "protect", "default_dtype"),
)


def write(run: Run) -> None:
    """Log the errors before and after and the files to take away; write the page.

    Raises:
        WriteError: a file that mace-torch goes on without could not be written.
    """
    if not hasattr(run, "trained"):  # --dry_run
        return
    if run.trained.history:
        run.compared = _compare(run) if hasattr(run, "saved") else []
        run.judged = _judge(run)
        _log_errors(run)
    if hasattr(run, "saved"):
        _write_settings(run)
        _write_cards(run)
        _write_page(run)
    logging.info(f"Wall time: {_spelt(time.monotonic() - run.began)}")
    for file, meaning in files_left(run).items():
        logging.info(f"  {file}: {meaning}")
    if hasattr(run, "saved") and run.saved.lost is not None:
        raise run.saved.lost
    logging.info("Done")


def _compare(run: Run) -> list[Compared]:
    units = Units.parse(run.asked.options.units)
    model, trained = run.saved.model, run.trained
    start = run.unadapted.to(next(model.parameters()))
    try:
        sets, answers = (trained.train_sets, trained.valid_sets), (run.before, run.after)
        return compare(run.asked.args, start, model, *sets, units, answers)
    except Exception as error:  # the models are saved, and tables are no reason to fail
        logging.warning(f"no errors before and after: {type(error).__name__}: {error}")
        return []


def _judge(run: Run) -> list[str]:
    """The verdict, told in the log; the same for the page."""
    trained, args = run.trained, run.asked.args
    evaluated = {id(dataset): errors for dataset, errors in run.evaluated}
    found = verdict.judge(
        trained.history,
        {head: evaluated.get(id(part), {}) for head, part in trained.train_sets.items()},
        {head: len(part) for head, part in trained.valid_sets.items()},
        vars(args),
        run.compared,
    )
    following = verdict.command(found, args.name, str(Path(args.model_dir) / f"{args.name}.yaml"))
    judged = verdict.lines(found, following)
    for i, sentence in enumerate(judged):
        tell = logging.warning if i < len(found.bad) else logging.info
        tell(_ascii(sentence[0].upper() + sentence[1:]))
    return judged


def _ascii(text: str) -> str:  # a log may be
    return text.replace("Å", "A").replace("³", "^3").replace("→", "->")


def _log_errors(run: Run) -> None:
    if run.compared:
        logging.info(f"Before -> after training:\n{_ascii(as_text(run.compared))}")
    else:
        logging.info(f"Validation, before -> after: {_ascii(run.trained.history.summary())}")


def _spelt(seconds: float) -> str:
    """`1 h 2 min`, `3 min 5 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


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


def _write_cards(run: Run) -> None:
    """What the run knows, on the card of its adapter; names of files, no folders of a machine."""
    args, given = run.asked.args, run.asked.given
    files = {k: Path(str(given[k])).name for k in ("train_file", "valid_file", "test_file")}
    data = [f"{k.removesuffix('_file')}: `{v}`" for k, v in files.items() if given[k]]
    known = {**vars(run.asked.options), **vars(args)}
    sections = {
        "Training data": f"{run.trained.n_frames} frames; {', '.join(data)}.",
        "Settings": ", ".join(f"`{flag}={known[flag]}`" for flag in _TOLD if flag in known),
    }
    if run.compared:
        heading, rows = table(run.compared)
        sections["Errors before → after"] = card.table(heading, rows)
    for file in files_left(run):
        if file.endswith("_adapter"):
            try:
                card.add(file, sections)
            except OSError as error:  # the adapter itself is whole
                logging.warning(f"no card of the adapter: {error}")


def _write_page(run: Run) -> None:
    try:
        run_page.write(
            run.asked.args,
            run.asked.given,
            run.asked.options.argv,
            run.trained.n_frames,
            run.asked.config,
            run.injected,
            run.saved.model,
            run.compared,
            lambda: files_left(run),
            _trust(run),
            run.judged,
        )
    except Exception as error:  # the models are saved, and a page is no reason to fail
        logging.warning(f"no report: {type(error).__name__}: {error}")
