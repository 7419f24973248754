"""Frames as mace-torch's graphs: labels that are missing weigh nothing, cells are the frame's own.

Every frame that a model sees passes here: those of .xyz files, of HDF5 and LMDB, of replay, and
those of which only predictions are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from mace_lora.upstream import names as upstream
from mace_lora.upstream.types import Graph

# Models that see a cell otherwise than through neighbours: by what is periodic with it
_LONG_RANGE = ("PolarMACE", "MACELES")


# One of a frame: energies, forces, ..., or a text such as its head; None where it lacks the label
Label: TypeAlias = np.ndarray | float | str | None


class KeySpecification(Protocol):
    """mace-torch's: property -> its name in a file."""

    info_keys: Mapping[str, str]
    arrays_keys: Mapping[str, str]


class Configuration(Protocol):
    """mace-torch's Configuration: one frame with its labels, None for one that it lacks."""

    atomic_numbers: npt.NDArray[np.int64]
    positions: npt.NDArray[np.float64]
    properties: dict[str, Label]
    property_weights: dict[str, np.ndarray | float]
    cell: npt.NDArray[np.float64] | None
    pbc: Sequence[bool] | None
    weight: float
    config_type: str
    head: str


def configuration(**fields: object) -> Configuration:
    """mace-torch's Configuration with these fields."""
    made: Configuration = upstream.original("frame")(**fields)
    return made


def without_gaps(config: Configuration) -> Configuration:
    """`config` with weight 0 for each label that it lacks.

    mace-torch gives weight 1 to some of them (ASE's own keys, also in what `mace_prepare_data` has
    written from such files) and trains them as 0.
    """
    gaps = [name for name, value in config.properties.items() if value is None]
    gaps += ["stress"] if is_placeholder(config) else []
    if not any(np.any(config.property_weights.get(name, 1.0)) for name in gaps):
        return config
    weights = {**config.property_weights, **dict.fromkeys(gaps, 0.0)}
    return replace(config, property_weights=weights)  # type: ignore[type-var]


def periodic_in(frame: Configuration) -> tuple[bool, bool, bool]:
    """The directions in which a frame repeats."""
    if frame.pbc is None:
        return (False, False, False)
    first, second, third = map(bool, frame.pbc)
    return first, second, third


def is_placeholder(config: Configuration) -> bool:
    """Whether a stress is there for the form's sake: exactly zero, in a frame without periodicity.

    Files that hold molecules beside crystals have it; mace-torch predicts next to nothing there.
    """
    stress = config.properties.get("stress")
    return stress is not None and not any(periodic_in(config)) and not np.any(stress)


@dataclass
class Graphs:
    """Stands in the place of mace-torch's `AtomicData`, whose `from_config` makes graphs.

    In directions that are not periodic mace-torch replaces a frame's lattice vectors by long ones,
    and then divides by the volume that they span: the stress of a slab comes out many times too
    small. A graph made here has the frame's own cell, where it has a volume; without periodicity
    its vectors count nowhere but in that volume.

    Attributes:
        padded: keep mace-torch's cell after all, for models with long-range parts: they see it.
    """

    padded: bool = False

    @classmethod
    def of(cls, model: torch.nn.Module) -> Graphs:
        """The graphs that `model` takes."""
        return cls(padded=sees_cells(model))

    def from_config(self, config: Configuration, **keywords: object) -> Graph:
        """mace-torch's graph of one frame; the keywords are those of `AtomicData.from_config`."""
        graph: Graph = upstream.original("graphs").from_config(without_gaps(config), **keywords)
        cell = config.cell
        if not self.padded and not all(periodic_in(config)) and has_volume(cell):
            graph.cell = torch.as_tensor(cell, dtype=graph.positions.dtype)
        return graph


def sees_cells(model: torch.nn.Module) -> bool:
    """Whether the energy of a model depends on lattice vectors that are not periodic."""
    return any(kind.__name__ in _LONG_RANGE for kind in type(model).__mro__)


def is_long_range(kind: str) -> bool:
    """Whether `--model` names a kind whose energy depends on such vectors."""
    return kind in _LONG_RANGE


def has_volume(cell: npt.ArrayLike | None) -> bool:
    """Whether three lattice vectors (rows, A) span one."""
    if cell is None:
        return False
    (a, b, c), (d, e, f), (g, h, i) = np.asarray(cell, dtype=float).tolist()
    return bool(abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)) > 1e-6)


def key_names(specification: KeySpecification) -> Mapping[str, str]:
    """A KeySpecification of mace-torch's as one table: property -> its name in a file."""
    return {**specification.info_keys, **specification.arrays_keys}


def items(graph: Graph, *names: str) -> Iterator[tuple[str, object]]:
    """The fields of a graph or batch that are not None, those of `names` alone where there are any;
    in the place of mace-torch's `Data.__call__`.
    """
    fields = graph.to_dict()
    for name in names or fields:
        if name in fields:
            yield name, fields[name]
