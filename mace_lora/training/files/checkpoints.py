"""Checkpoints: everything that a run needs to go on as if nothing had happened, and no more.

In the checkpoints folder, `<tag>` being mace-torch's `<name>_run-<seed>`:

- `<tag>_latest.pt`: adapters, optimiser, schedulers, EMA, random states, order of the frames, place
  in the epoch, patience, best weights so far, validation errors so far. Not the frozen base: its
  fingerprint. Tensors and plain values only, read with `weights_only`.
- `<tag>_previous.pt`: the one before, for the case that the latest can't be read.
- `<tag>_best_adapter/` (`<tag>_stagetwo_best_adapter/`): the best adapter so far, for people.
- `<tag>_epoch-N_adapter/`: the adapter after each epoch with `--save_all_checkpoints`, after each
  improvement with `--keep_checkpoints`.

All are written whole or not at all. mace-torch's checkpoints hold the whole model, are written in
place after the old one was removed, and don't know where in the run they were written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict, cast

import torch

from mace_lora.errors import CheckpointError, ConfigError
from mace_lora.files import whole_file
from mace_lora.model import artefact
from mace_lora.model.injection import adapter_parameters
from mace_lora.training.epochs import e0s
from mace_lora.training.files import identity, random_states, writing
from mace_lora.training.files.random_states import RandomStates
from mace_lora.training.record import Progress, Run
from mace_lora.upstream import names as upstream
from mace_lora.upstream.types import Average, Tensors

if TYPE_CHECKING:
    from mace_lora.training.epochs.loop import Loop

FORMAT = 2
# Stages by whether mace-torch asks for the second one
_STAGES = {False: "stage_one", True: "stage_two"}


class Best(TypedDict):
    """The best weights of a stage."""

    epoch: int
    loss: float
    adapter: Tensors
    e0s: NotRequired[torch.Tensor | None]  # with which they were judged


class EmaState(TypedDict):
    """Of an exponential moving average."""

    num_updates: int | None
    shadow: list[torch.Tensor]


class State(TypedDict):
    """The content of a checkpoint."""

    format: int
    run: identity.Identity
    progress: dict[str, object]
    adapter: Tensors
    e0s: NotRequired[torch.Tensor | None]
    optimizer: dict[str, object]
    scheduler: dict[str, object]
    stage_two_scheduler: dict[str, object] | None
    ema: EmaState | None
    random: RandomStates
    order: torch.Tensor
    best: dict[str, Best]
    history: list[tuple[int | None, str, dict[str, float]]]
    results_size: int


class HoldsModel(Protocol):
    """mace-torch's CheckpointState."""

    model: torch.nn.Module


class Checkpoints:
    """What stands in the place of mace-torch's CheckpointHandler."""

    def __init__(self, run: Run) -> None:
        self._record = run
        self.args = run.asked.args
        self.stage_two = False  # which stage is in the model, once training is over
        self._best: dict[str, Best] = {}
        self._folder, self._tag = Path(self.args.checkpoints_dir or "."), ""
        self._ours = False  # whether the file called latest is of this very run
        self._trained = False
        self.last_written = ""

    def open(self, directory: str, tag: str, **_: object) -> Checkpoints:
        """In the place of the constructor of mace-torch's CheckpointHandler."""
        self._folder, self._tag = Path(directory), tag
        return self

    @property
    def latest(self) -> Path:
        return self._folder / f"{self._tag}_latest.pt"

    @property
    def previous(self) -> Path:
        return self._folder / f"{self._tag}_previous.pt"

    # ------------------------------------------------------------------ writing

    def write(self, loop: Loop) -> None:
        """Write the state of the loop.

        Raises:
            CheckpointError: disk full, no permission, ...; older checkpoints are as they were.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            following = self.latest.with_name(f"{self._tag}_next.pt")
            with whole_file(following) as new:
                upstream.original("save")(self._state(loop), new)  # ours would be whole twice
            if self._ours and self.latest.exists():
                os.replace(self.latest, self.previous)
            elif not self._ours:  # of an earlier run: never to be mistaken for one of this run
                self.previous.unlink(missing_ok=True)
            os.replace(following, self.latest)
        except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
            raise self._not_written(self.latest, error) from error
        self._ours = True
        at = loop.at
        self.last_written = f"epoch {at.epoch}, step {at.steps}"

    def _not_written(self, path: Path, error: Exception) -> CheckpointError:
        kept = (
            f"Training up to {self.last_written} is safe in {self.latest}"
            if self.last_written
            else "No checkpoint of this run had been written before"
        )
        return CheckpointError(
            f"checkpoint {path} can't be written: {writing.reason(error)}. {kept}; nothing else "
            "was touched. Free some space or fix the folder, then continue with --restart_latest"
        )

    def _identity(self, loop: Loop) -> identity.Identity:
        return identity.of_run(self._record, loop.train_loader, loop.distributed)

    def _state(self, loop: Loop) -> State:
        swa, ema = loop.swa, loop.ema
        results = Path(loop.logger.path)
        return {
            "format": FORMAT,
            "run": self._identity(loop),
            "progress": asdict(loop.at),
            "adapter": {n: p.detach().cpu() for n, p in adapter_parameters(loop.model).items()},
            "e0s": e0s.of_model(loop.model),
            "optimizer": loop.optimizer.state_dict(),
            "scheduler": _plain(loop.scheduler.state_dict()),
            "stage_two_scheduler": None if swa is None else _plain(swa.scheduler.state_dict()),
            "ema": None
            if ema is None
            else {"num_updates": ema.num_updates, "shadow": ema.shadow_params},
            "random": random_states.now(),
            "order": loop.order.state if loop.at.steps else loop.order.now(),
            "best": self._best,
            "history": list(loop.history.rows),
            "results_size": results.stat().st_size if results.exists() else 0,
        }

    def keep(self, loop: Loop, best: bool) -> None:
        """Note the weights of an epoch (averaged, where there is EMA), the best for the end.

        Raises:
            CheckpointError: the adapter directory can't be written.
        """
        epoch, stage_two = loop.at.epoch, loop.at.stage_two
        own = {n: p.detach().cpu().clone() for n, p in adapter_parameters(loop.model).items()}
        folders = []
        if best:
            self._best[_STAGES[stage_two]] = {
                "epoch": epoch,
                "loss": loop.at.valid_loss,
                "adapter": own,
                "e0s": e0s.of_model(loop.model),
            }
            stage = "_stagetwo" if stage_two else ""
            folders.append(self._folder / f"{self._tag}{stage}_best_adapter")
        if self.args.save_all_checkpoints or self.args.keep_checkpoints:
            folders.append(self._folder / f"{self._tag}_epoch-{epoch}_adapter")
        for folder in folders:
            try:
                base, start = self._record.started.base, e0s.described(self._record, loop.model)
                artefact.write(folder, self._record.asked.config, own, base, start)
            except Exception as error:  # safetensors has an error class of its own for a full disk
                raise self._not_written(folder, error) from error

    # ------------------------------------------------------------------ reading

    def restore(self, loop: Loop) -> bool:
        """Put the state of the latest checkpoint into `loop`; False where there is none to take.

        Raises:
            CheckpointError: no checkpoint can be read, or it belongs to another run.
            ConfigError: the run would overwrite the model that another run has made.
        """
        if loop.rank == 0:
            self._remove_half_files()
        if not self.args.restart_latest:
            self._keep_results_of_others(loop)
            if self.latest.exists():
                logging.warning(
                    f"{self.latest} of an earlier run is replaced after the first epoch; "
                    "to continue that run give --restart_latest"
                )
            return False
        path, state = self._read()
        if state is None:
            self._keep_results_of_others(loop)
            logging.info(f"No checkpoint {self.latest}: starting from the beginning")
            return False
        here = self._identity(loop)
        differing = identity.differences(state["run"], here, _progress(state))
        if differing:
            raise CheckpointError(
                f"checkpoint {path} was written by another run: {'; '.join(differing)}. "
                "Give the flags of that run, or another --name, or remove the file"
            )
        try:
            self._restore_state(loop, state)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {path} does not fit this run: {error}") from error
        identity.log_changed_flags(state["run"], here)
        at = loop.at
        self._ours = path == self.latest
        self.last_written = f"epoch {at.epoch}, step {at.steps}"
        logging.info(f"Continuing from {path} at epoch {at.epoch}, step {at.steps}")
        return True

    def _keep_results_of_others(self, loop: Loop) -> None:
        """A run that begins may replace the result of one with the same flags alone."""
        model = Path(self.args.model_dir) / f"{self.args.name}.model"
        if self._record.asked.options.overwrite or not model.exists():
            return
        why = [f"no checkpoint of this name and seed is in {self._folder}"]
        with contextlib.suppress(CheckpointError):
            state = self._read()[1]
            if state is not None:
                why = identity.other_results(state["run"], self._identity(loop))
        if why:
            raise ConfigError(
                f"--name={self.args.name}: {model} exists, and another run has made it "
                f"({'; '.join(why[:3])}). Give another --name, or --overwrite=True to replace it"
            )

    def _remove_half_files(self) -> None:
        """Remove the halves of files that a killed run of this name left (see `files`)."""
        for half in self._folder.glob(f".{self._tag}_*.??*"):
            shutil.rmtree(half) if half.is_dir() else half.unlink(missing_ok=True)

    def _read(self) -> tuple[Path, State | None]:
        failed: list[str] = []
        for path in (self.latest, self.previous):
            if not path.exists():
                continue
            try:
                state: State = torch.load(path, map_location="cpu", weights_only=True)
                if state["format"] not in (1, FORMAT):
                    raise ValueError(f"it is of format {state['format']!r}, not {FORMAT}")
                if state["format"] == 1:  # factors had other names
                    state["adapter"] = artefact.current_names(state["adapter"])
                    for best in state["best"].values():
                        best["adapter"] = artefact.current_names(best["adapter"])
            except Exception as error:  # whatever a damaged file makes torch raise
                failed.append(f"{path} can't be read ({_short(error)})")
                continue
            if failed:
                logging.warning(f"{failed[0]}: falling back to {path}, the one before")
            elif path == self.previous:
                logging.warning(f"{self.latest} is missing: falling back to {path}")
            return path, state
        if failed:
            raise CheckpointError(
                f"{'; '.join(failed)}: there is nothing to continue from. Leave out "
                "--restart_latest to start from the beginning"
            )
        foreign = sorted(self._folder.glob(f"{self._tag}_epoch-*.pt"))
        if foreign:
            raise CheckpointError(
                f"{foreign[-1]} is a checkpoint of mace-torch: it holds neither the state of the "
                "adapters' run nor the order of the frames, and can't be continued from. "
                "Give another --name, or leave out --restart_latest"
            )
        return self.latest, None

    def _restore_state(self, loop: Loop, state: State) -> None:
        _copy(adapter_parameters(loop.model), state["adapter"])
        e0s.put(loop.model, state.get("e0s"))
        fresh = [dict(group) for group in loop.optimizer.param_groups]
        loop.optimizer.load_state_dict(state["optimizer"])
        loop.scheduler.load_state_dict(state["scheduler"])
        if loop.swa is not None and state["stage_two_scheduler"] is not None:
            loop.swa.scheduler.load_state_dict(state["stage_two_scheduler"])
        if loop.ema is not None:
            _restore_ema(loop.ema, state["ema"])
        old_lr = cast(float, state["run"]["free"]["lr"])
        identity.apply_new_rates(loop.optimizer, loop.scheduler, fresh, old_lr, self.args.lr)
        vars(loop.at).update(vars(_progress(state)))
        loop.order.restore(state["order"])
        self._best = state["best"]
        loop.history.rows[:] = [(epoch, head, errors) for epoch, head, errors in state["history"]]
        if loop.rank == 0:
            results, size = Path(loop.logger.path), state["results_size"]
            if results.exists() and results.stat().st_size > size:
                os.truncate(results, size)  # lines after the checkpoint: they come again
        random_states.restore(state["random"])

    # ------------------------------------------------------------------ the end of a run

    def training_is_over(self) -> None:
        """From now on `load_latest` gives the best weights."""
        self._trained = True

    def load_latest(self, state: HoldsModel, swa: bool | None = False, **_: object) -> int | None:
        """mace-torch calls this before training, for a restart, and after it, for the result.

        Before training nothing is loaded here: optimiser, EMA and loader don't exist yet; see
        `restore`. After it the best weights of this run come from memory, and not, as in
        mace-torch, from whichever file of that name has the highest epoch.

        Returns:
            The epoch of the weights.
        """
        if not self._trained:
            return None
        self.stage_two = bool(swa)
        best = self._best.get(_STAGES[self.stage_two])
        if best is None and self._best:
            logging.warning("No epoch of this stage was validated: taking the other stage's best")
            best = next(iter(self._best.values()))
        if best is None:
            return None
        _copy(adapter_parameters(state.model), best["adapter"])
        e0s.put(state.model, best.get("e0s"))
        return int(best["epoch"])

    def save(self, *_: object, **__: object) -> None:
        """mace-torch's own loop would call this; `loop` writes by `write` and `keep`."""
        raise AssertionError("mace-torch's training loop runs in the place of ours")


@torch.no_grad()
def _copy(parameters: Mapping[str, torch.nn.Parameter], values: Tensors) -> None:
    if set(parameters) != set(values):
        raise ValueError(f"adapters {sorted(set(parameters) ^ set(values))[:3]} are in one only")
    for name, parameter in parameters.items():
        if parameter.shape != values[name].shape:
            raise ValueError(f"{name}: {tuple(values[name].shape)}, not {tuple(parameter.shape)}")
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _progress(state: State) -> Progress:
    known = {f.name for f in fields(Progress)}
    names = {"way": "backend"}  # as version 0.1 called it
    renamed = {names.get(name, name): value for name, value in state["progress"].items()}
    stored = {name: value for name, value in renamed.items() if name in known}
    return Progress(**stored)  # type: ignore[arg-type]  # written from one


def _restore_ema(ema: Average, state: EmaState | None) -> None:
    if state is None:
        raise ValueError("it has no average of weights, and --ema asks for one")
    ema.load_state_dict(
        {
            "decay": ema.decay,
            "num_updates": state["num_updates"],
            "shadow_params": state["shadow"],
            "collected_params": None,
        }
    )


def _plain(state: Mapping[str, object]) -> dict[str, object]:
    """Without functions, which older schedulers keep in their state."""
    return {key: value for key, value in state.items() if not callable(value)}


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 200 else text[:200] + " ..."
