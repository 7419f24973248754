"""What a model reads of each frame beside atoms and cell: whether it is there, and makes sense."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mace_lora.errors import DataError
from mace_lora.upstream.inputs import Input

# Inputs that hardly any file has, and that nobody misses
_SELDOM = ("external_field", "fermi_level")


class InputCheck:
    """The inputs of a model in the frames of one file, seen one frame after the other.

    Args:
        path: of the file, for messages.
        inputs: of the model, by name.
        keys: under which they stand in the file, for messages.
    """

    def __init__(
        self, path: str, inputs: Mapping[str, Input], keys: Mapping[str, str] | None = None
    ) -> None:
        self._path, self._inputs, self._keys = path, inputs, keys or {}
        self._without: dict[str, list[str]] = {name: [] for name in inputs}
        self._count = 0

    def see(self, place: str, n_atoms: int, properties: Mapping[str, object]) -> None:
        """Look at one frame: where it stands, its number of atoms, its properties by name.

        Raises:
            DataError: a value that the model can't take, or one that is missing without a default.
        """
        self._count += 1
        for item in self._inputs.values():
            value = properties.get(item.name)
            if value is None and item.default is None:
                raise DataError(
                    f"{self._path}, frame {place} has no {self._called(item)}: the model needs "
                    "one for each frame"
                )
            if value is None:
                self._without[item.name].append(place)
                continue
            problem = _problem(item, value, n_atoms)
            if problem:
                raise DataError(
                    f"{self._path}, frame {place}: {self._called(item)} is {value}: {problem}"
                )

    def gaps(self) -> list[str]:
        """A sentence for each input for which the model takes a default, in some frames or all."""
        said = []
        for name, places in self._without.items():
            item = self._inputs[name]
            if not places or (len(places) == self._count and name in _SELDOM):
                continue
            what = f"no {self._called(item)}: the model takes {item.default:g} for"
            if len(places) == self._count:
                said.append(f"{self._path} has {what} every frame")
            else:
                said.append(
                    f"{self._path}: {len(places)} of {self._count} frames, frame {places[0]} the "
                    f"first, have {what} them"
                )
        return said

    def _called(self, item: Input) -> str:
        key = self._keys.get(item.name)
        return f"{item.called} (key {key!r})" if key else item.called


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
