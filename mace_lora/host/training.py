"""The epochs of a run: what is optimised and averaged, each step, each validation."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mace_lora.config import RunOptions
from mace_lora.errors import Diverged
from mace_lora.host import upstream
from mace_lora.host.speed import Speed
from mace_lora.host.steps import Steps
from mace_lora.injection import adapters
from mace_lora.progress import History, ProgressBar


class Training:
    """Our functions for the epochs of upstream's training loop.

    Args:
        args: the parsed flags, as upstream takes them.
        title: what the learning curve is called.
        options: of the run, beside mace-torch's own.
    """

    def __init__(self, args: argparse.Namespace, title: str, options: RunOptions) -> None:
        self.args = args
        self.options = options
        self.speed = Speed(options.step)
        self.steps = Steps(options, 1)
        self.title = title
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
        """Keeps validation frames for the proof of the merge, and shows progress."""
        self.valid_sets = [loader.dataset for loader in keywords["valid_loaders"].values()]
        self.valid_by_head = {n: v.dataset for n, v in keywords["valid_loaders"].items()}
        self.n_frames = len(keywords["train_loader"].dataset)
        steps = len(keywords["train_loader"])
        self.steps = Steps(self.options, steps)
        epochs = max(0, keywords["max_num_epochs"] - keywords["start_epoch"])
        self.speed.plan(keywords["train_loader"], keywords["valid_loaders"], epochs)
        original = upstream.original("train")
        with ProgressBar(epochs * steps, steps, enabled=keywords.get("rank", 0) == 0) as self.bar:
            original(**keywords)
        if keywords.get("rank", 0) == 0 and self.history:
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
        self._check_finite(metrics["loss"], "training loss")
        if self.bar is not None:
            self.bar.step(float(metrics["loss"]))
        return loss, metrics

    def _check_finite(self, loss: Any, what: str) -> None:
        """Upstream takes NaN for the best loss so far, and saves the model that gave it."""
        if not np.isfinite(float(loss)):
            raise Diverged(
                f"the {what} is {float(loss)}: training has diverged at --lr={self.args.lr}. "
                f"The best checkpoint so far is kept in {self.args.checkpoints_dir}; "
                f"try --lr={self.args.lr / 10:g}"
            )

    def log_errors(
        self, valid_loss: Any, eval_metrics: Any, logger: Any, log_errors: str, *rest: Any
    ) -> None:
        """Upstream's log line of a validation, kept for the learning curve."""
        original = upstream.original("log_errors")
        original(valid_loss, eval_metrics, logger, log_errors, *rest)
        epoch, head = (*rest, None, "Default")[:2]
        self._check_finite(valid_loss, f"validation loss (head {head}, epoch {epoch})")
        self.history.add(epoch, head, eval_metrics)
        if self.bar is not None:
            self.bar.validated(eval_metrics)
