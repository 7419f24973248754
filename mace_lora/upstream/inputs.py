"""What a model reads of a frame beside its atoms and its cell: the total charge, the spin, ..."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# What mace-torch puts in the place of an input that a frame lacks; there is nothing for others
_DEFAULTS = {
    "total_charge": 0.0,
    "total_spin": 1.0,  # the multiplicity 2S + 1
    "elec_temp": 0.0,
    "fermi_level": 0.0,
    "external_field": 0.0,
    "charges": 0.0,
}
# Inputs that are read in the code of a model, and stand in no table of it
_OF_CLASS = {
    "PolarMACE": ("total_charge", "total_spin", "external_field", "fermi_level"),
    "AtomicDielectricMACE": ("total_charge",),
}


@dataclass(frozen=True)
class Input:
    """One input of a model.

    Attributes:
        name: mace-torch's.
        key: its name in a file, if no flag says otherwise.
        default: what mace-torch takes for a frame without it; None: each frame must have it.
        per_atom: whether each atom has one, rather than each frame.
        lowest, highest: of the whole numbers that the model knows; None for any number.
    """

    name: str
    key: str
    default: float | None
    per_atom: bool = False
    lowest: int | None = None
    highest: int | None = None

    @property
    def called(self) -> str:
        """What messages call it: total charge."""
        return self.name.replace("_", " ")


def inputs_of(model: torch.nn.Module) -> dict[str, Input]:
    """The inputs of a model, by name; most models have none."""
    classes = [kind.__name__ for kind in type(model).__mro__]
    names = [name for kind in classes for name in _OF_CLASS.get(kind, ())]
    found = {name: Input(name, name, _DEFAULTS[name]) for name in names}
    for name, spec in (getattr(model, "embedding_specs", None) or {}).items():
        lowest = highest = None
        if spec["type"] == "categorical":
            lowest = -int(spec.get("offset", 0))
            highest = lowest + int(spec["num_classes"]) - 1
        found[name] = Input(
            name,
            spec.get("key", name),
            _DEFAULTS.get(name),
            spec["per"] == "atom",
            lowest,
            highest,
        )
    return found
