"""What to think of a run, in sentences, the most important first; and the next command to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mace_lora.results.compared import VALIDATION, Compared, before_after
from mace_lora.results.evaluation import UNITS
from mace_lora.results.progress import History

FEW_FRAMES = 10  # of validation
OVERFITTED = 2.0  # validation errors, as a multiple of those of training
WORSE = 1.02  # errors, as a multiple of those before training
IMPROVING = 1.1  # errors when three quarters are done, as a multiple of those at the end
OFFSET, MOSTLY = 2.0, 0.8  # meV per atom, and share of the RMSE, from which an offset is told
_LABELS = {"energy": "energy RMSE", "forces": "force RMSE", "stress": "stress RMSE"}
_WEIGHTS = {"energy": "energy_weight", "force": "forces_weight", "stress": "stress_weight"}

# Errors of one set by quantity, as mace-torch calls them
Errors = Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """Sentences for log and page.

    Attributes:
        bad: what is wrong; that a trained quantity ended worse than it began comes first.
        told: what is good to know.
        change: flags with which to try again; empty where nothing is advised.
    """

    bad: tuple[str, ...]
    told: tuple[str, ...]
    change: Mapping[str, object]


def judge(
    history: History,
    training: Mapping[str, Errors],
    n_validation: Mapping[str, int],
    flags: Mapping[str, object],
    sets: Sequence[Compared] = (),
) -> Verdict:
    """
    Args:
        history: validation errors by epoch and head.
        training: errors on the training frames at the end, by head; what is missing isn't judged.
        n_validation: frames, by head.
        flags: of the run.
        sets: frames with predictions before and after.
    """
    change: dict[str, object] = {}
    named = {head: f" ({head})" if len(history.heads()) > 1 else "" for head in history.heads()}
    bad = [text for h, where in named.items() for text in _worse(history, h, where, flags, change)]
    known = {label for head in named for label, *_ in history.changes(head)}
    trained = [q for q, label in _LABELS.items() if label in known]
    bad += _worse_elsewhere(sets, trained)
    if not bad and not history.has_learnt():
        bad.append(
            "the validation loss never fell below that of the foundation model: train longer, or "
            f"try another --lr (it was {flags.get('lr')})"
        )
    told: list[str] = []
    for head, where in named.items():
        bad += _overfitted(history, head, where, training.get(head, {}), flags, change)
        told += _improving(history, head, where, flags, change)
        if 0 < (n := n_validation.get(head, 0)) < FEW_FRAMES:
            told.append(f"a validation of {n} frames says little{where}")
    told += _offsets(sets)
    return Verdict(tuple(bad), tuple(told), change)


def _worse(
    history: History, head: str, where: str, flags: Mapping[str, object], change: dict[str, object]
) -> list[str]:
    found = []
    for label, unit, before, after in history.changes(head):
        if after <= WORSE * before:
            continue
        weight = next(w for name, w in _WEIGHTS.items() if label.startswith(name))
        value, advice = flags.get(weight), ""
        if isinstance(value, (int, float)):
            change[weight] = 10.0 * value
            advice = f": raise --{weight} (it was {value:g})"
        found.append(f"{label} got worse, {before:.1f} -> {after:.1f} {unit}{where}{advice}")
    return found


def _worse_elsewhere(sets: Sequence[Compared], trained: Sequence[str]) -> list[str]:
    """Of frames that the best epoch was not chosen by, where validation says all is well."""
    found = []
    for part in sets:
        before, after = part.rows[0]
        found += [
            f"{quantity} of {part.name} got worse, {before_after(before, after, quantity)} "
            f"{UNITS[quantity]}"
            for quantity in trained
            if part.kind != VALIDATION
            and quantity in after.rmse
            and after.rmse[quantity] > WORSE * before.rmse[quantity]
        ]
    return found


def _offsets(sets: Sequence[Compared]) -> list[str]:
    found = []
    for part in sets:
        mean, rmse = part.offset()
        if abs(mean) > max(OFFSET, MOSTLY * rmse):
            found.append(
                f"energies of {part.name} are off by a constant, {mean:+.1f} of "
                f"{rmse:.1f} meV/atom: forces don't feel it, differences between unlike "
                "compositions do; is the theory the same, and are the E0s?"
            )
    return found


def _overfitted(
    history: History,
    head: str,
    where: str,
    training: Errors,
    flags: Mapping[str, object],
    change: dict[str, object],
) -> list[str]:
    for label, unit, seen, after in history.beside(head, training):
        if label.startswith("force") and after > OVERFITTED * seen:
            change.setdefault("max_num_epochs", max(1, int(str(flags["max_num_epochs"])) // 2))
            return [
                f"overfitted{where}: {label} of training {seen:.1f}, of validation {after:.1f} "
                f"{unit}: more frames, fewer epochs or fewer parameters (rank, targets)"
            ]
    return []


def _improving(
    history: History, head: str, where: str, flags: Mapping[str, object], change: dict[str, object]
) -> list[str]:
    losses = history.losses(head)
    if len(losses) < 4:
        return []
    late = min(losses[: -(-3 * len(losses) // 4)])
    if late > IMPROVING * min(losses) and min(losses) == losses[-1]:
        change.setdefault("max_num_epochs", 2 * int(str(flags["max_num_epochs"])))
        return [f"still improving when it ended{where}: more epochs"]
    return []


def command(verdict: Verdict, name: str, config: str) -> str:
    """A line to paste that repeats the run with the advised changes; "" where there are none."""
    if not verdict.change:
        return ""
    flags = " ".join(f"--{flag}={value:g}" for flag, value in verdict.change.items())
    return f"mace_run_train --config={config} --name={name}_2 {flags}"


def lines(verdict: Verdict, next_command: str) -> list[str]:
    """All of it, for a page or a log."""
    tried = [f"to try next: {next_command}"] if next_command else []
    return [*verdict.bad, *verdict.told, *tried] or ["every error is lower than before training"]
