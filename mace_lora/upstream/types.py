"""What comes from mace-torch, by the part of it that we use.

These are protocols: mace-torch's own classes fit them, and so does whatever a backend or a test
puts in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

Tensors = dict[str, torch.Tensor]
# Names of numbers or tensors, as mace-torch logs them; some are None
Metrics = dict[str, object]


class Number(Protocol):
    """A float, or an array or tensor of one number."""

    def __float__(self) -> float: ...

    def __mul__(self, other: int, /) -> Number: ...


class Graph(Protocol):
    """One frame (`AtomicData`): positions in A, energy in eV, forces in eV/A, stress in eV/A^3.

    Labels are there with weight 0 where the frame has none.
    """

    positions: torch.Tensor
    node_attrs: torch.Tensor
    edge_index: torch.Tensor
    cell: torch.Tensor | None
    pbc: torch.Tensor | None
    energy: torch.Tensor | None
    energy_weight: torch.Tensor
    forces: torch.Tensor | None
    forces_weight: torch.Tensor
    stress: torch.Tensor | None
    stress_weight: torch.Tensor

    def __getitem__(self, name: str, /) -> torch.Tensor: ...

    def __setitem__(self, name: str, value: torch.Tensor | None, /) -> None: ...

    def to_dict(self) -> Tensors: ...


class Batch(Protocol):
    """Several graphs as one; atoms of frame i are ptr[i] to ptr[i + 1]."""

    ptr: torch.Tensor
    positions: torch.Tensor
    energy: torch.Tensor
    forces: torch.Tensor
    weight: torch.Tensor
    num_graphs: int

    def __getitem__(self, name: str, /) -> torch.Tensor: ...

    def __setitem__(self, name: str, value: torch.Tensor, /) -> None: ...

    def to(self, device: torch.device | str) -> Batch: ...

    def to_dict(self) -> Tensors: ...


class Dataset(Protocol):
    """Graphs by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Graph: ...


class Loader(Protocol):
    """Batches of a data set, in an order drawn from `generator`."""

    dataset: Dataset
    batch_size: int
    generator: torch.Generator
    batch_sampler: torch.utils.data.BatchSampler

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Scheduler(Protocol):
    """mace-torch's LRScheduler around one of torch's."""

    lr_scheduler: torch.optim.lr_scheduler.LRScheduler

    def step(self, metrics: float) -> None: ...

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None: ...


class StageTwo(Protocol):
    """What changes with `--swa` at epoch `start`."""

    start: int
    loss_fn: torch.nn.Module
    scheduler: torch.optim.swa_utils.SWALR


class Average(Protocol):
    """An exponential moving average of weights (torch_ema)."""

    decay: float
    num_updates: int | None
    shadow_params: list[torch.Tensor]

    def average_parameters(self) -> AbstractContextManager[None]: ...

    def load_state_dict(self, state_dict: dict[str, object]) -> None: ...


class Logger(Protocol):
    """Writes lines of metrics to a file."""

    @property
    def path(self) -> str: ...

    def log(self, metrics: Metrics) -> None: ...


class Plotter(Protocol):
    """mace-torch's pictures of a run (`--plot`)."""

    plot_frequency: int

    def plot(self, epoch: int, model: torch.nn.Module, rank: int) -> None: ...


class ElementTable(Protocol):
    """Elements of a model, in the order of its one-hot vectors."""

    zs: Sequence[int]


class HeadConfig(Protocol):
    """What mace-torch is told of one head's data."""

    head_name: str
    train_file: str | list[str]
    test_dir: str | None
    statistics_file: str | None
    mean: float | None
    std: float | None
    avg_num_neighbors: float
    compute_avg_num_neighbors: bool
    atomic_numbers: str | None
    E0s: str | None
    z_table: ElementTable  # of the elements in its frames


@dataclass(frozen=True)
class TrainArguments:
    """What mace-torch's script hands to its `train`, as far as it is used here."""

    model: torch.nn.Module
    loss_fn: torch.nn.Module
    train_loader: Loader
    valid_loaders: dict[str, Loader]
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler
    max_num_epochs: int
    patience: int
    logger: Logger
    eval_interval: int
    output_args: dict[str, bool]
    device: torch.device
    log_errors: str
    swa: StageTwo | None = None
    ema: Average | None = None
    max_grad_norm: float | None = 10.0
    log_wandb: bool = False
    plotter: Plotter | None = None
    distributed_model: torch.nn.Module | None = None
    rank: int = 0
    save_all_checkpoints: bool = False
    distributed: bool = False

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> TrainArguments:
        """Of the keywords of a call of `train`."""
        return cls(**{f.name: keywords[f.name] for f in fields(cls) if f.name in keywords})
