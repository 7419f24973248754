"""One fine-tuning run: what happens when upstream's script calls back.

Upstream loads and splits the data, builds loss, optimiser, schedulers, EMA and SWA, and runs the
epochs. A `Session` is there at the few points where adapters matter: here while the model is built,
in `training` during the epochs, in `saving` at the end. Each method replaces the name of upstream's
that `substitutes` pairs it with, and each says why.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mace_lora.adapters.registry import get_method
from mace_lora.config import AdapterConfig, RunOptions
from mace_lora.errors import ArtefactError, FoundationModelError, MaceLoraError
from mace_lora.frames import checks as frames
from mace_lora.frames import stored
from mace_lora.frames.energies import AtomicEnergies
from mace_lora.model import artefact
from mace_lora.model.description import describe
from mace_lora.model.fingerprint import fingerprint
from mace_lora.model.injection import inject
from mace_lora.model.report import InjectionReport
from mace_lora.results import reporting
from mace_lora.training import checks
from mace_lora.training.epochs import processes
from mace_lora.training.epochs.order import FrameOrder
from mace_lora.training.epochs.signals import StopRequest
from mace_lora.training.epochs.training import Training
from mace_lora.training.files.saving import Saving
from mace_lora.upstream import cueq, predicting
from mace_lora.upstream import names as upstream

# Frames on which the energy offset at the start is measured
OFFSET_FRAMES = 8
# Fewer than this, in eV per atom, is nothing to speak of
LARGE_OFFSET = 0.05


class Session:
    """The state of one run, and the functions that upstream's script calls instead of its own.

    Args:
        args: the parsed flags, as upstream takes them.
        config: the adapter.
        foundation: the loaded foundation model; None where mace-torch loads it by name.
        options: of the run, beside mace-torch's own.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: AdapterConfig,
        foundation: torch.nn.Module | None,
        options: RunOptions,
    ) -> None:
        self.args = args
        self.given = dict(vars(args))
        self.options = options
        self.config = config
        self.foundation = foundation
        self.injected: InjectionReport | None = None
        self.stop = StopRequest()
        self.files: list[str] = []  # that frames were read from
        self.energies = AtomicEnergies()
        self.training = Training(
            args,
            title=f"{args.name}: {config.method}",
            options=options,
            stop=self.stop,
            sources=lambda data: frames.sources(self.files, data),
            adapter={
                "adapter": config.method,
                **{f"{config.method}_{k}": v for k, v in config.options.to_json().items()},
            },
        )
        self.saving = Saving(
            args,
            config,
            valid_sets=lambda: self.training.valid_sets,
            history=self.training.history.rows,
        )

    def substitutes(self) -> dict[str, Any]:
        """Our functions by key of `upstream.NAMES`."""
        loaders = ("mace_mp", "mace_off", "mace_omol", "mace_polar")
        return {
            **{key: self.watched(upstream.original(key)) for key in loaders},
            "inject": self.inject,
            "to_cueq": self.already_converted,
            "to_oeq": self.already_converted,
            "configure_model": self.configure_model,
            **self.training.substitutes(),
            **self.saving.substitutes(),
            "load_xyz": checks.checked_loader(
                upstream.original("load_xyz"), self.args, self.known_elements, self.files
            ),
            "load_stored": checks.checked_dataset(
                upstream.original("load_stored"), self.args, self.known_elements
            ),
            "json": SimpleNamespace(load=stored.read_statistics, dumps=json.dumps),
            "split": checks.split,
            "atomic_energies": self.energies.read,
            "energies_as_array": self.energies.as_array,
            "estimate_e0s": self.estimate_e0s,
            "avg_num_neighbors": self.avg_num_neighbors,
            "init_distributed": processes.init,
            "ddp": processes.parallel,
            "metrics": processes.validation_metrics,
        }

    def say_what_was_done(self) -> None:
        """The last lines of the log: errors before and after, and the files to take away.

        Raises:
            WriteError: a file that upstream goes on without could not be written.
        """
        if self.training.history:
            errors = self.training.history.summary().replace("Å", "A")  # the log may be ASCII
            logging.info(f"Validation, before -> after: {errors}")
            if not self.training.history.has_learnt():
                logging.warning(
                    "The validation loss never fell below that of the foundation model: train "
                    f"longer, or try another --lr (it was {self.args.lr})"
                )
        self._write_page()
        for file, meaning in self.saving.what_was_left().items():
            logging.info(f"  {file}: {meaning}")
        if self.saving.lost is not None:
            raise self.saving.lost

    def _write_page(self) -> None:
        if self.saving.merged is None or self.injected is None:
            return
        try:
            reporting.write(
                self.args,
                self.given,
                self.training.n_frames,
                self.config,
                self.injected,
                self.training.history,
                self.saving.merged,
                self.training.valid_by_head,
                self.saving.what_was_left,
            )
        except Exception as error:  # the models are saved, and a page is no reason to fail
            logging.warning(f"no report: {type(error).__name__}: {error}")

    def watched(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Upstream's loader of a named model; its elements are checked against the frames."""

        def loader(*positional: Any, **keywords: Any) -> Any:
            loaded = load(*positional, **keywords)
            self.foundation = loaded.models[0] if hasattr(loaded, "models") else loaded
            return loaded

        return loader

    def known_elements(self) -> set[int] | None:
        """Atomic numbers of the foundation model, once it is loaded."""
        if self.foundation is None:
            return None
        return {int(z) for z in self.foundation.atomic_numbers}

    # ------------------------------------------------------------------ building the model

    def estimate_e0s(self, foundation_model: torch.nn.Module, **keywords: Any) -> dict[int, float]:
        """Upstream runs a float32 foundation model on float64 frames, which TorchScript refuses."""
        foundation_model.to(torch.get_default_dtype())
        original = upstream.original("estimate_e0s")
        return original(foundation_model=foundation_model, **keywords)

    @staticmethod
    def avg_num_neighbors(
        heads: Any, args: argparse.Namespace, train_loader: Any, device: Any
    ) -> Any:
        """The first use of the training batches, where upstream fails if there is none.

        Upstream draws an order of the frames for it: the same for any number of processes.
        """
        checks.enough_frames(train_loader, args)
        FrameOrder.of(train_loader, *processes.which(args.distributed))
        return upstream.original("avg_num_neighbors")(heads, args, train_loader, device)

    def configure_model(self, args: argparse.Namespace, *rest: Any, **keywords: Any) -> Any:
        """Remembers the base model; mends E0s that upstream overwrites; speaks of energy offsets.

        With the same elements in the run as in the foundation model, upstream 0.3.16 copies the
        foundation's E0s over those that were asked for (a state-dict copy by equal shape).
        """
        original = upstream.original("configure_model")
        train_loader, energies, foundation, _, table = rest[:5]
        energies = self.energies.of_elements(energies, table.zs)
        rest = (train_loader, energies, *rest[2:])
        try:
            model, outputs = original(args, *rest, **keywords)
        except MaceLoraError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FoundationModelError(
                f"--foundation_model={args.foundation_model}: mace-torch can't start a fine-tuning "
                f"from this model: {type(error).__name__}: {error}"
            ) from error
        self.saving.base = {
            "name": str(args.foundation_model),
            "head": args.foundation_head,
            **describe(foundation),
            "fingerprint": fingerprint(foundation),
        }
        self._mend_e0s(model, energies)
        self.saving.start = describe(model)
        self._speak_of_offset(args, model, train_loader)
        return model, outputs

    def _mend_e0s(self, model: torch.nn.Module, energies: np.ndarray | None) -> None:
        block = getattr(model, "atomic_energies_fn", None)
        if energies is None or block is None:
            return
        asked = torch.as_tensor(energies, dtype=block.atomic_energies.dtype)
        asked = asked.reshape(block.atomic_energies.shape).to(block.atomic_energies.device)
        if not torch.allclose(asked, block.atomic_energies, rtol=1e-6, atol=1e-6):
            logging.info(
                "mace-torch had replaced the E0s of this run by the foundation model's; "
                "restored those that were asked for"
            )
        block.atomic_energies = asked

    def _speak_of_offset(
        self, args: argparse.Namespace, model: torch.nn.Module, train_loader: Any
    ) -> None:
        batches = predicting.batch_of(train_loader.dataset, OFFSET_FRAMES)
        if not batches or getattr(batches[0], "energy", None) is None:
            return
        predicted = predicting.predict(model.to(args.device), batches).get("energy")
        if predicted is None:
            return
        atoms = (batches[0].ptr[1:] - batches[0].ptr[:-1]).to(predicted)
        offset = ((predicted - batches[0].energy.to(predicted)) / atoms).mean().item()
        logging.info(f"Energy offset before training: {1e3 * offset:+.1f} meV per atom")
        if abs(offset) > LARGE_OFFSET:
            source = f"--E0s={args.E0s}" if args.statistics_file is None else args.statistics_file
            advice = (
                "are the labels of all frames (of each head) of one kind, in eV?"
                if args.E0s == "estimated"
                else "use --E0s=estimated (with .xyz files), which fits the E0s to what the "
                "foundation model leaves over"
            )
            logging.warning(
                f"{source} starts {offset:+.2f} eV per atom away from the labels, and a "
                f"low-rank adapter hardly moves such an offset: {advice}"
            )

    def inject(self, model: torch.nn.Module, rank: int = 0, alpha: float = 0) -> torch.nn.Module:
        """Upstream injects first and converts to other kernels after, which drops the adapters."""
        del rank, alpha  # they stand in self.config
        args = self.args
        self.saving.start["fingerprint"] = fingerprint(model)
        if args.enable_cueq or args.enable_oeq:
            key = "to_cueq" if args.enable_cueq else "to_oeq"
            logging.info(f"Converting the model ({key}) before the adapters are attached")
            convert = cueq.convert if args.enable_cueq else upstream.original("to_oeq")
            with torch.random.fork_rng():  # so that the adapters start as without conversion
                model = convert(deepcopy(model), device=args.device)
        self.injected = report = inject(model, self.config)
        if self.options.adapter_start:
            self._start_from(model, self.options.adapter_start)
        banner = get_method(self.config.method).banner(self.config.options)
        if banner:
            logging.info(banner)
        options = ", ".join(f"{k}={v}" for k, v in self.config.options.to_json().items())
        logging.info(f"Adapter {self.config.method} ({options})\n{report}")
        return model

    def _start_from(self, model: torch.nn.Module, folder: str) -> None:
        """Take the factors of an existing adapter instead of fresh ones."""
        content = artefact.read(folder)
        if content.model["fingerprint"] != self.saving.start["fingerprint"]:
            raise ArtefactError(
                f"--adapter_start={folder}: its run started from another model than this one "
                "(another foundation model, other elements or other heads), so its factors mean "
                "nothing here"
            )
        artefact.load_factors(model, content.tensors)
        logging.info(f"The adapter starts as {folder} has it; its E0s are those of this run")

    @staticmethod
    def already_converted(model: torch.nn.Module, device: Any = None) -> torch.nn.Module:
        """Conversion to other kernels came before the injection (see `inject`)."""
        return model
