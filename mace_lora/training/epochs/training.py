"""The epochs of a run: what is optimised and averaged, each step, each validation."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mace_lora.config import RunOptions
from mace_lora.errors import Diverged
from mace_lora.model.injection import adapters
from mace_lora.results.progress import History, ProgressBar
from mace_lora.training.epochs.loop import Loop
from mace_lora.training.epochs.signals import StopRequest
from mace_lora.training.epochs.speed import Speed
from mace_lora.training.epochs.steplog import StepLog
from mace_lora.training.epochs.steps import Steps
from mace_lora.upstream import names as upstream

# So many times the loss before training (or 1, if that is more) is no training any more
EXPLODED = 1e6


class Training:
    """Our functions for the epochs of upstream's training loop.

    Args:
        args: the parsed flags, as upstream takes them.
        title: what the learning curve is called.
        options: of the run, beside mace-torch's own.
        stop: says whether a signal has asked the run to end.
        sources: tells from which files and frames items of a data set came.
        adapter: method and options by flag, for wandb.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        title: str,
        options: RunOptions,
        stop: StopRequest,
        sources: Callable[[list[Any]], str],
        adapter: dict[str, Any],
    ) -> None:
        self.args = args
        self.adapter = adapter
        self.options = options
        self.speed = Speed(options.step)
        self.steps = Steps(options)
        self.title = title
        self.stop = stop
        self.sources = sources
        self.loop: Loop | None = None
        self.valid_sets: list[Any] = []
        self.valid_by_head: dict[str, Any] = {}
        self.n_frames = 0  # in the training set
        self.history = History()
        self.bar: ProgressBar | None = None

    def substitutes(self) -> dict[str, Any]:
        """Our functions by key of `upstream.NAMES`."""
        return {
            **self.speed.substitutes(),
            "params_options": self.params_options,
            "lbfgs": self.lbfgs,
            "ema": self.ema,
            "count_parameters": self.count_trainable,
            "train": self.train,
            "take_step": self.take_step,
            "log_errors": self.log_errors,
        }

    @staticmethod
    def count_trainable(module: torch.nn.Module) -> int:
        """Upstream counts frozen parameters as trainable ones."""
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    def params_options(self, args: argparse.Namespace, model: torch.nn.Module) -> dict[str, Any]:
        """Upstream sorts parameters by the names of layers, and so misses some of the adapters'.

        Ours: a group per part of the model with upstream's learning-rate factors, every trainable
        parameter in one of them, all with the weight decay that was asked for.
        """
        factors = json.loads(args.lr_params_factors)
        keys = {
            "node_embedding": "embedding_lr_factor",
            "interactions": "interactions_lr_factor",
            "products": "products_lr_factor",
            "readouts": "readouts_lr_factor",
        }
        own = {
            id(adapter.get_parameter(name)): factor
            for _, adapter in adapters(model)
            for name, factor in adapter.lr_factors().items()
        }
        groups: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = name.partition(".")[0], own.get(id(parameter), 1.0)
                groups.setdefault(key, []).append(parameter)
        logging.info(
            f"Weight decay {args.weight_decay} acts on all adapter parameters, on no frozen one"
        )
        return {
            "params": [
                {
                    "name": part if factor == 1 else f"{part} x {factor:g}",
                    "params": parameters,
                    "weight_decay": args.weight_decay,
                    "lr": factor * factors.get(keys.get(part, ""), 1.0) * args.lr,
                }
                for (part, factor), parameters in groups.items()
            ],
            "lr": args.lr,
            "amsgrad": args.amsgrad,
            "betas": (args.beta, 0.999),
        }

    def lbfgs(self, params: Any, **keywords: Any) -> torch.optim.Optimizer:
        """Upstream hands LBFGS the frozen parameters too, and moves them."""
        return torch.optim.LBFGS([p for p in params if p.requires_grad], **keywords)

    def ema(self, parameters: Any, decay: float) -> Any:
        """Upstream averages the frozen parameters too, which costs time and memory for nothing."""
        original = upstream.original("ema")
        return original([p for p in parameters if p.requires_grad], decay=decay)

    def train(self, **keywords: Any) -> None:
        """Our own loop, which can be left and continued at any step; see `loop`."""
        self.valid_sets = [loader.dataset for loader in keywords["valid_loaders"].values()]
        self.valid_by_head = {n: v.dataset for n, v in keywords["valid_loaders"].items()}
        self.n_frames = len(keywords["train_loader"].dataset)
        keywords["logger"] = StepLog(keywords["logger"], self._judge)
        self.loop = loop = Loop(self.stop, self.steps, self.speed.batches, **keywords)
        if loop.log_wandb and loop.rank == 0:  # mace-torch tells wandb of its own flags alone
            trained = self.count_trainable(loop.model)
            upstream.module("wandb").config.update({**self.adapter, "trained_parameters": trained})
        loop.resume()
        steps = len(loop.train_loader)
        done = loop.at.epoch * steps + loop.at.steps
        self.steps.begin(steps, done)
        total = max(loop.max_num_epochs * steps, done)
        epochs_left = -(-(total - done) // max(steps, 1))
        loop.at.way = self.speed.plan(
            loop.model, loop.train_loader, loop.valid_loaders, epochs_left, loop.at.way
        )
        with ProgressBar(total, steps, done=done, enabled=loop.rank == 0) as self.bar:
            loop.run()
        self.speed.say_what_was_gained()
        loop.checkpoints.training_is_over()
        if loop.rank == 0 and self.history:
            self._draw_learning_curve()

    def _draw_learning_curve(self) -> None:
        picture = Path(self.args.model_dir) / f"{self.args.name}_learning_curve.png"
        try:
            self.history.plot(picture, title=self.title)
        except Exception as error:  # a picture is no reason to lose the model that is saved next
            logging.warning(f"no learning curve: {type(error).__name__}: {error}")

    def take_step(self, **keywords: Any) -> Any:
        """Upstream's step, computed the chosen way and seen by the bar."""
        loss, metrics = self.steps.take(self.speed.take_step, **keywords)
        where = self._where()
        if torch.is_tensor(metrics["loss"]):  # on a device that works on meanwhile
            return loss, {**metrics, "where": where}
        self._judge(float(metrics["loss"]), where)
        return loss, metrics

    def _where(self) -> tuple[int, int, list[int]]:
        """Epoch, step and frames of the step that is being done."""
        if self.loop is None:  # mace-torch's own loop runs
            return 0, 0, []
        return self.loop.at.epoch, self.loop.at.steps, self.loop.frames_of_this_step()

    def _judge(self, loss: float, where: tuple[int, int, list[int]]) -> None:
        """The loss of the step at (epoch, step, frames).

        Raises:
            Diverged: it is not finite, or has exploded.
        """
        if not np.isfinite(loss) or self._has_exploded(loss):
            epoch, step, indices = where
            frames = self._frames(indices)
            raise self._diverged("training loss", loss, f"epoch {epoch}, step {step}{frames}")
        if self.bar is not None:
            self.bar.step(loss)

    def _has_exploded(self, loss: Any) -> bool:
        """Far above the loss before training; upstream goes on until it is NaN, and then too."""
        initial = self.loop.at.initial_loss if self.loop is not None else np.inf
        return np.isfinite(initial) and float(loss) > EXPLODED * max(initial, 1.0)

    def _diverged(self, what: str, loss: Any, where: str) -> Diverged:
        """Upstream takes NaN for the best loss so far, and saves the model that gave it."""
        at, lr = self.loop.at, self.args.lr
        # LBFGS takes no notice of --lr
        flag, advice = f"--lr={lr:g}", f"try --lr={lr / 10:g}"
        if self.args.lbfgs:
            flag, advice = "--lbfgs", "leave out --lbfgs"
        if at.epoch > 0:
            advice = (
                f"the best epoch so far is kept in {self.args.checkpoints_dir}. For a model of it "
                f"repeat the command with --restart_latest --max_num_epochs={at.epoch}; to train "
                f"on, {advice}, with --restart_latest or from the start"
            )
        return Diverged(
            f"the {what} is {float(loss):g} at {where}: training has diverged at {flag}; {advice}"
        )

    def _frames(self, indices: list[int]) -> str:
        """The frames of a step, for a message."""
        if not indices:
            return ""
        dataset = self.loop.train_loader.dataset
        found = self.sources([dataset[i] for i in indices])
        return f", on frames {indices} of the training set" + (f" ({found})" if found else "")

    def log_errors(
        self, valid_loss: Any, eval_metrics: Any, logger: Any, log_errors: str, *rest: Any
    ) -> None:
        """Upstream's log line of a validation, kept for the learning curve."""
        original = upstream.original("log_errors")
        original(valid_loss, eval_metrics, logger, log_errors, *rest)
        epoch, head = (*rest, None, "Default")[:2]
        if not np.isfinite(float(valid_loss)) or self._has_exploded(valid_loss):
            at = self.loop.at
            where = f"epoch {at.epoch}, step {at.steps}"
            raise self._diverged(f"validation loss of head {head}", valid_loss, where)
        self.history.add(epoch, head, eval_metrics)
        if self.bar is not None:
            self.bar.validated(eval_metrics)
