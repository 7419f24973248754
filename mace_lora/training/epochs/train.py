"""In the place of mace-torch's `train`: all epochs of a run, and the curve of their errors."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from mace_lora.training.epochs import optimised, threads
from mace_lora.training.epochs.computing import Computing
from mace_lora.training.epochs.loop import Loop
from mace_lora.training.epochs.signals import StopRequest
from mace_lora.training.files.checkpoints import Checkpoints
from mace_lora.training.record import Run, Trained
from mace_lora.upstream import names as upstream
from mace_lora.upstream.types import Dataset, TrainArguments


def train(
    run: Run, stop: StopRequest, computing: Computing, checkpoints: Checkpoints, **keywords: object
) -> None:
    """Train with our own loop, which can be left and continued at any step; see `loop`.

    `run` comes to `trained` here; the keywords are those that the script hands to `train`.
    """
    given = TrainArguments.of(keywords)
    run.trained = Trained(
        n_frames=len(given.train_loader.dataset),
        train_sets=_by_head(given),
        valid_sets={head: loader.dataset for head, loader in given.valid_loaders.items()},
    )
    loop = Loop(run, given, stop, computing, checkpoints)
    if given.log_wandb and given.rank == 0:
        _describe_to_wandb(run, optimised.count(given.model))
    loop.resume()
    with upstream.substituted({"take_step": loop.take_step}), threads.suiting(given):
        loop.run()
    checkpoints.training_is_over()
    if given.rank == 0 and run.trained.history:
        _draw_learning_curve(run)


def _by_head(given: TrainArguments) -> dict[str, Dataset]:
    """The training frames of each head; mace-torch joins those of all."""
    joined = given.train_loader.dataset
    parts: Iterable[Dataset] = getattr(joined, "datasets", [joined])
    return dict(zip(given.valid_loaders, parts, strict=False))


def _describe_to_wandb(run: Run, trained: int) -> None:
    """mace-torch tells wandb of its own flags alone."""
    method, options = run.asked.config.method, run.asked.config.options.to_json()
    flags = {f"{method}_{name}": value for name, value in options.items()}
    settings = {"adapter": method, **flags, "trained_parameters": trained}
    upstream.original("wandb_config").update(settings)


def _draw_learning_curve(run: Run) -> None:
    args = run.asked.args
    picture = Path(args.model_dir) / f"{args.name}_learning_curve.png"
    try:
        title = f"{args.name}: {run.asked.config.method}"
        run.trained.history.plot(picture, title=title)
    except Exception as error:  # a picture is no reason to lose the model that is saved next
        logging.warning(f"no learning curve: {type(error).__name__}: {error}")
