"""The epochs of a run: mace-torch's loop, written so that it can be left and entered at any step.

mace-torch's own `train` can't be continued exactly: lowest loss, patience and stage are variables
inside it, the order of the frames and the counter of EMA are nowhere written down, a restart
repeats the epoch of its checkpoint and skips a step of the scheduler. This loop does the same
things in the same order, so that an uninterrupted run has the same losses bit for bit, and calls
mace-torch for each of them (`train_one_epoch`, `evaluate`, `valid_err_log`, looked up by name, so
that substitutes are seen). What it does differently:

- patience ends a run of one process too; mace-torch says "Stopping optimization" and goes on;
- the average over the weights of stage two is not computed: mace-torch never uses it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mace_lora.training.epochs import processes
from mace_lora.training.epochs.order import FrameOrder
from mace_lora.training.epochs.signals import EXIT_CODE, StopRequest
from mace_lora.training.epochs.steps import Steps
from mace_lora.upstream import names as upstream


@dataclass
class Progress:
    """Where a run stands: plain numbers, stored in each checkpoint.

    Attributes:
        epoch: the epoch that is being trained.
        steps: batches of it that are done; 0 until the first one is.
        valid_loss: of the last validation.
        initial_loss: the validation loss before any training.
        lowest_loss: of this stage.
        without_improvement: validations since then.
        stage_two: whether stage two (`--swa`) has begun.
        way: how the steps of this run are computed, see `speed`.
    """

    epoch: int = 0
    steps: int = 0
    valid_loss: float = math.inf
    initial_loss: float = math.inf
    lowest_loss: float = math.inf
    without_improvement: int = 0
    stage_two: bool = False
    way: str = ""


class Loop:
    """The epochs of one run.

    Args:
        stop: says whether a signal has asked for an end.
        taken: takes the steps; says when the gradients of several batches wait.
        deliver: makes the batches of an epoch from mace-torch's loader.
        keywords: what mace-torch hands to its `train`; its logger is a `steplog.StepLog`.
    """

    def __init__(
        self, stop: StopRequest, taken: Steps, deliver: Callable[[Any], Any], **keywords: Any
    ) -> None:
        self.stop = stop
        self.taken = taken
        self.deliver = deliver
        self.model: torch.nn.Module = keywords["model"]
        self.loss_fn = keywords["loss_fn"]
        self.train_loader = keywords["train_loader"]
        self.valid_loaders: dict[str, Any] = keywords["valid_loaders"]
        self.optimizer: torch.optim.Optimizer = keywords["optimizer"]
        self.scheduler = keywords["lr_scheduler"]
        self.max_num_epochs: int = keywords["max_num_epochs"]
        self.patience: int = keywords["patience"]
        self.checkpoints = keywords["checkpoint_handler"]
        self.logger = keywords["logger"]
        self.eval_interval: int = keywords["eval_interval"]
        self.output_args = keywords["output_args"]
        self.device = keywords["device"]
        self.log_errors: str = keywords["log_errors"]
        self.swa = keywords.get("swa")
        self.ema = keywords.get("ema")
        self.max_grad_norm = keywords.get("max_grad_norm", 10.0)
        self.log_wandb = keywords.get("log_wandb", False)
        self.plotter = keywords.get("plotter")
        self.distributed_model = keywords.get("distributed_model")
        self.rank: int = keywords.get("rank", 0)
        self.keep_all = keywords.get("save_all_checkpoints", False)
        self.distributed = keywords.get("distributed", False)
        self.at = Progress()
        self.resumed = False
        self.order = FrameOrder.of(self.train_loader, *processes.which(self.distributed))
        for loader in self.valid_loaders.values():
            processes.share_frames(loader, self.rank, self.distributed)
        self._upstream = upstream.module("mace.tools.train")
        self._saved_at = time.monotonic()

    # ------------------------------------------------------------------ the loop itself

    def resume(self) -> None:
        """Go on where the latest checkpoint of this run stands, if that was asked for.

        Raises:
            CheckpointError: it belongs to another run, or can't be read.
        """
        self.resumed = self.checkpoints.restore(self)

    def run(self) -> None:
        """Train to the end, or to a signal.

        Raises:
            SystemExit: with EXIT_CODE after SIGTERM or SIGUSR1; a checkpoint is written then.
            CheckpointError: a checkpoint can't be written.
            Diverged: a loss is not finite, or has exploded.
        """
        self._say_how()
        with self.stop.waiting():
            if not self.resumed:
                self.at.valid_loss = self.at.initial_loss = self._validate(None)
            while self.at.epoch < self.max_num_epochs and not self._patience_is_spent():
                self._epoch()
                self._save()
                self._leave_if_asked(saved=True)
        logging.info("Training complete")

    def _say_how(self) -> None:
        if self._is_lbfgs() and self.max_grad_norm is not None:
            # mace-torch clips inside the closure: the line search then compares the loss with
            # gradients that are not its own, and ends in NaN, in float32 above all
            self.max_grad_norm = None
            logging.info("--lbfgs: gradients are not clipped, the line search needs them whole")
        if self.max_grad_norm is not None:
            logging.info(f"Using gradient clipping with tolerance={self.max_grad_norm:.3f}")
        logging.info("===========TRAINING===========")
        if self.swa is not None:
            logging.info(
                "Stage two changes loss and learning rate; as in mace-torch what is saved of it is "
                f"{'the EMA' if self.ema is not None else 'the best epoch'}, no average of weights"
            )

    def _patience_is_spent(self) -> bool:
        return self.at.without_improvement >= self.patience

    def _epoch(self) -> None:
        at = self.at
        if at.steps == 0:
            self._begin_epoch()
        if self._is_schedule_free():
            self.optimizer.train()
        self._upstream.train_one_epoch(
            model=self.model,
            loss_fn=self._loss(),
            data_loader=self._batches(),
            optimizer=self.optimizer,
            epoch=at.epoch,
            output_args=self.output_args,
            max_grad_norm=self.max_grad_norm,
            ema=self.ema,
            logger=self.logger,
            device=self.device,
            distributed=self.distributed,
            distributed_model=self.distributed_model,
            rank=self.rank,
        )
        if at.epoch % self.eval_interval == 0:
            self._validate_and_judge()
        at.epoch, at.steps = at.epoch + 1, 0

    def _begin_epoch(self) -> None:
        at = self.at
        if not self._in_stage_two():
            if at.epoch > 0:
                self.scheduler.step(metrics=at.valid_loss)
            return
        if not at.stage_two:
            logging.info("Changing loss based on Stage Two Weights")
            at.stage_two, at.lowest_loss, at.without_improvement = True, math.inf, 0
        if at.epoch > 0:
            self.swa.scheduler.step()

    def _in_stage_two(self) -> bool:
        return self.swa is not None and self.at.epoch >= self.swa.start

    def _loss(self) -> torch.nn.Module:
        return self.swa.loss_fn if self._in_stage_two() else self.loss_fn

    def _is_lbfgs(self) -> bool:
        return isinstance(self.optimizer, torch.optim.LBFGS)

    def _is_schedule_free(self) -> bool:
        return "ScheduleFree" in type(self.optimizer).__name__

    # ------------------------------------------------------------------ steps

    def _batches(self) -> Any:
        if self._is_lbfgs():
            self.order.begin(skip=0)
            return self.train_loader  # one step of LBFGS takes all batches, several times
        return _Batches(self)

    def frames_of_this_step(self) -> list[int]:
        """Indices into the training set of the batch that was trained on last."""
        if self._is_lbfgs():
            return []
        return self.order.batch(self.at.steps)

    def between_steps(self) -> None:
        """A step is done, and the next has not begun."""
        self.at.steps += 1
        if self.taken.gradients_wait():
            return
        self._leave_if_asked()
        if time.monotonic() - self._saved_at >= self.taken.options.checkpoint_seconds:
            self._save()

    def _leave_if_asked(self, saved: bool = False) -> None:
        if not processes.any_of_us(bool(self.stop), self.device, self.distributed):
            return
        if not saved:
            self._save()
        where = f"epoch {self.at.epoch}, step {self.at.steps} of {len(self.train_loader)}"
        logging.warning(
            f"{self.stop.name or 'A signal to another process'}: stopped at {where}; the "
            f"checkpoint is written. Continue with --restart_latest (exit code {EXIT_CODE})"
        )
        processes.wait_for_all(self.distributed)  # rank 0 has written
        raise SystemExit(EXIT_CODE)

    def _save(self) -> None:
        self.logger.look()  # a run that has diverged is not saved
        if self.rank == 0:
            self.checkpoints.write(self)
        self._saved_at = time.monotonic()

    # ------------------------------------------------------------------ validation

    def _validate(self, epoch: int | None) -> float:
        """Loss on the validation set of the last head, which is the one that counts upstream."""
        loss, seen = math.inf, {}
        for name, loader in self.valid_loaders.items():
            loss, metrics = self._upstream.evaluate(
                model=self.model,  # without DistributedDataParallel: there are no gradients
                loss_fn=self.loss_fn if epoch is None else self._loss(),
                data_loader=loader,
                output_args=self.output_args,
                device=self.device,
            )
            if self.rank == 0:
                self._upstream.valid_err_log(
                    loss, metrics, self.logger, self.log_errors, epoch, name
                )
            seen[name] = {
                "epoch": epoch,
                "valid_loss": loss,
                "valid_rmse_e_per_atom": metrics["rmse_e_per_atom"],
                "valid_rmse_f": metrics["rmse_f"],
            }
        if self.log_wandb and epoch is not None and self.rank == 0:
            upstream.module("wandb").log(seen)
        return float(loss)

    def averaged(self) -> contextlib.AbstractContextManager[Any]:
        """The weights that are validated and saved: EMA's, where there is one."""
        return self.ema.average_parameters() if self.ema is not None else contextlib.nullcontext()

    def _validate_and_judge(self) -> None:
        at = self.at
        if self._is_schedule_free():
            self.optimizer.eval()
        with self.averaged():
            at.valid_loss = self._validate(at.epoch)
            self._plot()
            better = at.valid_loss < at.lowest_loss
            if (better or self.keep_all) and self.rank == 0:
                self.checkpoints.keep(self, best=better)
        if better:
            at.lowest_loss, at.without_improvement = at.valid_loss, 0
            return
        at.without_improvement += 1
        if self._patience_is_spent():
            told = f"Stopping optimization after {at.without_improvement} epochs without"
            if self.swa is not None and not self._in_stage_two():
                logging.info(f"{told} improvement and starting Stage Two")
                at.epoch, at.without_improvement = self.swa.start, 0
            else:
                logging.info(f"{told} improvement")

    def _plot(self) -> None:
        if self.plotter and self.at.epoch % self.plotter.plot_frequency == 0:
            try:
                self.plotter.plot(self.at.epoch, self.model, self.rank)
            except Exception as error:  # mace-torch's picture is no reason to lose a run
                logging.debug(f"Plotting failed: {error}")


class _Batches:
    """The batches of this epoch that are still to do; between two of them the run can stop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __len__(self) -> int:
        return len(self._loop.train_loader)

    def __iter__(self) -> Iterator[Any]:
        loop = self._loop
        loop.order.begin(skip=loop.at.steps)
        for batch in loop.deliver(loop.train_loader):
            yield batch
            loop.between_steps()
