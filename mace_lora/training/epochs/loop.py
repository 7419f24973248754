"""The epochs of a run: mace-torch's loop, written so that it can be left and entered at any step.

mace-torch's own `train` can't be continued exactly: lowest loss, patience and stage are variables
inside it, the order of the frames and the counter of EMA are nowhere written down, a restart
repeats the epoch of its checkpoint and skips a step of the scheduler. This loop does the same
things in the same order, so that an uninterrupted run has the same losses bit for bit, and calls
mace-torch for each of them (`train_one_epoch`, `evaluate`, `valid_err_log`). What it does
differently:

- the last epoch is validated whatever `--eval_interval` says, and so can be the one that is saved;
- patience ends a run of one process too; mace-torch says "Stopping optimization" and goes on;
- the average over the weights of stage two is not computed: mace-torch never uses it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from mace_lora.frames.checks import sources
from mace_lora.model.description import heads
from mace_lora.results.progress import ProgressBar
from mace_lora.training import again
from mace_lora.training.epochs import e0s, processes, sizes
from mace_lora.training.epochs.computing import Computing
from mace_lora.training.epochs.divergence import diverged, has_diverged
from mace_lora.training.epochs.order import FrameOrder
from mace_lora.training.epochs.probe import probe_of_run
from mace_lora.training.epochs.protection import Protection
from mace_lora.training.epochs.signals import StopRequest
from mace_lora.training.epochs.sizes import Limit
from mace_lora.training.epochs.steps import Steps
from mace_lora.training.record import Run
from mace_lora.upstream import library
from mace_lora.upstream import names as upstream
from mace_lora.upstream.types import Batch, Loader, Metrics, Number, TrainArguments

if TYPE_CHECKING:
    from mace_lora.training.files.checkpoints import Checkpoints


class Loop:
    """The epochs of one run, whose record has come to `trained`."""

    def __init__(
        self,
        run: Run,
        arguments: TrainArguments,
        stop: StopRequest,
        computing: Computing,
        checkpoints: Checkpoints,
    ) -> None:
        self.run_options = run.asked.options
        self.args = run.asked.args
        self.files, self.estimated = run.files, run.estimated
        self._known_of_start = partial(run.before.forces, run.unadapted)
        self.history = run.trained.history
        self.at = run.trained.at
        self.given = given = arguments
        self.model = given.model
        self.optimizer = given.optimizer
        self.scheduler = given.lr_scheduler
        self.swa, self.ema = given.swa, given.ema
        self.train_loader, self.valid_loaders = given.train_loader, given.valid_loaders
        self.max_grad_norm = given.max_grad_norm
        self.rank, self.distributed = given.rank, given.distributed
        self.stop = stop
        self.computing = computing
        self.checkpoints = checkpoints
        self.logger = given.logger
        self.steps = Steps(self.run_options)
        self.bar = ProgressBar(0, 0, enabled=False)
        self.resumed = False
        self.limit = Limit.of(self.args, self.run_options)
        self.order = FrameOrder.of(
            self.train_loader, *processes.rank_and_count(self.distributed), self.limit
        )
        for loader in self.valid_loaders.values():
            processes.share_frames(loader, self.rank, self.distributed, self.limit)
        self._e0s = self._solver() if self.run_options.solve_e0s else None
        self._saved_at = time.monotonic()

    def _solver(self) -> e0s.Solver:
        names = heads(self.model)
        return e0s.Solver(
            self.model,
            self.train_loader.dataset,
            {names.index(head) for head in self.estimated & set(names)},
            self.computing,
            partial(sizes.cut_graphs, batch_size=self.train_loader.batch_size, limit=self.limit),
            self.args.seed,
        )

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
            SystemExit: after Ctrl-C, SIGTERM or SIGUSR1; a checkpoint is written then.
            CheckpointError: a checkpoint can't be written.
            Diverged: a loss is not finite, or has exploded.
        """
        per_epoch = len(self.train_loader)
        done = self.at.epoch * per_epoch + self.at.steps
        self.steps.begin(per_epoch, done, self.given.max_num_epochs)
        total = max(self.given.max_num_epochs * per_epoch, done)
        self.at.backend = self.computing.settle(self.model, self.at.backend)
        if self.limit is not None:
            probe_of_run(self.limit, self.order.coming(), self.given, self.computing, self._loss())
        if self.run_options.protect:
            self.steps.more = Protection(
                self.model,
                self.train_loader.dataset,
                self.computing,
                self.args.seed,
                self._frames_per_step(),
                self.max_grad_norm,
                self._known_of_start,
            ).gradients
        with ProgressBar(total, per_epoch, done=done, enabled=self.rank == 0) as self.bar:
            self._log_settings()
            with self.stop.waiting():
                self._all_epochs()
        if self._e0s is not None:
            self._e0s.tell()
        logging.info("Training complete")

    def _all_epochs(self) -> None:
        if not self.resumed:
            self.at.valid_loss = self.at.initial_loss = self._validate(None)
        while self.at.epoch < self.given.max_num_epochs and not self._patience_is_spent():
            self._epoch()
            self._save()
            self._leave_if_asked(saved=True)

    def _frames_per_step(self) -> float:
        """Of all processes; by size, on average."""
        if self.limit is not None:
            return len(self.train_loader.dataset) / len(self.train_loader)
        return self.train_loader.batch_size * processes.count(self.distributed)

    def begin_epoch_of_steps(self) -> None:
        """The order of an epoch is known, and with it how many batches it has."""
        self.order.begin(skip=self.at.steps)
        n = len(self.train_loader)
        self.steps.begin(n, self.at.epoch * n + self.at.steps, self.given.max_num_epochs)

    def _log_settings(self) -> None:
        if self.limit is not None:
            self.limit.tell(self.train_loader.dataset, self.files, len(self.train_loader))
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
        return self.at.without_improvement >= self.given.patience

    def _epoch(self) -> None:
        at = self.at
        if at.steps == 0:
            self._begin_epoch()
        self._set_optimiser_mode("train")
        upstream.original("train_one_epoch")(
            model=self.model,
            loss_fn=self._loss(),
            data_loader=self._batches(),
            optimizer=self.optimizer,
            epoch=at.epoch,
            output_args=self.given.output_args,
            max_grad_norm=self.max_grad_norm,
            ema=self.ema,
            logger=self.logger,
            device=self.given.device,
            distributed=self.distributed,
            distributed_model=self.given.distributed_model,
            rank=self.rank,
        )
        if at.epoch % self.given.eval_interval == 0 or self._is_last_of_its_stage():
            self._validate_and_judge()
        at.epoch, at.steps = at.epoch + 1, 0

    def _is_last_of_its_stage(self) -> bool:
        """mace-torch saves the best of the validated epochs, which may be the first alone."""
        ends = [self.given.max_num_epochs, *([self.swa.start] if self.swa is not None else [])]
        return self.at.epoch + 1 in ends

    def _begin_epoch(self) -> None:
        at = self.at
        if self.swa is None or at.epoch < self.swa.start:
            if at.epoch > 0:
                self.scheduler.step(metrics=at.valid_loss)
            return
        if not at.stage_two:
            logging.info("Changing loss based on Stage Two Weights")
            at.stage_two, at.lowest_loss, at.without_improvement = True, math.inf, 0
        if at.epoch > 0:
            self.swa.scheduler.step()

    def _loss(self) -> torch.nn.Module:
        if self.swa is not None and self.at.epoch >= self.swa.start:
            return self.swa.loss_fn
        return self.given.loss_fn

    def _is_lbfgs(self) -> bool:
        return isinstance(self.optimizer, torch.optim.LBFGS)

    def _set_optimiser_mode(self, mode: str) -> None:
        """Schedule-free optimisers have two sets of weights: `train` and `eval` choose one."""
        if "ScheduleFree" in type(self.optimizer).__name__:
            getattr(self.optimizer, mode)()

    # ------------------------------------------------------------------ steps

    def _batches(self) -> Loader | _Batches:
        if self._is_lbfgs():
            self.order.begin(skip=0)
            return self.train_loader  # one step of LBFGS takes all batches, several times
        return _Batches(self)

    def take_step(
        self, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **others: object
    ) -> tuple[Number, Metrics]:
        """In the place of mace-torch's `take_step`: by the chosen backend, its loss judged."""
        loss, metrics = self.steps.take(
            self.computing.take_step, model=model, optimizer=optimizer, **others
        )
        self._judge(float(metrics["loss"]))
        return loss, {**metrics}

    def _judge(self, loss: float) -> None:
        """
        Raises:
            Diverged: the loss of a step is not finite, or has exploded.
        """
        if has_diverged(loss, self.at.initial_loss):
            frames = self._name_frames(self.order.batch(self.at.steps))
            where = f"epoch {self.at.epoch}, step {self.at.steps}{frames}"
            raise diverged(self.args, self.at, "training loss", loss, where)
        self.bar.step(loss)

    def _name_frames(self, indices: list[int]) -> str:
        """The frames of a step, for a message."""
        if not indices:
            return ""
        found = sources(self.files, [self.train_loader.dataset[i] for i in indices])
        return f", on frames {indices} of the training set" + (f" ({found})" if found else "")

    def after_step(self) -> None:
        """A step is done, and the next has not begun: the run can stop or be saved."""
        self.at.steps += 1
        if self.steps.gradients_wait():
            return
        self._leave_if_asked()
        if time.monotonic() - self._saved_at >= self.run_options.checkpoint_seconds:
            self._save()

    def _leave_if_asked(self, saved: bool = False) -> None:
        if not processes.in_any(bool(self.stop), self.given.device, self.distributed):
            return
        if not saved:
            self._save()
        where = f"epoch {self.at.epoch}, step {self.at.steps} of {len(self.train_loader)}"
        logging.warning(
            f"{self.stop.name or 'A signal to another process'}: stopped at {where}; the "
            f"checkpoint is written (exit code {self.stop.exit_code}). "
            f"{again.advice(self.args, self.run_options, self.at.epoch)}"
        )
        processes.wait_for_all(self.distributed)  # rank 0 has written
        raise SystemExit(self.stop.exit_code)

    def _save(self) -> None:
        if self.rank == 0:
            self.checkpoints.write(self)
        self._saved_at = time.monotonic()

    # ------------------------------------------------------------------ validation

    def _validate(self, epoch: int | None) -> float:
        """Loss on the validation set of the last head, which is the one that counts upstream."""
        loss, seen = math.inf, {}
        for head, loader in self.valid_loaders.items():
            loss, metrics = library.evaluate(
                model=self.model,  # without DistributedDataParallel: there are no gradients
                loss_fn=self.given.loss_fn if epoch is None else self._loss(),
                data_loader=loader,
                output_args=self.given.output_args,
                device=self.given.device,
            )
            if self.rank == 0:
                self._log_validation(loss, metrics, epoch, head)
            seen[head] = {
                "epoch": epoch,
                "valid_loss": loss,
                "valid_rmse_e_per_atom": metrics["rmse_e_per_atom"],
                "valid_rmse_f": metrics["rmse_f"],
            }
        if self.given.log_wandb and epoch is not None and self.rank == 0:
            upstream.original("wandb_log")(seen)
        return float(loss)

    def _log_validation(self, loss: float, metrics: Metrics, epoch: int | None, head: str) -> None:
        """mace-torch's log line; the errors are kept for the learning curve.

        Raises:
            Diverged: the loss is not finite, or has exploded.
        """
        log_line = upstream.original("log_validation")
        log_line(loss, metrics, self.logger, self.given.log_errors, epoch, head)
        if has_diverged(float(loss), self.at.initial_loss):
            where = f"epoch {self.at.epoch}, step {self.at.steps}"
            what = f"validation loss of head {head}"
            raise diverged(self.args, self.at, what, float(loss), where)
        self.history.add(epoch, head, metrics)
        self.bar.validated(metrics)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The weights that are validated and saved: EMA's, where there is one."""
        return self.ema.average_parameters() if self.ema is not None else contextlib.nullcontext()

    def _validate_and_judge(self) -> None:
        at = self.at
        self._set_optimiser_mode("eval")
        with self.averaged():
            if self._e0s is not None:
                self._e0s.solve(self.distributed)
            at.valid_loss = self._validate(at.epoch)
            self._plot()
            better = at.valid_loss < at.lowest_loss
            if (better or self.given.save_all_checkpoints) and self.rank == 0:
                self.checkpoints.keep(self, best=better)
        if better:
            at.lowest_loss, at.without_improvement = at.valid_loss, 0
            return
        at.without_improvement += 1
        if self._patience_is_spent():
            text = f"Stopping optimization after {at.without_improvement} epochs without"
            if self.swa is not None and at.epoch < self.swa.start:
                logging.info(f"{text} improvement and starting Stage Two")
                at.epoch, at.without_improvement = self.swa.start, 0
            else:
                logging.info(f"{text} improvement")

    def _plot(self) -> None:
        plotter = self.given.plotter
        if plotter and self.at.epoch % plotter.plot_frequency == 0:
            try:
                plotter.plot(self.at.epoch, self.model, self.rank)
            except Exception as error:  # mace-torch's picture is no reason to lose a run
                logging.debug(f"Plotting failed: {error}")


class _Batches:
    """The batches of this epoch that are still to do; between two of them the run can stop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __len__(self) -> int:
        return len(self._loop.train_loader)

    def __iter__(self) -> Iterator[Batch]:
        loop = self._loop
        loop.begin_epoch_of_steps()
        for batch in loop.train_loader:
            yield batch
            loop.after_step()
