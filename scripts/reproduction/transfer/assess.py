"""What is found out about one finished run, in files beside it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mace_lora.files import whole_file
from mace_lora.model.description import atomic_numbers
from mace_lora.trust.measures import against_start, answers, wall
from reproduction import evaluation
from reproduction.transfer import measures, plan
from reproduction.transfer.dynamics import Lengths, simulate
from reproduction.transfer.frames import Questions
from reproduction.transfer.plan import Numbers, TransferRun

ERRORS, DYNAMICS = "transfer.json", "dynamics.json"
Found = dict[str, Any]


def errors(run: TransferRun, result: Found, others: str, numbers: Numbers) -> Found:
    """The errors of a trained model; computed once for the same questions.

    Args:
        run: finished.
        result: of `runs.execute`.
        others: as in `plan.questions`.
        numbers: how many frames.
    """
    asked = {"molecules": others, "frames": asdict(numbers)}
    path = run.folder / ERRORS
    if found := _kept(path, asked):
        return found
    start, model = (evaluation.load_model(p) for p in (run.start, run.folder / "run.model"))
    known = tuple(atomic_numbers(start))
    questions = plan.questions(run.data, run.system.dataset, run.n_train, known, others, numbers)
    found = {
        "asked": asked,
        "foundation": run.foundation,
        "system": run.system.name,
        "method": run.method.name,
        "title": run.method.title,
        "baseline": run.candidate.baseline,
        "rate": run.rate,
        "steps": run.steps,
        "seed": run.seed,
        "variant": _variant(run),
        "trainable_parameters": result["trainable_parameters"],
        "seconds_per_step": result["seconds_per_step"],
        "seconds": None if result["resumed"] else result["seconds_of_last_attempt"],
        "notes": questions.notes,
        **compare(model, start, questions),
    }
    if run.foundation == "mini":
        found["truth"] = evaluation.forgetting(model)
    _write(path, found)
    return found


def compare(model: torch.nn.Module, start: torch.nn.Module, questions: Questions) -> Found:
    """All errors of `model`, where labels are missing those against `start`."""
    labelled = {name: measures.against_labels(model, f) for name, f in questions.others.items()}
    kept = {
        name: against_start(answers(model, frames), answers(start, frames), frames)
        for name, frames in questions.broad.items()
    }
    return {
        "valid": measures.against_labels(model, questions.valid),
        "target": measures.against_labels(model, questions.target),
        "others": labelled,
        "kept": kept,
        "dimers": wall(model, start, questions.dimers),
        "foreign": wall(model, start, questions.foreign) if questions.foreign else None,
        "compressed": wall(model, start, questions.compressed),
    }


def validation(found: Found) -> float:
    """What a learning rate is chosen by: the geometric mean of the errors of energies and forces
    on the validation frames.
    """
    error = float(np.sqrt(found["valid"]["forces"] * found["valid"]["energy"]))
    return error if np.isfinite(error) else float("inf")


def dynamics(run: TransferRun, others: str, numbers: Numbers, lengths: Lengths) -> Found:
    """Dynamics with a trained model, from frames of the target; computed once for the same
    lengths.
    """
    asked = json.loads(json.dumps(asdict(lengths)))  # tuples as the file gives them back
    path = run.folder / DYNAMICS
    if found := _kept(path, asked):
        return found
    start, model = (evaluation.load_model(p) for p in (run.start, run.folder / "run.model"))
    known = tuple(atomic_numbers(start))
    questions = plan.questions(run.data, run.system.dataset, run.n_train, known, others, numbers)
    began = time.time()
    found = {"asked": asked, **simulate(model, questions.target, lengths)}
    found["seconds"] = time.time() - began
    _write(path, found)
    return found


def _variant(run: TransferRun) -> str:
    """The name of a run without rate, budget and seed: flags given by hand stay in it."""
    name = run.folder.name.removesuffix(f"-s{run.steps}-seed{run.seed}")
    return name.replace(f"-lr{run.rate:g}", "", 1)


def _kept(path: Path, asked: Found) -> Found:
    if not path.exists():
        return {}
    found: Found = json.loads(path.read_text())
    return found if found["asked"] == asked else {}


def _write(path: Path, found: Found) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
