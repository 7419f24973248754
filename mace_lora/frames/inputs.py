"""What a model reads of each frame beside atoms and cell: whether it is there, and makes sense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from mace_lora.errors import DataError
from mace_lora.upstream.inputs import Input

# Inputs that hardly any file has, and that nobody misses
_SELDOM = ("external_field", "fermi_level")


def check(
    path: str,
    frames: Iterable[tuple[str, int, Mapping[str, object | None]]],
    inputs: Mapping[str, Input],
    keys: Mapping[str, str],
) -> list[str]:
    """Check the inputs of a model in the frames of one file.

    Args:
        path: of the file, for messages.
        frames: for each frame where it stands, its number of atoms, and its properties by name.
        inputs: of the model, by name.
        keys: under which they stand in the file, for messages.

    Returns:
        A sentence for each input for which the model takes a default in some frames or all.

    Raises:
        DataError: a value that the model can't take, or one that is missing and has no default.
    """
    places: dict[str, list[str]] = {name: [] for name in inputs}
    count = 0
    for place, n_atoms, properties in frames:
        count += 1
        for name, item in inputs.items():
            value = properties.get(name)
            if value is None:
                places[name].append(place)
                continue
            problem = _problem(item, value, n_atoms)
            if problem:
                raise DataError(
                    f"{path}, frame {place}: {item.called} (key {keys.get(name, item.key)!r}) "
                    f"is {value}: {problem}"
                )
    said = (
        _gaps(path, item, keys.get(name, item.key), places[name], count)
        for name, item in inputs.items()
    )
    return [sentence for sentence in said if sentence]


def _problem(item: Input, value: object, n_atoms: int) -> str | None:
    try:
        numbers = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return "a number is needed"
    if not np.isfinite(numbers).all():
        return "a finite number is needed"
    if item.per_atom and numbers.shape[:1] != (n_atoms,):
        return f"one for each of the {n_atoms} atoms is needed"
    if item.lowest is None or item.highest is None:
        return None
    if (numbers != np.round(numbers)).any():
        return "the model knows whole numbers alone"
    if (numbers < item.lowest).any() or (numbers > item.highest).any():
        return f"the model knows {item.lowest} to {item.highest}"
    return None


def _gaps(path: str, item: Input, key: str, places: list[str], count: int) -> str | None:
    if not places:
        return None
    called = f"{item.called} (key {key!r})"
    if item.default is None:
        raise DataError(
            f"{path}, frame {places[0]} has no {called}: the model needs one for each frame"
        )
    if len(places) == count:
        if item.name in _SELDOM:
            return None
        return f"{path} has no {called}: the model takes {item.default:g} for every frame"
    return (
        f"{path}: {len(places)} of {count} frames have no {called}, frame {places[0]} the first: "
        f"the model takes {item.default:g} for them"
    )
