"""Files that ASE reads, as mace-torch's Configurations."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import ase
import ase.io

from mace_lora.errors import DataError
from mace_lora.frames import labels
from mace_lora.frames.keys import candidates, find, remedy
from mace_lora.upstream import graphs
from mace_lora.upstream.graphs import Configuration
from mace_lora.upstream.inputs import Input

ISOLATED = "IsolatedAtom"
_HEAD = "head"


def read_atoms(path: str | Path, most: int | None = None) -> list[ase.Atoms]:
    """The frames of a file, the first `most` of them.

    Raises:
        DataError: ASE can't read it.
    """
    try:
        # ASE would take what follows an @ in the name of a file for frames to choose
        found = ase.io.read(
            path, index=":" if most is None else f":{most}", do_not_split_by_at_sign=True
        )
    except Exception as error:  # ASE raises many kinds for a broken file
        raise DataError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    return found if isinstance(found, list) else [found]


class XyzFrames:
    """The frames of one file that mace-torch trains on or tests with.

    Args:
        path: the file.
        keys: the name of each property in it.
        head: the head that learns them.
        type_weights: the weight of each type of frames (`--config_type_weights`).
        wanted: labels that are looked for under evident keys, too; see `keys`.
        inputs: what the model reads of frames beside atoms and cell.
        factors: by label, what turns its unit in the file into ours; see `units`.
        atoms: the frames, where they are read already.

    Attributes:
        keys: the name of each property in the file.
        factors: by label, what its number in the file was multiplied by.
        energies: E0s by atomic number, from the isolated atoms that `set_isolated_aside` found.

    Raises:
        DataError: the file, or a label in it, can't be read.
    """

    def __init__(
        self,
        path: str,
        keys: Mapping[str, str],
        head: str = "Default",
        type_weights: Mapping[object, float] | None = None,
        wanted: Collection[str] = (),
        inputs: Mapping[str, Input] | None = None,
        factors: Mapping[str, float] | None = None,
        atoms: list[ase.Atoms] | None = None,
    ) -> None:
        self.path = path
        weights = {labels.type_of(k): float(w) for k, w in (type_weights or {}).items()}
        self._atoms = read_atoms(path) if atoms is None else atoms
        found = find(path, self._atoms, keys, wanted, inputs)
        for sentence in found.said:
            logging.info(sentence)
        self.keys = found.names
        self.factors = dict(factors or {})
        self._numbers = list(range(len(self._atoms)))  # in the file
        self._configurations = [
            self._configuration(i, atoms, head, weights) for i, atoms in enumerate(self._atoms)
        ]
        self.energies: dict[int, float] = {}

    def _configuration(
        self, number: int, atoms: ase.Atoms, head: str, type_weights: Mapping[str, float]
    ) -> Configuration:
        try:
            return configuration_of(atoms, self.keys, head, type_weights, self.factors)
        except DataError as error:
            raise DataError(f"{self.path}, frame {number}: {error}") from None

    def set_isolated_aside(self, keep: bool) -> None:
        """Take E0s from the isolated atoms of the file, which are then no frames to train on.

        Args:
            keep: they are (`--keep_isolated_atoms`).

        Raises:
            DataError: one of them has no energy; mace-torch takes 0 for it.
        """
        alone = [i for i, frame in enumerate(self._configurations) if _is_isolated(frame)]
        for i in alone:
            frame = self._configurations[i]
            energy = frame.properties.get("energy")
            if energy is None:
                raise DataError(
                    f"{self.path}, frame {self._numbers[i]} is an isolated atom "
                    f"(config_type={ISOLATED}) without an energy under the key "
                    f"{self.keys['energy']!r}, so that there is no E0 to take from it: give it "
                    "one, or remove the isolated atoms and give --E0s"
                )
            self.energies[int(frame.atomic_numbers[0])] = float(energy)
        if alone:
            logging.info(f"E0s are taken from the isolated atoms of {self.path}")
        if keep:
            return
        rest = sorted(set(range(len(self._configurations))) - set(alone))
        self._configurations = [self._configurations[i] for i in rest]
        self._numbers = [self._numbers[i] for i in rest]

    @property
    def configurations(self) -> list[Configuration]:
        return self._configurations

    def __iter__(self) -> Iterator[Configuration]:
        return iter(self._configurations)

    def place(self, number: int) -> str:
        """0-based, as in ase.io.read(path, index)."""
        return str(self._numbers[number])

    def kind(self, number: int) -> str:
        """What the file says a frame is: its `head`, where it has one, and its `config_type`."""
        kinds = {
            _HEAD: self._atoms[self._numbers[number]].info.get(_HEAD),
            "config_type": self._configurations[number].config_type,
        }
        told = {k: v for k, v in kinds.items() if v not in (None, "", labels.DEFAULT_TYPE)}
        return ", ".join(f"{name}={value}" for name, value in told.items())

    def called(self, label: str) -> str:
        return f"{label} (key {self.keys.get(label, label)!r})"

    def remedy(self, label: str) -> str:
        missing = {name: self.keys[name] for name in ("energy", "forces", label)}
        lacking = {
            name: key
            for name, key in missing.items()
            if name == label or all(labels.under(a, key) is None for a in self._atoms)
        }
        return f"under the key {self.keys[label]!r}: {remedy(self._atoms, lacking)}"

    def may_hold(self, label: str) -> bool:
        return bool(candidates(self._atoms, label))


def configuration_of(
    atoms: ase.Atoms,
    keys: Mapping[str, str],
    head: str = "Default",
    type_weights: Mapping[str, float] | None = None,
    factors: Mapping[str, float] | None = None,
) -> Configuration:
    """A frame as mace-torch's Configuration, with weight 0 for each label that it lacks.

    Args:
        atoms: the frame.
        keys: the name of each property in it, labels and others.
        head: the head that learns it.
        type_weights: weight by type of frames.
        factors: by label, what turns its unit in the file into ours.

    Raises:
        DataError: a label or a weight can't be right.
    """
    found = labels.labels(atoms, keys, factors)
    others = {name: labels.under(atoms, keys[name]) for name in keys.keys() - labels.DEFAULT_KEYS}
    others[_HEAD] = head
    properties = {name: found.get(name, others.get(name)) for name in keys}
    kind = labels.type_of(atoms.info.get("config_type", labels.DEFAULT_TYPE))
    return graphs.configuration(
        atomic_numbers=atoms.numbers.copy(),
        positions=atoms.positions.copy(),
        properties=properties,
        property_weights={
            name: 0.0 if value is None else labels.weight(atoms, f"config_{name}_weight")
            for name, value in properties.items()
        },
        cell=atoms.cell.array.copy(),
        pbc=tuple(bool(p) for p in atoms.pbc),
        weight=labels.weight(atoms, "config_weight") * (type_weights or {}).get(kind, 1.0),
        config_type=kind,
        head=head,
    )


def _is_isolated(frame: Configuration) -> bool:
    return len(frame.atomic_numbers) == 1 and frame.config_type == ISOLATED
