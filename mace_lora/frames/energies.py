"""E0s as a user gives them: mistakes are told, and more elements than the run has do no harm."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from mace_lora.errors import ConfigError, DataError, FoundationModelError, closest
from mace_lora.frames import isolated_atoms
from mace_lora.frames.checks import symbols
from mace_lora.model.description import e0s, heads
from mace_lora.upstream import names as upstream
from mace_lora.upstream.answers import Answers
from mace_lora.upstream.graphs import Configuration


@contextlib.contextmanager
def gaps_told() -> Iterator[None]:
    """Raises DataError where isolated atoms give E0s for some elements, others having none."""
    try:
        yield
    except KeyError as error:
        if "atomic_energies_dict" not in str(error):
            raise
        raise DataError(
            "the training files hold isolated atoms (config_type=IsolatedAtom), from which E0s are "
            f"taken, but not of every element ({error.args[0]}): add the others, or remove these "
            "and give --E0s"
        ) from error


def with_energies(frames: Iterable[Configuration]) -> list[Configuration]:
    """Those of `frames` that have one."""
    return [frame for frame in frames if frame.properties.get("energy") is not None]


class AtomicEnergies:
    """Our functions between `--E0s` and the model.

    Args:
        all_elements: whether the run keeps all elements of its foundation model; asked when E0s
            are estimated.
        answers: what the foundation model predicts.
    """

    def __init__(
        self, all_elements: Callable[[], bool] = lambda: False, answers: Answers | None = None
    ) -> None:
        self._all_elements = all_elements
        self._answers = answers or Answers()
        self._elements: list[int] = []  # of the columns of the array
        self._given: set[int] = set()  # elements that --E0s names

    def read(self, E0s: str, train_collection: Any, z_table: Any) -> dict[int, float]:
        """Upstream's `get_atomic_energies`, whose errors are about its own lines.

        Raises:
            ConfigError: no word, table or file of E0s, or an element of the run is not in it.
        """
        original = upstream.original("atomic_energies")
        labelled = None if train_collection is None else with_energies(train_collection)
        if str(E0s).lower() == "average" and not labelled:
            raise ConfigError(
                "--E0s=average: no training frame has an energy to average; give --E0s=foundation"
            )
        try:
            found = original(E0s, labelled, z_table)
            energies = {int(z): float(energy) for z, energy in found.items()}
        except Exception as error:  # of ast, json, the file system, a fit
            raise ConfigError(
                f"--E0s={E0s} can't be used ({error}): give estimated, average or foundation, a "
                "table such as '{1: -13.6, 8: -2041.8}' by atomic number, or a .json file of one. "
                f"{closest(str(E0s), ('estimated', 'average', 'foundation'))}".rstrip()
            ) from error
        wrong = [z for z, energy in energies.items() if not math.isfinite(energy)]
        if wrong:
            raise ConfigError(f"--E0s={E0s}: the energy of {symbols(wrong)} is not finite")
        missing = [int(z) for z in z_table.zs if int(z) not in energies]
        if missing:
            raise ConfigError(f"--E0s={E0s} gives no energy for {symbols(missing)}")
        self._given |= energies.keys()
        return energies

    def estimate(self, foundation_model: torch.nn.Module, **keywords: Any) -> dict[int, float]:
        """Upstream's least squares, and what the frames leave open by isolated atoms.

        Upstream runs a float32 foundation model on float64 frames, which TorchScript refuses, and
        predicts frame by frame.
        """
        foundation_model.to(keywords["device"], torch.get_default_dtype())
        labelled = with_energies(keywords["collections_train"])
        energies = iter(self._answers.energies(foundation_model, labelled).tolist())

        def answer(*_: object, **__: object) -> dict[str, torch.Tensor]:
            return {"energy": torch.tensor(next(energies), dtype=torch.float64)}

        vars(foundation_model)["forward"] = answer
        try:
            found = upstream.original("estimate_e0s")(foundation_model=foundation_model, **keywords)
        finally:
            del vars(foundation_model)["forward"]
        fitted = {int(z): float(energy) for z, energy in found.items()}
        frames = [frame.atomic_numbers for frame in with_energies(keywords["collections_train"])]
        own = keywords["foundation_e0s"]
        choice = isolated_atoms.settle(fitted, own, frames, own if self._all_elements() else ())
        isolated_atoms.tell(choice, frames)
        return choice.e0s

    def estimated(
        self, model: torch.nn.Module, frames: list[Configuration], table: Any, device: str
    ) -> dict[int, float]:
        """E0s with which a foundation model comes nearest to the energies of frames.

        Args:
            model: gives its own E0s, the first head's where it has several.
            frames: those without an energy are left out.
            table: the elements, as mace-torch's AtomicNumberTable.
            device: on which to compute.
        """
        own = e0s(model, heads(model)[0])
        if not own:
            raise FoundationModelError("the foundation model has no E0s to estimate others from")
        return self.estimate(
            model,
            foundation_e0s=own,
            collections_train=frames,
            z_table=table,
            device=device,
        )

    def as_array(self, input_data: Any, heads: list[str]) -> np.ndarray:
        """Upstream's `dict_to_array`; remembers which elements the columns are."""
        tables = [t for t in input_data.values() if isinstance(t, dict)]
        self._elements = sorted({int(z) for table in tables for z in table})
        array: np.ndarray = upstream.original("energies_as_array")(input_data, heads)
        return array

    def of_elements(self, energies: np.ndarray | None, elements: list[int]) -> np.ndarray | None:
        """The columns of `elements`; upstream keeps all that were given, and fails in the model."""
        if energies is None or energies.shape[-1] == len(elements):
            return energies
        return energies[:, [self._elements.index(int(z)) for z in elements]]

    def keep_foundations(
        self,
        energies: np.ndarray | None,
        elements: list[int],
        in_frames: list[set[int]],
        model: torch.nn.Module,
    ) -> np.ndarray | None:
        """E0s with the foundation model's own where the run has none, and upstream puts 0.

        Args:
            energies: (heads, elements) in eV.
            elements: the columns.
            in_frames: per head, the elements of its frames, whose E0s are those of the run.
            model: the foundation model.
        """
        own = e0s(model, heads(model)[0])
        if energies is None or not own:
            return energies
        kept = np.array(energies, dtype=float)
        for row, present in zip(np.atleast_2d(kept), in_frames, strict=True):
            for column, z in enumerate(elements):
                if row[column] == 0 and z not in present | self._given:
                    row[column] = own[z]
        return kept
