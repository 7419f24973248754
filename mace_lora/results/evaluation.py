"""Errors of a model on labelled frames: energies, forces and stress, by group and by element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase.data import chemical_symbols

from mace_lora.errors import ConfigError, DataError
from mace_lora.frames.reading import configuration_of
from mace_lora.model.description import heads as heads_of
from mace_lora.results.labelled import Array, LabelledFrames, Values
from mace_lora.upstream import predicting
from mace_lora.upstream.answers import Answers
from mace_lora.upstream.inputs import inputs_of

UNITS = {"energy": "meV/atom", "forces": "meV/Å", "stress": "meV/Å³"}
# meV per atom: no model is that wrong on the energies that it was trained for; it has other E0s
FAR = 1000.0


@dataclass(frozen=True)
class Errors:
    """Errors over part of the frames.

    Attributes:
        part: "all", "group" or "element".
        name: of the group or element.
        count: of frames; of atoms for an element.
        mae, rmse: by quantity, in UNITS; a quantity without labels is missing.
    """

    part: str
    name: str
    count: int
    mae: dict[str, float]
    rmse: dict[str, float]


def head_of_each(
    frames: LabelledFrames, model: torch.nn.Module, called: str, head: str | None = None
) -> list[str]:
    """The head of `model` that predicts each frame.

    Args:
        frames: may name heads themselves, as mace-torch's key `head`.
        model: with one head or several.
        called: what messages call it.
        head: the one that was asked for, if any.

    Raises:
        ConfigError: the model has several, and it can't be told which one is meant.
    """
    known = heads_of(model)
    if head in known or len(known) == 1:
        return [head if head in known else known[0]] * len(frames.atoms)
    own = [str(a.info.get(frames.keys["head"])) for a in frames.atoms]
    if head is None and set(own) <= set(known):
        return own
    default = [name for name in known if name.lower() == "default"]
    if head is None and default:  # as MACECalculator does
        return default[:1] * len(frames.atoms)
    none = f", and none called {head}" if head else ""
    raise ConfigError(
        f"{called} has several heads, {', '.join(known)}{none}: choose one with "
        f"--head={known[-1]}, or write head=... into each frame of {frames.name}"
    )


def predict_values(
    model: torch.nn.Module,
    frames: LabelledFrames,
    heads: Sequence[str],
    batch_size: int = 16,
    answers: Answers | None = None,
) -> Values:
    """What `model` predicts for `frames`, whose elements it must know; stress where labelled.

    Args:
        model: predicts.
        frames: as `with_inputs` gives them for it.
        heads: of the model, one for each frame.
        batch_size: frames at once, or fewer where they have `predicting.MOST_ATOMS`.
        answers: what it has predicted so far.

    Raises:
        DataError: no energies and forces come out of this kind of model.
    """
    want_stress = bool(np.isfinite(frames.labels.stress).any())
    read = {name: frames.keys[name] for name in inputs_of(model)}
    configurations = [
        configuration_of(atoms, read, head) for atoms, head in zip(frames.atoms, heads, strict=True)
    ]
    if answers is None:
        batches = (
            predicting.configurations_to_batch(part, model)
            for part in predicting.in_parts(
                configurations, lambda c: len(c.atomic_numbers), predicting.MOST_ATOMS, batch_size
            )
        )
        predicted = predicting.predict(model, batches, compute_stress=want_stress)
        found = {name: value.cpu().double().numpy() for name, value in predicted.items()}
    else:
        found = answers.predict(model, configurations, compute_stress=want_stress)
    if "energy" not in found or "forces" not in found:
        raise DataError(f"a {type(model).__name__} predicts no energies and forces to compare")
    sizes = np.array([len(a) for a in frames.atoms])
    stress = np.full((len(sizes), 3, 3), np.nan)
    if want_stress and "stress" in found:
        stress = found["stress"]
    return Values(found["energy"] / sizes, found["forces"], stress)


def with_fitted_e0s(frames: LabelledFrames, predicted: Values) -> Values:
    """`predicted` with energies shifted by one number per element, the best fit to the labels.

    For labels of another method than the model's, which count energies from other E0s.
    """
    known = np.isfinite(frames.labels.energy)
    if not known.any():
        return predicted
    elements = sorted(set(frames.numbers))
    shares = np.array([[np.mean(a.numbers == z) for z in elements] for a in frames.atoms])
    left = (frames.labels.energy - predicted.energy)[known]
    shifts = np.linalg.lstsq(shares[known], left, rcond=None)[0]
    return replace(predicted, energy=predicted.energy + shares @ shifts)


def errors(frames: LabelledFrames, predicted: Values) -> list[Errors]:
    """Over all frames, per group where there are several, and per element (forces alone)."""
    everything = np.ones(len(frames.atoms), dtype=bool)
    rows = [_errors(frames, predicted, "all", "all", everything)]
    groups = sorted(set(frames.groups))
    if len(groups) > 1:
        rows += [_errors(frames, predicted, "group", g, frames.groups == g) for g in groups]
    for z in sorted(set(frames.numbers)):
        mine = frames.numbers == z
        difference = predicted.forces[mine] - frames.labels.forces[mine]
        mae, rmse = _statistics({"forces": difference})
        rows.append(Errors("element", chemical_symbols[z], int(mine.sum()), mae, rmse))
    return rows


def _errors(frames: LabelledFrames, predicted: Values, part: str, name: str, mine: Array) -> Errors:
    of_atoms = np.repeat(mine, [len(a) for a in frames.atoms])
    mae, rmse = _statistics(
        {
            "energy": (predicted.energy - frames.labels.energy)[mine],
            "forces": (predicted.forces - frames.labels.forces)[of_atoms],
            "stress": (predicted.stress - frames.labels.stress)[mine],
        }
    )
    return Errors(part, name, int(mine.sum()), mae, rmse)


def _statistics(
    differences: dict[str, Array],
) -> tuple[dict[str, float], dict[str, float]]:
    """MAE and RMSE by quantity, in UNITS, over what is labelled."""
    mae, rmse = {}, {}
    for quantity, values in differences.items():
        values = 1e3 * values[np.isfinite(values)]
        if values.size:
            mae[quantity] = float(np.abs(values).mean())
            rmse[quantity] = float(np.sqrt((values**2).mean()))
    return mae, rmse


def as_json(rows: Sequence[Errors]) -> list[dict[str, object]]:
    """Plain data, with the units in the keys' place: see UNITS."""
    return [vars(row) for row in rows]
