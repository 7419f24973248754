"""Where a run of upstream's script computes: steps and evaluations, by the chosen way."""

from __future__ import annotations

import contextlib
import logging
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from mace_lora.backends.base import CannotServe, Way, draws
from mace_lora.backends.choice import Forecast, choose
from mace_lora.backends.padding import Shape, plan
from mace_lora.upstream import names as upstream

# Shuffled batches that the shapes for training are planned on
SAMPLED_BATCHES = 300
MOST_FRAMES = 2000
FRAMES_FOR_AUTO = 200  # are enough for an estimate: frames on disk get their neighbours when read
# The share of a device's free memory that the training set may take, and its size on a CPU
RESIDENT_SHARE, RESIDENT_ON_CPU = 0.25, 2**30
_NEED_SHAPES = ("compile", "cudagraph")


class Speed:
    """Our functions for what upstream computes again and again.

    Args:
        name: the value of `--step`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.way = choose("auto" if name in _NEED_SHAPES else name)
        self.evaluating = self.way
        self._resident: Any = None
        self._whole: Any = None
        self._expected = 0.0  # seconds of a fused step, where "auto" has estimated them
        self._seconds: list[float] = []  # that steps took
        self._kept: dict[int, list[Any]] = {}  # by id of a validation set's loader: its batches

    def substitutes(self) -> dict[str, Any]:
        """Our functions by key of `upstream.NAMES`."""
        return {
            "take_step": self.take_step,
            "step_of_lbfgs": self.step_of_lbfgs,
            "evaluate": self.evaluate,
            "evaluate_at_the_end": self.evaluate,
        }

    # ------------------------------------------------------------------ before the first step

    def plan(
        self,
        model: torch.nn.Module,
        train_loader: Any,
        valid_loaders: Mapping[str, Any],
        epochs: int,
        before: str = "",
    ) -> str:
        """Settle how the run computes.

        Args:
            model: with its adapters.
            train_loader, valid_loaders: of mace-torch.
            epochs: that are ahead.
            before: what an earlier part of this run had settled, "" for none.

        Returns:
            The name of the way of the training steps, for a later part of this run.
        """
        name = self.name
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        if name == "auto":
            name = self._for_auto(model, train_loader, epochs, before, several)
        if name not in _NEED_SHAPES:
            return name
        shapes, waste = plan(_shuffled_batches(train_loader))
        every = list(shapes)
        if self.name != "auto":  # which leaves evaluations as they are: they are few
            for loader in valid_loaders.values():
                every += plan(_batches_in_order(loader))[0]
        self.way = choose(name, every)
        if self.name != "auto":
            self.evaluating = self.way
        logging.info(
            f"--step={name}: training batches are padded to fixed shapes, "
            f"{100 * waste:.0f} % of their edges are padding"
        )
        if name == "cudagraph" and not several:  # gradients are sent around between the two parts
            self._prepare_capture(model, train_loader, valid_loaders, shapes)
        return name

    def _for_auto(
        self, model: torch.nn.Module, loader: Any, epochs: int, before: str, several: bool
    ) -> str:
        """What "auto" stands for: the same again for a run of the same kind."""
        if next(model.parameters()).device.type != "cpu":
            self.way = self.evaluating = choose("eager")
            logging.info(
                "--step=auto: eager on this device; --step=cudagraph captures whole steps and "
                "replays them, for small molecules in small batches"
            )
            return self.way.name
        if before in ("fused", "compile"):
            logging.info(f"--step=auto: {before}, as this run has begun")
            return before
        if several or draws(model):
            return "fused"
        from mace_lora.backends.compiled import expected_seconds

        batches = _shuffled_batches(loader, FRAMES_FOR_AUTO)
        edges = sum(b[0] for b in batches) / len(batches)
        cost = expected_seconds(_inner(model), plan(batches)[0])
        forecast = Forecast.of(_inner(model), epochs * len(loader), edges, cost)
        self._expected = forecast.step
        name = "compile" if forecast.compiling_pays else "fused"
        logging.info(f"--step=auto: {name}. {forecast}")
        return name

    def _prepare_capture(
        self,
        model: torch.nn.Module,
        loader: Any,
        valid_loaders: Mapping[str, Any],
        shapes: Sequence[Shape],
    ) -> None:
        """What goes beyond forward and backward: the update, and frames that lie on the device."""
        from mace_lora.backends.resident import Resident
        from mace_lora.backends.whole import WholeStep

        device = next(model.parameters()).device
        try:
            recorder = self.way.way.recorder(device)
        except CannotServe:
            return  # said once the first step is taken
        self._whole = WholeStep(recorder)
        sets = valid_loaders.values()
        self._kept = {id(v): [] for v in sets if _bytes_of(v.dataset) < _room(device)}
        needed = _bytes_of(loader.dataset)
        if needed > _room(device):
            logging.info(f"{needed / 1e9:.1f} GB of training frames stay with the loader")
            return
        frames = [f.to_dict() for f in loader.dataset]
        try:
            self._resident = Resident(frames, shapes, float(model.r_max), device, recorder)
        except CannotServe as reason:
            logging.info(f"Batches are collated by the loader: {reason}")

    # ------------------------------------------------------------------ steps and evaluations

    def batches(self, loader: Any) -> Any:
        """The batches of `loader`, the training set's, in its order."""
        if self._resident is None:
            return loader
        from mace_lora.backends.resident import ResidentBatches

        return ResidentBatches(self._resident, loader)

    def take_step(self, model: torch.nn.Module, **keywords: Any) -> Any:
        """Upstream's step on one batch."""
        optimizer, ema = keywords["optimizer"], keywords["ema"]
        if self._whole is not None and self._whole.serves(model, optimizer, ema):
            return self._whole.take(self.way, model, **keywords)
        with _computing(model, self.way):
            done = upstream.original("take_step")(model=model, **keywords)
        if self._expected:
            self._seconds.append(done[1]["time"])
        return done

    def say_what_was_gained(self) -> None:
        """A line after the last step, where "auto" has chosen by an estimate."""
        if self._seconds:
            usual = statistics.median(self._seconds)
            logging.info(
                f"--step=auto: {self.way.name}, {usual:.3g} s per step; "
                f"{self._expected:.3g} s were expected of a fused one"
            )

    def step_of_lbfgs(self, model: torch.nn.Module, **keywords: Any) -> Any:
        """Upstream's step of LBFGS, which calls the model with changing weights."""
        with _computing(model, self.way, constant_weights=False):
            return upstream.original("step_of_lbfgs")(model=model, **keywords)

    def evaluate(self, model: torch.nn.Module, *rest: Any, **keywords: Any) -> Any:
        """Upstream's evaluation of a data set."""
        loader = keywords.get("data_loader")
        if id(loader) in self._kept:
            kept = self._kept[id(loader)]
            kept += [] if kept else [batch.to(keywords["device"]) for batch in loader]
            keywords["data_loader"] = kept
        with _computing(model, self.evaluating):
            return upstream.original("evaluate")(model, *rest, **keywords)


def _inner(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _bytes_of(dataset: Any) -> int:
    """What a data set takes, if its frames are like its first one."""
    from mace_lora.backends.resident import Resident

    return len(dataset) * Resident.bytes_of(dataset[0].to_dict())


def _room(device: torch.device) -> float:
    """Bytes for frames on `device`."""
    if device.type == "cuda":
        return RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    return RESIDENT_ON_CPU


@contextlib.contextmanager
def _computing(
    model: torch.nn.Module, way: Way, *, constant_weights: bool = True
) -> Iterator[None]:
    """`model` computes by `way` meanwhile, its effective weights only once."""
    with way.active(_inner(model)):
        keep = constant_weights and way.caches_weights
        with parametrize.cached() if keep else contextlib.nullcontext():
            yield


def _frame_sizes(dataset: Any, most: int = MOST_FRAMES) -> list[tuple[int, int]]:
    """(edges, atoms) of each frame, or of `most` of them."""
    step = -(-len(dataset) // most)
    frames = (dataset[i] for i in range(0, len(dataset), step))
    return [(int(f.edge_index.shape[1]), int(f.num_nodes)) for f in frames]


def _sum(frames: list[tuple[int, int]]) -> tuple[int, int, int]:
    return sum(f[0] for f in frames), sum(f[1] for f in frames), len(frames)


def _shuffled_batches(loader: Any, most: int = MOST_FRAMES) -> list[tuple[int, int, int]]:
    """(edges, atoms, frames) of some batches as a shuffled loader may give them."""
    frames = _frame_sizes(loader.dataset, most)
    size, draw = min(loader.batch_size, len(loader.dataset)), random.Random(0)
    take = draw.sample if size <= len(frames) else draw.choices
    return [_sum(take(frames, k=size)) for _ in range(SAMPLED_BATCHES)]


def _batches_in_order(loader: Any) -> list[tuple[int, int, int]]:
    frames, size = _frame_sizes(loader.dataset), loader.batch_size
    return [_sum(frames[i : i + size]) for i in range(0, len(frames), size)]
