"""One fine-tuning run: what happens when upstream's script calls back.

Upstream loads and splits the data, builds loss, optimiser, schedulers, EMA and SWA, and runs the
epochs. A `Session` is there at the few points where adapters matter. Each of its methods replaces
the name of upstream's that `substitutes` pairs it with, and each says why.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mace_lora import artefact
from mace_lora.config import AdapterConfig
from mace_lora.errors import Diverged, MergeMismatch
from mace_lora.files import whole_file
from mace_lora.fingerprint import fingerprint
from mace_lora.host import checks, models, upstream
from mace_lora.host.checkpoints import make_checkpoint_handler
from mace_lora.injection import adapter_parameters, inject
from mace_lora.merging import merge
from mace_lora.progress import History, ProgressBar

# Largest relative difference between adapted and merged model that is saved without an error
MERGE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
# Frames on which a merge is proved, and on which the energy offset at the start is measured
PROOF_FRAMES = 8
# Fewer than this, in eV per atom, is nothing to speak of
LARGE_OFFSET = 0.05


class Session:
    """The state of one run, and the functions that upstream's script calls instead of its own.

    Args:
        args: the parsed flags, as upstream takes them.
        config: the adapter.
        foundation: the loaded foundation model; None where mace-torch loads it by name.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: AdapterConfig,
        foundation: torch.nn.Module | None,
    ) -> None:
        self.args = args
        self.config = config
        self.foundation = foundation
        self.base: dict[str, Any] = {}
        self.start: dict[str, Any] = {}
        self.valid_sets: list[Any] = []
        self.stage_two = False  # which model upstream has loaded for saving
        self.history = History()
        self.bar: ProgressBar | None = None

    def substitutes(self) -> dict[str, Any]:
        """Our functions by key of `upstream.NAMES`."""
        loaders = ("mace_mp", "mace_off", "mace_omol", "mace_polar")
        return {
            **{key: self.watched(upstream.original(key)) for key in loaders},
            "inject": self.inject,
            "merge": self.merge,
            "to_cueq": self.already_converted,
            "to_oeq": self.already_converted,
            "from_cueq": lambda model, device=None: self.merge_and_convert("from_cueq", model),
            "from_oeq": lambda model, device=None: self.merge_and_convert("from_oeq", model),
            "configure_model": self.configure_model,
            "params_options": self.params_options,
            "lbfgs": self.lbfgs,
            "ema": self.ema,
            "jit": self.jit(),
            "count_parameters": self.count_trainable,
            "train": self.train,
            "take_step": self.take_step,
            "log_errors": self.log_errors,
            "checkpoints": make_checkpoint_handler(upstream.original("checkpoints"), self),
            "load_xyz": checks.checked_loader(
                upstream.original("load_xyz"), self.args, self.known_elements
            ),
            "estimate_e0s": self.estimate_e0s,
            "avg_num_neighbors": self.avg_num_neighbors,
        }

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
        """The first use of the training batches, where upstream fails if there is none."""
        checks.enough_frames(train_loader, args)
        return upstream.original("avg_num_neighbors")(heads, args, train_loader, device)

    def configure_model(self, args: argparse.Namespace, *rest: Any, **keywords: Any) -> Any:
        """Remembers the base model; mends E0s that upstream overwrites; speaks of energy offsets.

        With the same elements in the run as in the foundation model, upstream 0.3.16 copies the
        foundation's E0s over those that were asked for (a state-dict copy by equal shape).
        """
        original = upstream.original("configure_model")
        model, outputs = original(args, *rest, **keywords)
        train_loader, energies, foundation = rest[:3]
        self.base = {
            "name": str(args.foundation_model),
            "head": args.foundation_head,
            **models.describe(foundation),
            "fingerprint": fingerprint(foundation),
        }
        self._mend_e0s(model, energies)
        self.start = models.describe(model)
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
        batches = models.batch_of(train_loader.dataset, PROOF_FRAMES)
        if not batches or getattr(batches[0], "energy", None) is None:
            return
        predicted = models.predict(model.to(args.device), batches).get("energy")
        if predicted is None:
            return
        atoms = (batches[0].ptr[1:] - batches[0].ptr[:-1]).to(predicted)
        offset = ((predicted - batches[0].energy.to(predicted)) / atoms).mean().item()
        logging.info(f"Energy offset before training: {1e3 * offset:+.1f} meV per atom")
        if abs(offset) > LARGE_OFFSET:
            logging.warning(
                f"--E0s={args.E0s} starts {offset:+.2f} eV per atom away from the labels, and a "
                "low-rank adapter hardly moves such an offset: use --E0s=estimated, which fits the "
                "E0s to what the foundation model leaves over"
            )

    def inject(self, model: torch.nn.Module, rank: int = 0, alpha: float = 0) -> torch.nn.Module:
        """Upstream injects first and converts to other kernels after, which drops the adapters."""
        del rank, alpha  # they stand in self.config
        args = self.args
        self.start["fingerprint"] = fingerprint(model)
        key = "to_cueq" if args.enable_cueq and not args.only_cueq else None
        key = "to_oeq" if args.enable_oeq and key is None else key
        if key is not None:
            logging.info(f"Converting the model ({key}) before the adapters are attached")
            with torch.random.fork_rng():  # so that the adapters start as without conversion
                model = upstream.original(key)(deepcopy(model), device=args.device)
        report = inject(model, self.config)
        options = ", ".join(f"{k}={v}" for k, v in self.config.options.to_json().items())
        logging.info(f"Adapter {self.config.method} ({options})\n{report}")
        return model

    @staticmethod
    def already_converted(model: torch.nn.Module, device: Any = None) -> torch.nn.Module:
        """Conversion to other kernels came before the injection (see `inject`)."""
        return model

    @staticmethod
    def count_trainable(module: torch.nn.Module) -> int:
        """Upstream counts frozen parameters as trainable ones."""
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    # ------------------------------------------------------------------ training

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
        groups: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(name.partition(".")[0], []).append(parameter)
        logging.info(
            f"Weight decay {args.weight_decay} acts on all adapter parameters, on no frozen one"
        )
        return {
            "params": [
                {
                    "name": part,
                    "params": parameters,
                    "weight_decay": args.weight_decay,
                    "lr": factors.get(keys.get(part, ""), 1.0) * args.lr,
                }
                for part, parameters in groups.items()
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
        steps = len(keywords["train_loader"])
        epochs = max(0, keywords["max_num_epochs"] - keywords["start_epoch"])
        original = upstream.original("train")
        with ProgressBar(epochs * steps, steps, enabled=keywords.get("rank", 0) == 0) as self.bar:
            original(**keywords)
        if keywords.get("rank", 0) == 0 and self.history:
            self._draw_learning_curve()

    def _draw_learning_curve(self) -> None:
        picture = Path(self.args.model_dir) / f"{self.args.name}_learning_curve.png"
        try:
            self.history.plot(picture, title=f"{self.args.name}: {self.config.method}")
        except Exception as error:  # a picture is no reason to lose the model that is saved next
            logging.warning(f"no learning curve: {type(error).__name__}: {error}")

    def take_step(self, *positional: Any, **keywords: Any) -> Any:
        """Upstream's step, seen by the bar; effective weights are computed once per step."""
        original = upstream.original("take_step")
        with torch.nn.utils.parametrize.cached():
            loss, metrics = original(*positional, **keywords)
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

    # ------------------------------------------------------------------ saving

    def merge(self, model: torch.nn.Module) -> None:
        """Merge in place (upstream ignores what is returned), proved; save the adapter too."""
        if self.args.enable_cueq or self.args.enable_oeq:
            return  # upstream merges one copy and converts another: see `merge_and_convert`
        self._save_adapter(model)
        self._fold(model)

    def merge_and_convert(self, key: str, model: torch.nn.Module) -> torch.nn.Module:
        """Upstream converts the unmerged model back, and so saves a model without adapters."""
        self._save_adapter(model)
        self._fold(model)
        return upstream.original(key)(model, device=self.args.device)

    def _fold(self, model: torch.nn.Module) -> None:
        batches = [b for s in self.valid_sets for b in models.batch_of(s, PROOF_FRAMES)]
        before = models.predict(model, batches)
        merge(model)
        found = models.largest_difference(before, models.predict(model, batches))
        tolerance = MERGE_TOLERANCE[next(model.parameters()).dtype]
        text = ", ".join(f"{k} {a:.1e} (relative {r:.1e})" for k, (a, r) in found.items())
        n_frames = sum(b.num_graphs for b in batches)
        logging.info(f"Merged; largest difference on {n_frames} validation frames: {text}")
        if any(not relative <= tolerance for _, relative in found.values()):
            raise MergeMismatch(
                f"the merged model differs from the adapted one by {text}, more than the relative "
                f"{tolerance:.0e} allowed; no model was written, the adapter is in "
                f"{self.adapter_folder()}"
            )

    def adapter_folder(self) -> Path:
        """Where the adapter of the stage that is being saved goes."""
        stage = "_stagetwo" if self.stage_two else ""
        return Path(self.args.model_dir) / f"{self.args.name}{stage}_adapter"

    def _save_adapter(self, model: torch.nn.Module) -> None:
        folder = self.adapter_folder()
        artefact.write(folder, self.config, adapter_parameters(model), self.base, self.start)
        logging.info(f"Saved the adapter alone to {folder}")

    def say_what_was_done(self) -> None:
        """The last lines of the log: errors before and after, and the files to take away."""
        if self.history:
            logging.info(f"Validation, before -> after: {self.history.summary()}")
        folder, name = Path(self.args.model_dir), self.args.name
        files = {
            f"{name}{stage}{kind}": meaning
            for stage in ("", "_stagetwo")
            for kind, meaning in (
                (".model", "merged, a plain MACE model"),
                ("_compiled.model", "the same as TorchScript, for LAMMPS"),
                ("_adapter", "the adapter alone"),
            )
        }
        files[f"{name}_learning_curve.png"] = "validation errors by epoch"
        for file, meaning in files.items():
            if (folder / file).exists():
                logging.info(f"  {folder / file}: {meaning}")

    @staticmethod
    def jit() -> SimpleNamespace:
        """Upstream swallows every error of the TorchScript compilation; here it is said."""
        real = upstream.original("jit")

        def compile(*positional: Any, **keywords: Any) -> Any:
            try:
                return real.compile(*positional, **keywords)
            except Exception as error:
                logging.warning(f"no _compiled.model: TorchScript refuses this model: {error}")
                raise

        return SimpleNamespace(compile=compile)


def save_whole(obj: Any, f: Any, *rest: Any, **keywords: Any) -> None:
    """`torch.save`, but a file that is named is written whole or not at all."""
    _whole(upstream.original("save"), obj, f, *rest, **keywords)


def jit_save_whole(m: Any, f: Any, *rest: Any, **keywords: Any) -> None:
    """`torch.jit.save`, but a file that is named is written whole or not at all."""
    _whole(upstream.original("jit_save"), m, f, *rest, **keywords)


def _whole(save: Any, obj: Any, f: Any, *rest: Any, **keywords: Any) -> None:
    if isinstance(f, (str, Path)):
        with whole_file(f) as temporary:
            save(obj, str(temporary), *rest, **keywords)
    else:
        save(obj, f, *rest, **keywords)
