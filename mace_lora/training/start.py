"""From the foundation model to the model that is trained: E0s put right, adapters attached."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from copy import deepcopy

import numpy as np
import numpy.typing as npt
import torch
from ase.data import chemical_symbols

from mace_lora.adapters.registry import get_method
from mace_lora.errors import ArtefactError, FoundationModelError, MaceLoraError
from mace_lora.model import artefact
from mace_lora.model.identity import identity, is_same, stored_bases
from mace_lora.model.injection import inject
from mace_lora.training import checks
from mace_lora.training.data import Data
from mace_lora.training.epochs import processes
from mace_lora.training.epochs.order import FrameOrder
from mace_lora.training.epochs.sizes import Limit
from mace_lora.training.record import Run, Started
from mace_lora.upstream import cueq, logs, predicting
from mace_lora.upstream import names as upstream
from mace_lora.upstream.loading import loading_named
from mace_lora.upstream.types import ElementTable, HeadConfig, Loader

# Frames on which the energy offset at the start is measured
OFFSET_FRAMES = 8
# Fewer than this, in eV per atom, is nothing to speak of
LARGE_OFFSET = 0.05

LoadModel = Callable[..., torch.nn.Module]


def remember_foundation(run: Run, load: Callable[..., object]) -> Callable[..., object]:
    """mace-torch's loader `load` of a named model; what it loads is the foundation of the run."""

    def loader(*positional: object, **keywords: object) -> object:
        args = run.asked.args
        if not args.multiheads_finetuning:
            logging.info(
                f"No replay with {args.foundation_model}: with an adapter it is yours to ask for, "
                "by --multiheads_finetuning=True"
            )
        with loading_named(str(args.foundation_model)):
            loaded = load(*positional, **keywords)
        models: list[torch.nn.Module] = getattr(loaded, "models", [loaded])  # of a calculator
        run.foundation = models[0]
        return loaded

    return loader


def avg_num_neighbors(
    limit: Limit | None,
    heads: object,
    args: argparse.Namespace,
    train_loader: Loader,
    device: torch.device,
) -> float:
    """The first use of the training batches, where mace-torch fails if there is none.

    mace-torch draws an order of the frames for it: the same for any number of processes. `limit`
    is that of batches by size.
    """
    if limit is None:
        checks.enough_frames(train_loader, args)
    order = FrameOrder.of(train_loader, *processes.rank_and_count(args.distributed), limit)
    checks.enough_batches(order, args, limit)
    found: float = upstream.original("avg_num_neighbors")(heads, args, train_loader, device)
    return found


def keep_converted(model: torch.nn.Module, device: object = None) -> torch.nn.Module:
    """Conversion to other kernels came before the injection (see `Start.inject`)."""
    del device
    return model


def _log_replay(run: Run) -> None:
    """Replay sets flags anew, some of them without a word."""
    now, asked = vars(run.asked.args), run.asked.given
    changes = [
        f"--{flag}={now[flag]} (was {asked[flag]})"
        for flag in ("lr", "ema", "ema_decay", "loss")
        if now[flag] != asked[flag]
    ]
    if now["multiheads_finetuning"] and changes:
        logging.warning(
            f"Replay (--multiheads_finetuning) changes what was asked for: {', '.join(changes)}; "
            "--force_mh_ft_lr=True keeps learning rate and EMA"
        )


class Start:
    """Our functions for building the model; `run` comes to `started` and to `injected` here."""

    def __init__(self, run: Run, data: Data) -> None:
        self.run = run
        self.data = data

    def configure_model(
        self,
        args: argparse.Namespace,
        train_loader: Loader,
        atomic_energies: npt.NDArray[np.float64] | None,
        model_foundation: torch.nn.Module,
        heads: list[str],
        z_table: ElementTable,
        head_configs: Sequence[HeadConfig],
    ) -> tuple[torch.nn.Module, dict[str, bool]]:
        """mace-torch's model; mends E0s that it overwrites, and speaks of energy offsets.

        With the same elements in the run as in the foundation model, mace-torch 0.3.16 copies the
        foundation's E0s over those that were asked for (a state-dict copy by equal shape).
        """
        self.data.refuse_missing_labels()
        elements = [int(z) for z in z_table.zs]
        energies = self.data.energies.of_elements(atomic_energies, elements)
        if args.foundation_model_elements:
            known = {head.head_name: {int(z) for z in head.z_table.zs} for head in head_configs}
            in_frames = [known[head] for head in heads]
            energies = self.data.energies.keep_foundations(
                energies, elements, in_frames, model_foundation
            )
        _log_replay(self.run)
        original = upstream.original("configure_model")
        try:
            model, outputs = original(
                args, train_loader, energies, model_foundation, heads, z_table, head_configs
            )
        except MaceLoraError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FoundationModelError(
                f"--foundation_model={args.foundation_model}: mace-torch can't start a fine-tuning "
                f"from this model: {type(error).__name__}: {error}"
            ) from error
        base = {
            "name": str(args.foundation_model),
            "head": args.foundation_head,
            **identity(model_foundation),
        }
        _restore_e0s(model, energies)
        _log_e0s(heads, elements, energies)
        start = identity(model)
        self.run.started = Started(base, start)
        self._log_energy_offset(model, train_loader)
        return model, outputs

    def _log_energy_offset(self, model: torch.nn.Module, train_loader: Loader) -> None:
        graphs = predicting.first_of(train_loader.dataset, OFFSET_FRAMES, "energy")
        if not graphs:
            return
        predicted = self.run.before.predict(model.to(self.run.asked.args.device), graphs)
        if "energy" not in predicted:
            return
        atoms = np.array([len(graph.positions) for graph in graphs])
        labels = np.array([float(graph["energy"]) for graph in graphs])
        offset = float(((predicted["energy"] - labels) / atoms).mean())
        logging.info(f"Energy offset before training: {1e3 * offset:+.1f} meV per atom")
        if abs(offset) > LARGE_OFFSET:
            source, advice = _about_e0s(self.run.asked.args, self.data.has_isolated_atoms)
            logging.warning(
                f"{source}: training starts {offset:+.2f} eV per atom away from the labels, and a "
                f"low-rank adapter can hardly correct such an offset: {advice}"
            )

    def inject(self, model: torch.nn.Module, rank: int = 0, alpha: float = 0) -> torch.nn.Module:
        """mace-torch injects first and converts to other kernels after: that drops the adapters."""
        del rank, alpha  # they stand in the configuration
        args, config = self.run.asked.args, self.run.asked.config
        self.run.unadapted = deepcopy(model).cpu()  # out of the way until the end
        self.run.before.copied(model, self.run.unadapted)
        if args.enable_cueq or args.enable_oeq:
            key = "to_cueq" if args.enable_cueq else "to_oeq"
            logging.info(f"Converting the model ({key}) before the adapters are attached")
            convert: LoadModel = cueq.convert if args.enable_cueq else upstream.original("to_oeq")
            with torch.random.fork_rng():  # so that the adapters start as without conversion
                model = convert(deepcopy(model), device=args.device)
        self.run.injected = inject(model, config)
        if self.run.asked.options.adapter_start:
            self._take_factors(model, self.run.asked.options.adapter_start)
        banner = get_method(config.method).banner(config.options)
        if banner:
            logging.info(banner)
        options = ", ".join(f"{k}={v}" for k, v in config.options.to_json().items())
        logging.info(f"Adapter {config.method} ({options})\n{self.run.injected.summary()}")
        if details := self.run.injected.details():
            logs.to_file(details)
        return model

    def _take_factors(self, model: torch.nn.Module, folder: str) -> None:
        """Take the factors of an existing adapter instead of fresh ones."""
        content = artefact.read(folder)
        if not is_same(self.run.unadapted, content.model):
            raise ArtefactError(
                f"--adapter_start={folder}: its run started from another model than this one "
                "(another foundation model, other elements or other heads), so its factors mean "
                "nothing here"
            )
        here = stored_bases(self.run.started.start)  # before a conversion to other kernels
        artefact.load_factors(model, content.tensors, content.model, here)
        logging.info(f"The adapter starts as {folder} has it; its E0s are those of this run")


def _restore_e0s(model: torch.nn.Module, energies: npt.NDArray[np.float64] | None) -> None:
    block = getattr(model, "atomic_energies_fn", None)
    if energies is None or block is None:
        return
    asked = torch.as_tensor(energies, dtype=block.atomic_energies.dtype)
    asked = asked.reshape(block.atomic_energies.shape).to(block.atomic_energies.device)
    if not torch.allclose(asked, block.atomic_energies, rtol=1e-6, atol=1e-6):
        logs.to_file(
            "mace-torch had replaced the E0s of this run by the foundation model's; "
            "restored those that were asked for"
        )
    block.atomic_energies = asked


def _log_e0s(
    heads: list[str], elements: list[int], energies: npt.NDArray[np.float64] | None
) -> None:
    for head, row in zip(heads, [] if energies is None else np.atleast_2d(energies), strict=False):
        shown = zip(elements, row, strict=True)
        text = ", ".join(f"{chemical_symbols[z]} {energy:.3f}" for z, energy in shown)
        logging.info(f"E0s of head {head}: {text} eV")


def _about_e0s(args: argparse.Namespace, isolated: bool) -> tuple[str, str]:
    """Where the E0s come from, and what to do if they are far off; in words."""
    fitted = "which fits E0s to what the foundation model leaves over"
    if isolated:
        source = "the E0s of the isolated atoms in the training files"
        return source, f"remove them and use --E0s=estimated, {fitted}"
    source = f"--E0s={args.E0s}" if args.statistics_file is None else args.statistics_file
    if args.E0s == "estimated":
        return source, "are the labels of all frames (of each head) of one kind, in eV?"
    return source, f"use --E0s=estimated (with .xyz files), {fitted}"
