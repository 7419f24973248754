"""The page of a run: results, pictures, data, adapter, files, settings, for a colleague."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import date
from pathlib import Path

import torch
from ase.data import chemical_symbols

from mace_lora.config import AdapterConfig
from mace_lora.model import artefact
from mace_lora.model.description import describe
from mace_lora.model.report import InjectionReport
from mace_lora.results.compared import Compared, before_after, table
from mace_lora.results.evaluation import UNITS, Errors
from mace_lora.results.page import Page
from mace_lora.results.pictures import parity
from mace_lora.upstream import known
from mace_lora.upstream.answers import MOST_FRAMES


def write(
    args: argparse.Namespace,
    given: dict[str, object],
    argv: Sequence[str],
    n_training: int,
    config: AdapterConfig,
    injected: InjectionReport,
    model: torch.nn.Module,
    sets: Sequence[Compared],
    files: Callable[[], dict[str, str]],
    trust: Sequence[str],
    judged: Sequence[str],
) -> Path:
    """Write `<name>_parity.png` and `<name>_report.html`; the path of the page.

    Args:
        args: the parsed flags, as upstream takes them.
        given: the same before upstream has filled them in.
        argv: the flags as they were written.
        n_training: number of training frames.
        config: the adapter.
        injected: what was adapted, and the counts.
        model: the merged model of the last stage.
        sets: frames with predictions before and after.
        files: gives what the run left, and what each is.
        trust: verdicts on what the model does away from the training frames.
        judged: the verdict on the run.
    """
    folder, name = Path(args.model_dir), args.name
    picture, path = folder / f"{name}_parity.png", folder / f"{name}_report.html"
    if sets:
        shown = [(part.frames, {name: part.after}) for part in sets]
        parity(shown, picture, title=f"{name}: predictions of the merged model")
    page = Page(
        name,
        f"{args.foundation_model} fine-tuned with {config.method} on {date.today()}; {_versions()}",
    )
    page.section("Verdict")
    page.points(judged)
    _results(page, sets)
    page.picture(folder / f"{name}_learning_curve.png", "validation errors by epoch")
    page.picture(picture, "predictions against labels")
    page.section("Away from the training frames")
    page.points([*trust, "for more: mace_lora trust"])
    _data(page, args, n_training, model, sets)
    _method(page, config, injected)
    _use(page, args, {**files(), str(path): "this page"})
    _settings(page, given, argv)
    page.write(path)
    return path


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in artefact.versions().items())


def _results(page: Page, sets: Sequence[Compared]) -> None:
    page.section("Results")
    if not sets:
        return
    heading, rows = table(sets)
    page.table([*heading[:2], *(f"{text}, before → after" for text in heading[2:])], rows)
    detailed = [
        [
            part.name,
            _label(after),
            str(after.count),
            *(before_after(before, after, q) for q in UNITS),
        ]
        for part in sets
        for before, after in part.rows[1:]
    ]
    used = [i for i in range(len(UNITS)) if any(row[3 + i] for row in detailed)]
    if used:
        named = [f"{q}, {u}" for q, u in UNITS.items()]
        page.text("By configuration type and by element, RMSE before → after:")
        page.table(
            ["set", "", "frames or atoms", *(named[i] for i in used)],
            [[*row[:3], *(row[3 + i] for i in used)] for row in detailed],
            left=2,
        )


def _label(row: Errors) -> str:
    return {"all": "all", "group": row.name, "element": f"atoms of {row.name}"}[row.part]


def _data(
    page: Page,
    args: argparse.Namespace,
    n_training: int,
    model: torch.nn.Module,
    sets: Sequence[Compared],
) -> None:
    page.section("Data")
    facts = {"training": f"{args.train_file} ({n_training} frames)"}
    facts["validation"] = args.valid_file or f"{args.valid_fraction:g} of the training file"
    if args.test_file:
        facts["test"] = args.test_file
    description = describe(model)
    facts["elements"] = ", ".join(chemical_symbols[z] for z in description["atomic_numbers"])
    facts["heads"] = ", ".join(description["heads"])
    for head, row in zip(description["heads"], description["atomic_energies"] or [], strict=False):
        pairs = zip(description["atomic_numbers"], row, strict=True)
        facts[f"E0s (eV), {head}"] = ", ".join(f"{chemical_symbols[z]} {e:.4f}" for z, e in pairs)
    page.facts(facts)
    shown = sum(len(part.frames.atoms) for part in sets)
    page.text(f"Errors and pictures are of {shown} frames, at most {MOST_FRAMES} of each set.")


def _method(page: Page, config: AdapterConfig, injected: InjectionReport) -> None:
    page.section("Adapter")
    page.text(injected.counts())
    default = type(config.options)()
    changed = {
        f.name: " ".join(map(str, value)) if isinstance(value, tuple) else value
        for f in fields(config.options)
        if (value := getattr(config.options, f.name)) != getattr(default, f.name)
    }
    page.facts({"method": config.method, **(changed or {"options": "all at their defaults"})})
    rows = [[part, *(f"{n:,}" for n in row)] for part, row in injected.parts.items()]
    page.table(["part of the model", "parameters", "trained", "adapted layers"], rows)
    if injected.skipped:
        page.text("Not adapted, and frozen:")
        page.points(injected.not_adapted())


def _use(page: Page, args: argparse.Namespace, files: dict[str, str]) -> None:
    page.section("Files and how to use them")
    page.table([], list(files.items()), left=2)
    folder = Path(args.model_dir)
    stage = "_stagetwo" if (folder / f"{args.name}_stagetwo.model").exists() else ""
    merged = folder / f"{args.name}{stage}.model"
    adapter = folder / f"{args.name}{stage}_adapter"
    page.code(
        "# the merged model\n"
        "from mace.calculators import MACECalculator\n"
        f'calculator = MACECalculator("{merged}", default_dtype="{args.default_dtype}")\n\n'
        "# the adapter alone, on its foundation model\n"
        "from mace_lora import MaceLoraCalculator\n"
        f'calculator = MaceLoraCalculator(base="{args.foundation_model}", adapter="{adapter}")\n\n'
        "# in a shell\n"
        f"mace_lora info {adapter}\n"
        f"mace_create_lammps_model {merged}"
    )


def _settings(page: Page, given: dict[str, object], argv: Sequence[str]) -> None:
    page.section("Settings")
    page.code(" ".join(map(shlex.quote, ["mace_run_train", *argv])))
    parser = known.build_parser()
    page.facts(
        {key: value for key, value in sorted(given.items()) if value != parser.get_default(key)}
    )
