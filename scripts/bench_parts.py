"""What `bench_step.py` compares: models with adapters, and what a training step of them needs."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

warnings.filterwarnings("ignore")

import mace  # noqa: E402, F401  (prepares e3nn for current torch versions)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from e3nn import o3  # noqa: E402
from mace import modules  # noqa: E402
from torch_ema import ExponentialMovingAverage  # noqa: E402

from mace_lora.backends.base import Backend  # noqa: E402
from mace_lora.config import AdapterConfig  # noqa: E402
from mace_lora.model.injection import inject  # noqa: E402
from mace_lora.training.epochs.computing import Computing  # noqa: E402
from mace_lora.upstream import library, predicting  # noqa: E402
from mace_lora.upstream import names as upstream  # noqa: E402

Step = Callable[[], float]
WANTED = {"forces": True, "virials": False, "stress": False}
UPSTREAM = "mace-torch --lora"
CUEQ = " + cuequivariance"  # after a contender's name: on a model converted to it
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = ["wall"]


def use_clock(name: str) -> None:
    """Time with a clock of CLOCKS from now on."""
    _clock[0] = name


def medium(elements: list[int], channels: int = 128) -> torch.nn.Module:
    """A ScaleShiftMACE of the size of MACE-OFF23 medium, untrained, for `elements`."""
    torch.manual_seed(0)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    return modules.ScaleShiftMACE(
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=len(elements),
        hidden_irreps=o3.Irreps(f"{channels}x0e + {channels}x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=-np.ones((1, len(elements))),
        avg_num_neighbors=14.0,
        atomic_numbers=elements,
        correlation=3,
        gate=torch.nn.functional.silu,
        radial_MLP=[64, 64, 64],
        heads=["Default"],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )


class Contender:
    """A model with adapters and all that a step of it needs.

    Args:
        name: UPSTREAM or a value of `--step`, with or without CUEQ. For full fine-tuning UPSTREAM
            is mace-torch's own, of the model as it is.
        data: the frames it trains on, all in one batch.
        base: makes the model.
        config: the adapter; its rank is upstream's too.
    """

    def __init__(
        self, name: str, data: Data, base: Callable[[], torch.nn.Module], config: AdapterConfig
    ) -> None:
        torch.set_default_dtype(data.dtype)
        self.name, self.model = name, base().to(data.dtype).to(data.device)
        self.device = data.device
        self.loader = data.loader()
        self.batch = next(iter(self.loader)).to(self.device)
        if name.endswith(CUEQ):  # before the adapters, which mace-torch's own order drops
            self.model = upstream.original("to_cueq")(self.model, device=self.device)
        self._backend: Backend | None = None
        if name.startswith(UPSTREAM):
            if config.method != "full":  # which mace-torch trains without adapters
                rank = config.options.rank if config.method == "lora" else 4
                upstream.original("inject")(self.model, rank=rank, alpha=1.0)
            self._take = upstream.original("take_step")
            self._evaluate: Any = upstream.original("evaluate")
        else:
            inject(self.model, config)
            computing = Computing(name.removesuffix(CUEQ))
            self._take, self._evaluate = computing.take_step, computing.evaluate
            self._backend = computing.backend(self.model)
        self.optimizer = torch.optim.Adam(self.trained(), lr=1e-4, amsgrad=True)
        self.ema = ExponentialMovingAverage(self.trained(), decay=0.99)
        self.loss_fn = modules.WeightedEnergyForcesLoss(1.0, 100.0).to(self.device)

    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self) -> float:
        """Seconds of one training step on a batch that is there."""
        return timed(lambda: self._step(self.batch))

    def step_and_batch(self) -> float:
        """Seconds of one training step, its batch made from the data set."""
        return timed(lambda: self._step(next(iter(self.loader))))

    def _step(self, batch: Any) -> None:
        self._take(
            model=self.model,
            loss_fn=self.loss_fn,
            batch=batch,
            optimizer=self.optimizer,
            ema=self.ema,
            output_args=WANTED,
            max_grad_norm=10.0,
            device=self.device,
        )

    def evaluate(self) -> float:
        """Seconds to evaluate the batch: energies, forces and metrics."""
        return timed(
            lambda: self._evaluate(
                model=self.model,
                loss_fn=self.loss_fn,
                data_loader=[self.batch],
                output_args=WANTED,
                device=self.device,
            )
        )

    def forward(self) -> float:
        """Seconds of energies and forces alone: the floor of a step."""
        backend = self._backend
        with contextlib.nullcontext() if backend is None else backend.active(self.model):
            return timed(lambda: self.model(self.batch.to_dict(), compute_force=True))

    def gradients(self) -> list[torch.Tensor]:
        """Of the weights, after one step: Adam's first mean is a tenth of the clipped gradient."""
        self._step(next(iter(self.loader)))
        return [self.optimizer.state[p]["exp_avg"].clone() for p in self.trained()]

    def after(self, steps: int) -> dict[str, torch.Tensor]:
        """Weights and averages after some whole steps."""
        for _ in range(steps):
            self._step(next(iter(self.loader)))
        found = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        return found | {f"EMA {i}": s.clone() for i, s in enumerate(self.ema.shadow_params)}


class Data:
    """Frames of one batch, as a data set of mace-torch."""

    def __init__(self, frames: list[Any], model: torch.nn.Module, device: str) -> None:
        self.dtype = next(model.parameters()).dtype
        self.device = torch.device(device)
        self.frames = predicting.frames_to_data(frames, model)

    def loader(self) -> Any:
        return library.loader(self.frames, len(self.frames))

    def sizes(self) -> tuple[int, int, int]:
        """(edges, atoms, frames)."""
        edges = sum(f.edge_index.shape[1] for f in self.frames)
        return edges, sum(f.num_nodes for f in self.frames), len(self.frames)


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call."""
    clock = CLOCKS[_clock[0]]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def take_turns(steps: dict[str, Step], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """The median seconds of each, over `rounds` in which each has one turn."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    return {name: statistics.median(values) for name, values in seconds.items()}
