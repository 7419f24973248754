"""An ASE calculator for a base model whose adapters are swapped without reloading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import ase
import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.data import chemical_symbols

from mace_lora.api.files import load_adapter
from mace_lora.errors import ConfigError, DataError
from mace_lora.frames.inputs import InputCheck
from mace_lora.frames.keys import ALIASES
from mace_lora.frames.labels import under
from mace_lora.model import committee, places
from mace_lora.model.description import atomic_numbers, heads
from mace_lora.model.merging import merge
from mace_lora.upstream import loading
from mace_lora.upstream.calculating import SKIN, calculator
from mace_lora.upstream.devices import check_device
from mace_lora.upstream.inputs import Input, inputs_of

if TYPE_CHECKING:
    from mace_lora.upstream.library import MACECalculator

# Those of MACECalculator
INFO_KEYS = {
    "total_spin": "spin",
    "total_charge": "charge",
    "external_field": "external_field",
}

Choice = str | Path | Sequence[str | Path] | None


class MaceLoraCalculator(Calculator):
    """Energies (eV), forces (eV/A), stress (eV/A^3): what `MACECalculator` gives on merged models.

    Args:
        base: the foundation model (as a model, or by name or file as in `load_foundation`); it is
            read once.
        adapter: a directory, or several for a committee (mean, and `energy_var`, `forces_comm`,
            `stress_var` among the results), or None for the base model itself. The folder of a
            committee that `--members` has trained gives calibrated standard deviations as well:
            `energy_std` (eV) and `forces_std` (n_atoms, 3), eV/A.
        device: cpu, cuda, ...
        default_dtype: float32 or float64; nothing for the precision of the adapter's run.
        info_keys, arrays_keys: where in `atoms.info` and `atoms.arrays` the inputs of a model
            stand, such as {"total_charge": "charge"}; by default those of `MACECalculator`, or
            whatever is evident: charge or total_charge, spin or total_spin or multiplicity.
        skin: A, by which the list of neighbours reaches beyond the cutoff: it is kept until an atom
            has moved by half of this, and results don't depend on it.
        keywords: for `MACECalculator`: head, enable_cueq, compile_mode, ...

    Raises:
        ArtefactError: an adapter is broken or belongs to another base.
        ConfigError: no such device or precision, a negative skin, or the adapters of a committee
            are for different elements or heads.
        FoundationModelError: there is no such base model.

    `set_adapter` chooses another adapter later; those used before are kept, so that going back and
    forth costs nothing.
    """

    def __init__(
        self,
        base: torch.nn.Module | str | Path,
        adapter: Choice = None,
        device: str = "cpu",
        default_dtype: str = "",
        info_keys: dict[str, str] | None = None,
        arrays_keys: dict[str, str] | None = None,
        skin: float = SKIN,
        **keywords: object,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of ASE, as those below
        if default_dtype not in ("", "float32", "float64"):
            raise ConfigError(f"default_dtype={default_dtype!r}: float32 or float64 is needed")
        if not 0 <= skin < float("inf"):
            raise ConfigError(f"skin={skin!r}: a length in A, 0 or more, is needed")
        check_device(device, default_dtype, called="device=")
        self.base = loading.given(base, device, flag="base")
        self._settings = {
            "device": device,
            "default_dtype": default_dtype,
            "info_keys": dict(INFO_KEYS if info_keys is None else info_keys),
            "arrays_keys": dict(arrays_keys or {}),
            **keywords,
        }
        self._skin = skin
        self._keys_given = info_keys is not None
        self._merged: dict[Path | str | None, torch.nn.Module] = {}
        self._calculators: dict[tuple[Path | str | None, ...], MACECalculator] = {}
        self.set_adapter(adapter)

    def set_adapter(self, adapter: Choice) -> None:
        """Use another adapter, a committee of several, or None: the base model itself."""
        folders = [adapter] if adapter is None or isinstance(adapter, (str, Path)) else adapter
        self._factors: Mapping[str, float] | None = None
        if len(folders) == 1 and committee.is_one(folders[0]):
            together = committee.read(str(folders[0]))
            folders, self._factors = together.members, together.factors
        key = tuple(None if folder is None else places.resolved(folder) for folder in folders)
        if not key:
            raise ConfigError("a committee without adapters: give one or more, or None")
        if key not in self._calculators:
            models = [self._model(folder) for folder in key]
            _check_committee(models, key)
            settings = dict(self._settings)
            if not settings["default_dtype"]:
                own = next(models[0].parameters()).dtype
                settings["default_dtype"] = str(own).removeprefix("torch.")
            self._calculators[key] = calculator(models, self._skin, **settings)
        self._current = self._calculators[key]
        self.adapter = adapter
        self.implemented_properties = list(dict.fromkeys(self._current.implemented_properties))
        self.reset()  # type: ignore[no-untyped-call]

    def _model(self, folder: Path | str | None) -> torch.nn.Module:
        if folder not in self._merged:
            if folder is None:
                model = deepcopy(self.base)
            else:
                model = merge(load_adapter(self.base, folder), keep_gates=True)
            self._merged[folder] = model
        return self._merged[folder]

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Called by ASE.

        Raises:
            DataError: the model doesn't know one of the elements, or a charge or spin.
        """
        if atoms is not None:
            self._check_elements(atoms)
            self._find_inputs(atoms)
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        self._current.calculate(self.atoms, properties, system_changes)
        self.results = dict(self._current.results)
        if self._factors is not None:
            spread = np.std(self.results["forces_comm"], axis=0, ddof=1)
            variance = self.results["energy_var"] * len(self._current.models)
            variance /= len(self._current.models) - 1  # MACECalculator divides by their number
            self.results["energy_std"] = self._factors["energy"] * float(np.sqrt(variance))
            self.results["forces_std"] = self._factors["forces"] * spread

    def check_state(self, atoms: ase.Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation: also what a model reads of `atoms.info`."""
        changes: list[str] = super().check_state(atoms, tol)  # type: ignore[no-untyped-call]
        if changes or self.atoms is None:
            return changes
        for name in ("info", "arrays"):
            now, then = getattr(atoms, name), getattr(self.atoms, name)
            if any(not _same(now.get(k), then.get(k)) for k in self._read[name]):
                changes.append(name)
        return changes

    @property
    def _read(self) -> dict[str, set[str]]:
        """Names in `atoms.info` and `atoms.arrays` that a prediction may depend on."""
        current = self._current
        aliases = {key for keys in ALIASES.values() for key in keys}
        return {
            "info": {*current.info_keys.values(), *aliases},
            "arrays": {*current.arrays_keys.values(), current.charges_key},
        }

    def get_descriptors(
        self, atoms: ase.Atoms | None = None, invariants_only: bool = True, num_layers: int = -1
    ) -> np.ndarray | list[np.ndarray]:
        """Features of each atom, as `MACECalculator.get_descriptors` gives them."""
        found: np.ndarray | list[np.ndarray] = self._current.get_descriptors(
            self._given(atoms), invariants_only, num_layers
        )
        return found

    def get_hessian(self, atoms: ase.Atoms | None = None) -> np.ndarray:
        """Second derivatives, eV/A^2, as `MACECalculator.get_hessian` gives them."""
        found: np.ndarray = self._current.get_hessian(self._given(atoms))
        return found

    def _given(self, atoms: ase.Atoms | None) -> ase.Atoms:
        atoms = self.atoms if atoms is None else atoms
        if atoms is None:
            raise ConfigError("give atoms: nothing has been computed yet")
        self._check_elements(atoms)
        self._find_inputs(atoms)
        return atoms

    def _find_inputs(self, atoms: ase.Atoms) -> None:
        """Let MACECalculator look where the inputs of the model stand in these atoms."""
        tables = self._current.info_keys, self._current.arrays_keys
        inputs = inputs_of(self._current.models[0])
        for item in inputs.values():
            tables[item.per_atom].setdefault(item.name, item.key)
            if not self._keys_given and item.name in ALIASES:
                tables[0][item.name] = _evident_key(atoms, item)
        keys = {**tables[0], **tables[1]}
        values = {name: under(atoms, keys[name]) for name in inputs}
        InputCheck("atoms", inputs, keys).see("0", len(atoms), values)

    def _check_elements(self, atoms: ase.Atoms) -> None:
        known = set(self._current.z_table.zs)
        unknown = set(atoms.numbers.tolist()) - known
        if unknown:
            names = [" ".join(chemical_symbols[z] for z in sorted(n)) for n in (known, unknown)]
            raise DataError(
                f"the model knows {names[0]}, the atoms hold {names[1]} too (an adapter is for the "
                "elements that its run was trained on)"
            )


def _evident_key(atoms: ase.Atoms, item: Input) -> str:
    """The key of a charge or spin in `atoms.info`, MACECalculator's where there is none.

    Raises:
        DataError: there are several, which differ.
    """
    present = [key for key in ALIASES[item.name] if atoms.info.get(key) is not None]
    if any(not _same(atoms.info[key], atoms.info[present[0]]) for key in present[1:]):
        raise DataError(
            f"atoms.info holds {' and '.join(present)}, which differ: say which is the "
            f"{item.called} with info_keys={{{item.name!r}: {present[0]!r}}}"
        )
    own = INFO_KEYS[item.name]
    return present[0] if present and own not in present else own


def _same(one: object, other: object) -> bool:
    if one is None or other is None:
        return one is other
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


def _check_committee(committee: list[torch.nn.Module], key: tuple[Path | str | None, ...]) -> None:
    places = [(atomic_numbers(model), heads(model)) for model in committee]
    for place, folder in zip(places, key, strict=True):
        if place != places[0]:
            raise ConfigError(
                f"{key[0]} and {folder} can't be a committee: their elements and heads are "
                f"{places[0]} and {place}"
            )
