"""Where a run of upstream's script computes: steps and evaluations, by the chosen way."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from mace_lora.host import upstream
from mace_lora.step.base import Way, draws
from mace_lora.step.choice import Auto, choose
from mace_lora.step.padding import plan

# Shuffled batches that the shapes for training are planned on
SAMPLED_BATCHES = 300
MOST_FRAMES = 2000
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
        self._auto: Auto | None = None
        self._train_loader: Any = None

    def substitutes(self) -> dict[str, Any]:
        """Our functions by key of `upstream.NAMES`."""
        return {
            "take_step": self.take_step,
            "step_of_lbfgs": self.step_of_lbfgs,
            "evaluate": self.evaluate,
            "evaluate_at_the_end": self.evaluate,
        }

    def plan(self, train_loader: Any, valid_loaders: Mapping[str, Any], epochs: int) -> None:
        """Before the first step: how many there will be, and of which sizes."""
        self._train_loader = train_loader
        alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
        if self.name == "auto" and alone:
            self._auto = Auto(epochs * len(train_loader))
        if self.name not in _NEED_SHAPES:
            return
        if not alone:
            logging.warning(
                f"--step={self.name} is for one process, going on with {self.way.name} in several"
            )
            return
        shapes, waste = plan(_shuffled_batches(train_loader))
        for loader in valid_loaders.values():
            shapes += plan(_batches_in_order(loader))[0]
        self.way = self.evaluating = choose(self.name, shapes)
        logging.info(
            f"--step={self.name}: training batches are padded to fixed shapes, "
            f"{100 * waste:.0f} % of their edges are padding"
        )

    def take_step(self, model: torch.nn.Module, **keywords: Any) -> Any:
        """Upstream's step on one batch."""
        with _computing(model, self.way):
            done = upstream.original("take_step")(model=model, **keywords)
        if self._auto is not None and self._auto.is_time(done[1]["time"]):
            self._reconsider(self._auto, model)
        return done

    def _reconsider(self, auto: Auto, model: torch.nn.Module) -> None:
        if draws(model):
            return
        from mace_lora.step.compiled import expected_seconds

        shapes, _ = plan(_shuffled_batches(self._train_loader))
        if auto.compiling_pays(self.way, expected_seconds(_inner(model), shapes)):
            self.way = choose("compile", shapes)  # evaluations stay fused

    def step_of_lbfgs(self, model: torch.nn.Module, **keywords: Any) -> Any:
        """Upstream's step of LBFGS, which calls the model with changing weights."""
        with _computing(model, self.way, constant_weights=False):
            return upstream.original("step_of_lbfgs")(model=model, **keywords)

    def evaluate(self, model: torch.nn.Module, *rest: Any, **keywords: Any) -> Any:
        """Upstream's evaluation of a data set."""
        with _computing(model, self.evaluating):
            return upstream.original("evaluate")(model, *rest, **keywords)


def _inner(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def _computing(
    model: torch.nn.Module, way: Way, *, constant_weights: bool = True
) -> Iterator[None]:
    """`model` computes by `way` meanwhile, its effective weights only once."""
    with way.active(_inner(model)):
        keep = constant_weights and way.caches_weights
        with parametrize.cached() if keep else contextlib.nullcontext():
            yield


def _frame_sizes(dataset: Any) -> list[tuple[int, int]]:
    """(edges, atoms) of each frame, or of MOST_FRAMES of them."""
    step = -(-len(dataset) // MOST_FRAMES)
    frames = (dataset[i] for i in range(0, len(dataset), step))
    return [(int(f.edge_index.shape[1]), int(f.num_nodes)) for f in frames]


def _sum(frames: list[tuple[int, int]]) -> tuple[int, int, int]:
    return sum(f[0] for f in frames), sum(f[1] for f in frames), len(frames)


def _shuffled_batches(loader: Any) -> list[tuple[int, int, int]]:
    """(edges, atoms, frames) of some batches as a shuffled loader may give them."""
    frames = _frame_sizes(loader.dataset)
    size = min(loader.batch_size, len(frames))
    draw = random.Random(0)
    return [_sum(draw.sample(frames, size)) for _ in range(SAMPLED_BATCHES)]


def _batches_in_order(loader: Any) -> list[tuple[int, int, int]]:
    frames, size = _frame_sizes(loader.dataset), loader.batch_size
    return [_sum(frames[i : i + size]) for i in range(0, len(frames), size)]
