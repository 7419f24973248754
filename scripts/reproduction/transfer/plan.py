"""Which runs a comparison consists of, and the models and frames that they start from."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ase.io
import torch
from ase import Atoms

from mace_lora import load_foundation
from mace_lora.errors import ConfigError
from mace_lora.files import whole_file
from mace_lora.model.description import atomic_numbers
from mace_lora.trust import frames as asked
from reproduction import datasets, foundation, protocol, runs
from reproduction.datasets import System
from reproduction.transfer import frames
from reproduction.transfer.methods import Candidate

TRAINING_SETS = {
    "aspirin": System("rmd17", "aspirin"),
    "ethanol": System("rmd17", "ethanol"),
    "azobenzene": System("rmd17", "azobenzene"),
    "acac": System("acac", "acac"),
    "3bpa": System("3bpa", "3bpa"),
}
TARGET = {"rmd17": "MD", "acac": "300K", "3bpa": "300K"}
CONFIG = protocol.CONFIGS / "transfer.yaml"


@dataclass(frozen=True)
class TransferRun(runs.Run):
    """A run from a start that is the same for all methods: all elements of the foundation model,
    E0s fitted to the training frames.
    """

    candidate: Candidate = field(kw_only=True)
    rate: float = field(kw_only=True)
    steps: int = field(kw_only=True)
    start: Path = field(kw_only=True)
    foundation: str = field(kw_only=True)

    @property
    def needs_file(self) -> bool:
        return False  # the start is one

    @property
    def label(self) -> str:
        return f"{self.foundation}, {self.system.label}, {self.folder.name}"


@dataclass(frozen=True)
class Numbers:
    """How many frames of each kind are asked about."""

    test: int = 60
    others: int = 20
    compressed: int = 10


def called(foundation_model: str) -> str:
    """The name of a foundation model in folders and tables."""
    return Path(foundation_model).stem


def make(
    candidates: list[Candidate],
    systems: list[System],
    rates: list[float],
    steps: int,
    seed: int,
    n_train: int,
    foundation_model: str,
    extra: dict[str, Any],
    out: Path,
) -> list[TransferRun]:
    """The runs of one budget and seed, training set by training set."""
    found = []
    for system in systems:
        start = out / "starts" / f"{system.name}-n{n_train}.model"
        for candidate in candidates:
            for rate in rates:
                method = candidate.method
                settings = protocol.settings(CONFIG, system, method, foundation_model, extra)
                settings = protocol.fit_budget(settings, n_train, steps)
                settings["lr"] = rate
                settings.pop("seed", None)
                named = {k: v for k, v in extra.items() if k not in protocol.NOT_IN_NAMES}
                given = [f"{k}={v}" for k, v in named.items() if k in settings]
                name = [method.name, f"lr{rate:g}", *given, f"s{steps}", f"seed{seed}"]
                folder = out / "runs" / system.dataset / system.name / "-".join(name)
                settings["foundation_model"] = os.path.relpath(start, folder)
                found.append(
                    TransferRun(
                        *(system, method, seed, n_train, settings, folder),
                        data=out.parent / "data" / system.dataset / system.name,
                        test_frames=1,  # the usual evaluation tells nothing that ours doesn't
                        candidate=candidate,
                        rate=rate,
                        steps=steps,
                        start=start,
                        foundation=called(foundation_model),
                    )
                )
    return found


def write_start(run: TransferRun, foundation_model: str) -> None:
    """The model that all methods start from on a training set, unless it is there.

    Elements that the training frames don't hold keep the E0s of the foundation model.
    """
    if run.start.exists():
        return
    model = load_foundation(foundation_model, dtype=torch.float64)
    known = set(atomic_numbers(model))
    if not run.system.numbers <= known:
        missing = Atoms(sorted(run.system.numbers - known)).get_chemical_symbols()
        raise ConfigError(
            f"--foundation_model={foundation_model} doesn't know {', '.join(missing)} of "
            f"{run.system.label}; leave it out of --train"
        )
    foundation.fit_e0s(model, runs.training_frames(run))
    run.start.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(run.start) as temporary:
        torch.save(model, temporary)


@functools.lru_cache(maxsize=1)  # runs come training set by training set
def questions(
    data: Path, dataset: str, n_train: int, known: tuple[int, ...], others: str, n: Numbers
) -> frames.Questions:
    """What models trained on one set are asked.

    Args:
        data: the prepared files of the training set.
        dataset: its data set.
        n_train: so many of its frames are trained on.
        known: atomic numbers of the foundation model.
        others: comma-separated molecules of rMD17, for those trained on one of them.
        n: how many frames.
    """
    tests = {
        path.stem.removeprefix("test_"): ase.io.read(path, index=":")
        for path in sorted(data.glob("test_*.xyz"))
    }
    notes = []
    target = tests.pop(TARGET[dataset], None)
    if target is None:  # 3BPA's is not to be had everywhere
        target = ase.io.read(data / "train.xyz", index=":")[n_train:]
        notes.append("target: frames of the training file that are not trained on")
    if not target:
        raise ConfigError(f"{data} has no frames left to test on; lower --train_frames")
    if dataset == "rmd17":
        folders = [data.parent / name for name in others.split(",") if name != data.name]
        tests = {f.name: ase.io.read(f / "test_MD.xyz", index=":") for f in folders}
    own = frames.elements(target)
    fit, left_out = frames.askable({k: v[: n.others] for k, v in tests.items()}, known)
    return frames.Questions(
        valid=ase.io.read(data / "valid.xyz", index=":"),
        target=target[: n.test],
        others=fit,
        broad={k: asked.molecules(known, s) for k, s in asked.RATTLES.items()},
        dimers=asked.dimers(own),
        foreign=[asked.dimer(a, b) for a, b in asked.pairs(known) if not {a, b} <= own],
        compressed=asked.compressed(target[: n.compressed]),
        notes=notes + left_out,
    )


def needed(systems: list[System], others: str) -> list[System]:
    """All systems whose files are read."""
    names = others.split(",") if any(s.dataset == "rmd17" for s in systems) else []
    return list(dict.fromkeys([*systems, *(datasets.select("rmd17", names) if names else [])]))
