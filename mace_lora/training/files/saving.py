"""The end of a run: adapters merged, the merge proved, and files written whole."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mace_lora.adapters.registry import get_method
from mace_lora.config import AdapterConfig
from mace_lora.errors import WriteError
from mace_lora.model import artefact
from mace_lora.model.injection import adapter_parameters
from mace_lora.model.merging import merge, put_gates, take_gates
from mace_lora.training.files import identity, writing
from mace_lora.training.files.checkpoints import Checkpoints
from mace_lora.upstream import cueq, gated, predicting
from mace_lora.upstream import names as upstream

# Frames on which a merge is proved
PROOF_FRAMES = 8


class Saving:
    """Our functions for what upstream writes.

    Args:
        args: the parsed flags, as upstream takes them.
        config: the adapter.
        valid_sets: gives the validation data sets, on whose frames a merge is proved.
        history: the rows of the validation errors so far, kept in checkpoints.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: AdapterConfig,
        valid_sets: Callable[[], list[Any]],
        history: list[Any],
    ) -> None:
        self.args = args
        self.config = config
        self.valid_sets = valid_sets
        self.base: dict[str, Any] = {}  # as `describe` gives it: the foundation model
        self.start: dict[str, Any] = {}  # and the model that the run started from
        self.merged: torch.nn.Module | None = None  # the last model that was saved
        self.lost: WriteError | None = None  # what upstream went on without
        self.checkpoints = Checkpoints(
            args,
            run=lambda: identity.of_run(config, self.base, self.start, args),
            write_adapter=self._write_adapter,
            history=history,
        )

    def substitutes(self) -> dict[str, Any]:
        """Our functions by key of `upstream.NAMES`."""
        return {
            "merge": self.merge,
            "from_cueq": self.convert_back(cueq.convert_back),
            "from_oeq": self.convert_back(upstream.original("from_oeq")),
            "jit": self.jit(),
            "extract_config": self.extract_config,
            "checkpoints": self.checkpoints.open,
            "save": writing.save_whole,
            "jit_save": self.jit_save,
        }

    def merge(self, model: torch.nn.Module) -> None:
        """Merge in place (upstream ignores what is returned), proved; save the adapter too."""
        if self.args.enable_cueq or self.args.enable_oeq:
            return  # upstream merges one copy and converts another: see `convert_back`
        self._save_adapter(model)
        self._fold(model)

    def convert_back(self, convert: Callable[..., torch.nn.Module]) -> Callable[..., Any]:
        """Upstream converts the unmerged model back, and so saves a model without adapters."""

        def merge_and_convert(model: torch.nn.Module, device: Any) -> torch.nn.Module:
            self._save_adapter(model)
            return self._fold(model, lambda merged: convert(merged, device=device))

        return merge_and_convert

    def _fold(
        self,
        model: torch.nn.Module,
        convert: Callable[[torch.nn.Module], torch.nn.Module] = lambda merged: merged,
    ) -> torch.nn.Module:
        """Merge what can be merged, convert, and prove on frames that the result predicts the same.

        Raises:
            MergeMismatch: it doesn't.
        """
        batches = [b for s in self.valid_sets() for b in predicting.batch_of(s, PROOF_FRAMES)]
        before = predicting.predict(model, batches)
        gates = take_gates(merge(model, keep_gates=True))
        merged = convert(model)  # with gates, upstream would not know its layers
        put_gates(merged, gates)
        if gates:
            gated.mark(merged)
            logging.info(
                f"{len(gates)} gates depend on the input and stay: loading the .model file needs "
                "mace_lora, the _compiled.model doesn't"
            )
        otherwise = f"no model was written, the adapter is in {self.adapter_folder()}"
        found = predicting.prove_merge(before, merged, batches, otherwise)
        n_frames = sum(b.num_graphs for b in batches)
        text = predicting.differences_text(found)
        logging.info(f"Merged; largest difference on {n_frames} validation frames: {text}")
        self.merged = merged
        return merged

    def adapter_folder(self) -> Path:
        """Where the adapter of the stage that is being saved goes."""
        stage = "_stagetwo" if self.checkpoints.stage_two else ""
        return Path(self.args.model_dir) / f"{self.args.name}{stage}_adapter"

    def _save_adapter(self, model: torch.nn.Module) -> None:
        folder = self.adapter_folder()
        with writing.explained(folder):
            self._write_adapter(folder, adapter_parameters(model))
        logging.info(f"Saved the adapter alone to {folder}")

    def _write_adapter(self, folder: Path, factors: dict[str, torch.Tensor]) -> None:
        artefact.write(folder, self.config, factors, self.base, self.start)

    def what_was_left(self) -> dict[str, str]:
        """The files to take away, and what each is."""
        folder, name = Path(self.args.model_dir), self.args.name
        plain = get_method(self.config.method).mergeable
        model = "merged, a plain MACE model" if plain else "with gates: loading it needs mace_lora"
        compiled = "the same as TorchScript, for LAMMPS"
        files = {
            f"{name}{stage}{kind}": meaning
            for stage in ("", "_stagetwo")
            for kind, meaning in (
                (".model", model),
                ("_compiled.model", compiled if plain else f"{compiled}; needs mace-torch alone"),
                ("_adapter", "the adapter alone"),
            )
        }
        files[f"{name}_learning_curve.png"] = "validation errors by epoch"
        files[f"{name}_parity.png"] = "predictions against labels"
        files[f"{name}_report.html"] = "all of this on a page, to be read in a browser or sent"
        return {
            str(folder / file): meaning
            for file, meaning in files.items()
            if (folder / file).exists()
        }

    def jit_save(self, m: Any, f: Any, *rest: Any, **keywords: Any) -> None:
        """Upstream swallows every error here; it is kept for the end of the run."""
        try:
            writing.jit_save_whole(m, f, *rest, **keywords)
        except WriteError as error:
            self.lost = error
            raise

    @staticmethod
    def extract_config(model: torch.nn.Module) -> dict[str, Any]:
        """Upstream reads E0s, scale and shift of the unmerged model, where they can be trained."""
        with torch.no_grad():
            return upstream.original("extract_config")(model)

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
