"""For a training loop of one's own: batches of frames, and steps as fast as the command's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import ase
import torch

from mace_lora.backends.base import Backend
from mace_lora.backends.choice import choose
from mace_lora.backends.registry import AUTO
from mace_lora.errors import ConfigError, did_you_mean
from mace_lora.frames import attached, checks
from mace_lora.frames.checks import Rules
from mace_lora.frames.keys import DEFAULTS, EVIDENT_LABELS
from mace_lora.frames.reading import XyzFrames, read_atoms
from mace_lora.model.description import atomic_numbers
from mace_lora.model.description import heads as heads_of
from mace_lora.model.injection import check_model
from mace_lora.parsing import ExistingFile
from mace_lora.upstream import graphs, predicting
from mace_lora.upstream.inputs import inputs_of
from mace_lora.upstream.types import Batch, Graph

_backends: WeakKeyDictionary[torch.nn.Module, tuple[str, Backend]] = WeakKeyDictionary()


@contextmanager
def fast_steps(model: torch.nn.Module, backend: str = AUTO) -> Iterator[torch.nn.Module]:
    """Within `with fast_steps(model):` it computes as in the command: the same, faster.

    Energies, forces, stress and all their gradients are those of the model up to rounding. Weights
    may change in the block, as an optimiser changes them; adapters may be neither attached nor
    merged. At all other times the model is mace-torch's own.

    Args:
        model: of mace-torch, with adapters or without.
        backend: a value of `--step`: auto takes the compiled kernels on a CPU, where there is a C++
            compiler, and mace-torch's code elsewhere.

    Raises:
        ConfigError: no such backend, or this is no model.
        CannotServe: no backend can compute this model.
    """
    check_model(model)
    known = _backends.get(model)
    if known is None or known[0] != backend:
        known = _backends[model] = backend, choose(backend, model)
    with known[1].active(model):
        yield model


class Batches:
    """mace-torch's batches of some frames, as often as they are gone through.

    `len(batches)` is their number. Each is on the device of the model and in its precision:
    `model(batch.to_dict())` takes it, and `batch.energy`, `batch.forces`, `batch.stress` are the
    labels, of shapes (n_frames,), (n_atoms, 3) and (n_frames, 3, 3). Where a frame lacks a label
    that is 0, and so is its weight, `batch.energy_weight` and so on, of shape (n_frames,).
    """

    def __init__(
        self, graphs: list[Graph], model: torch.nn.Module, batch_size: int, shuffle: bool
    ) -> None:
        self._graphs, self._shuffle, self._size = graphs, shuffle, batch_size
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    def __len__(self) -> int:
        return -(-len(self._graphs) // self._size)

    def __iter__(self) -> Iterator[Batch]:
        n = len(self._graphs)
        order = torch.randperm(n).tolist() if self._shuffle else range(n)
        for first in range(0, n, self._size):
            chosen = [self._graphs[i] for i in order[first : first + self._size]]
            yield predicting.batch_on(chosen, self._device, self._dtype)


def batches(
    frames: str | Path | ase.Atoms | Iterable[ase.Atoms],
    model: torch.nn.Module,
    *,
    batch_size: int = 10,
    shuffle: bool = False,
    head: str | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    keys: Mapping[str, str] | None = None,
) -> Batches:
    """Labelled frames as mace-torch's batches for a model, checked as the command does.

        for batch in batches("train.xyz", model, shuffle=True):
            output = model(batch.to_dict(), training=True)
            loss = (output["forces"] - batch.forces).square().mean()

    Args:
        frames: a file, or `ase.Atoms`; labels stand under REF_energy (eV), REF_forces (eV/Å) and
            REF_stress (eV/Å³), or are results of attached calculators.
        model: gives elements, cutoff and heads, precision and device.
        batch_size: frames of a batch; the last may have fewer.
        shuffle: another order each time, drawn from torch's random numbers.
        head: of the model, the last one if None.
        energy_key, forces_key, stress_key: where else these labels stand.
        keys: the same for all that a frame may hold: virials, dipole, total_charge, ...

    Raises:
        DataError: no such file; frames that can't be read, or have unknown elements, labels of a
            wrong shape, atoms on one spot.
        ConfigError: no such head, or a batch size that makes no sense.
    """
    check_model(model)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: a whole number of 1 or more is needed")
    known_heads = heads_of(model)
    if head is not None and head not in known_heads:
        raise ConfigError(f"the model has no head {head!r}; {did_you_mean(head, known_heads)}")
    own = {"energy": energy_key, "forces": forces_key, "stress": stress_key}
    asked = {**(keys or {}), **{label: key for label, key in own.items() if key is not None}}
    unknown = sorted(asked.keys() - DEFAULTS.keys() - inputs_of(model).keys())
    if unknown:
        raise ConfigError(
            f"keys: nothing is called {unknown[0]!r}; {did_you_mean(unknown[0], DEFAULTS)}"
        )
    called, atoms = _read(frames, asked)
    read = XyzFrames(
        called,
        {**DEFAULTS, **asked},
        head or known_heads[-1],
        wanted=EVIDENT_LABELS,
        inputs=inputs_of(model),
        atoms=atoms,
    )
    rules = Rules(
        known=("the model", set(atomic_numbers(model))),
        needed=(),
        cutoff=float(model.get_buffer("r_max")),
        padded=graphs.sees_cells(model),
        inputs=inputs_of(model),
    )
    checks.check(read, rules)
    return Batches(predicting.graphs_of(read.configurations, model), model, batch_size, shuffle)


def _read(
    frames: str | Path | ase.Atoms | Iterable[ase.Atoms], asked: Mapping[str, str]
) -> tuple[str, list[ase.Atoms]]:
    """What messages call the frames, and the frames."""
    if not isinstance(frames, (str, Path)):
        return "frames", attached.labelled(frames, "frames", asked)
    path = str(Path(frames).expanduser())
    ExistingFile(path).check(f"frames={frames}")
    return path, read_atoms(path)
