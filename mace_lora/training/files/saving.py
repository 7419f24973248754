"""The end of a run: adapters merged, the merge proved, and files written whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from mace_lora.adapters.registry import get_method
from mace_lora.errors import WriteError
from mace_lora.model import artefact
from mace_lora.model.injection import adapter_parameters
from mace_lora.model.merging import merge, put_gates, take_gates
from mace_lora.training.epochs import e0s
from mace_lora.training.files import writing
from mace_lora.training.files.checkpoints import Checkpoints
from mace_lora.training.record import Run, Saved
from mace_lora.upstream import gated, predicting
from mace_lora.upstream import names as upstream

# Frames on which a merge is proved, and atoms in them, unless the first alone has more
PROOF_FRAMES, PROOF_ATOMS = 8, 400


class Saving:
    """Our functions for what mace-torch writes at the end; `run` comes to `saved` here."""

    def __init__(self, run: Run, checkpoints: Checkpoints) -> None:
        self.run = run
        self.args, self.config = run.asked.args, run.asked.config
        self.checkpoints = checkpoints

    def merge(self, model: torch.nn.Module) -> None:
        """Merge in place (mace-torch ignores what is returned), proved; save the adapter too."""
        if self.args.enable_cueq or self.args.enable_oeq:
            return  # mace-torch merges one copy and converts another: see `convert_back`
        self._save_adapter(model)
        self._merge(model)

    def convert_back(
        self, convert: Callable[..., torch.nn.Module]
    ) -> Callable[..., torch.nn.Module]:
        """mace-torch converts the unmerged model back, and so saves a model without adapters."""

        def merge_and_convert(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
            self._save_adapter(model)
            return self._merge(model, lambda merged: convert(merged, device=device))

        return merge_and_convert

    def _merge(
        self,
        model: torch.nn.Module,
        convert: Callable[[torch.nn.Module], torch.nn.Module] = lambda merged: merged,
    ) -> torch.nn.Module:
        """Merge what can be merged, convert, and prove on frames that the result predicts the same.

        Raises:
            MergeMismatch: it doesn't.
        """
        sets = self.run.trained.valid_sets.values()
        batches = [
            b for s in sets for b in predicting.batch_of(s, PROOF_FRAMES, most_atoms=PROOF_ATOMS)
        ]
        before = predicting.predict(model, batches)
        gates = take_gates(merge(model, keep_gates=True))
        merged = convert(model)  # with gates, upstream would not know its layers
        put_gates(merged, gates)
        if gates:
            gated.mark(merged)
            logging.info(
                f"{len(gates)} gates depend on the input and can't be merged: loading the .model "
                "file needs mace_lora, the _compiled.model doesn't"
            )
        otherwise = f"no model was written, the adapter is in {self.adapter_folder()}"
        found = predicting.prove_merge(before, merged, batches, otherwise)
        n_frames = sum(b.num_graphs for b in batches)
        text = predicting.differences_text(found)
        logging.info(f"Merged; largest difference on {n_frames} validation frames: {text}")
        self.run.after.begin(merged)
        lost = self.run.saved.lost if hasattr(self.run, "saved") else None  # stage one
        self.run.saved = Saved(merged, lost)
        return merged

    def adapter_folder(self) -> Path:
        """Where the adapter of the stage that is being saved goes."""
        stage = "_stagetwo" if self.checkpoints.stage_two else ""
        return Path(self.args.model_dir) / f"{self.args.name}{stage}_adapter"

    def _save_adapter(self, model: torch.nn.Module) -> None:
        folder = self.adapter_folder()
        base, start = self.run.started.base, e0s.described(self.run, model)
        with writing.write_errors(folder):
            factors = adapter_parameters(model)
            artefact.write(folder, self.config, factors, base, start)
        logging.info(f"Saved the adapter alone to {folder}")

    def jit_save(self, m: object, f: writing.File, *rest: object, **keywords: object) -> None:
        """mace-torch swallows every error here; it is kept for the end of the run."""
        try:
            writing.jit_save_whole(m, f, *rest, **keywords)
        except WriteError as error:
            self.run.saved = replace(self.run.saved, lost=error)
            raise


def extract_config(model: torch.nn.Module) -> dict[str, object]:
    """mace-torch reads E0s, scale and shift of the unmerged model, where they can be trained."""
    with torch.no_grad():
        found: dict[str, object] = upstream.original("extract_config")(model)
    return found


def jit() -> SimpleNamespace:
    """mace-torch swallows every error of the TorchScript compilation; here it is logged."""
    original = upstream.original("jit").compile

    def compile(model: torch.nn.Module) -> torch.jit.ScriptModule:
        try:
            compiled: torch.jit.ScriptModule = original(model)
        except Exception as error:
            logging.warning(f"no _compiled.model: TorchScript refuses this model: {error}")
            raise
        return compiled

    return SimpleNamespace(compile=compile)


def files_left(run: Run) -> dict[str, str]:
    """The files of a run to take away, and what each is."""
    folder, name = Path(run.asked.args.model_dir), run.asked.args.name
    plain = get_method(run.asked.config.method).mergeable
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
    files[f"{name}.yaml"] = "the run with all its settings, for --config"
    files[f"{name}_learning_curve.png"] = "validation errors by epoch"
    files[f"{name}_parity.png"] = "predictions against labels"
    files[f"{name}_report.html"] = "all of this on one page, to open in a browser or to send"
    return {
        str(folder / file): meaning for file, meaning in files.items() if (folder / file).exists()
    }
