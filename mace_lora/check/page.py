"""What was found of files, as a page of HTML with histograms."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mace_lora.check.compared import Array, Compared
from mace_lora.check.files import Looked
from mace_lora.check.findings import named
from mace_lora.check.sets import energies_per_atom, largest_forces, without_composition
from mace_lora.results.page import Page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 40
_MOST_POINTS = 5000


def write(
    path: Path, data: Mapping[str, Any], looked: Sequence[Looked], compared: Mapping[str, Compared]
) -> None:
    """Write the page whole or not at all.

    Args:
        path: of the page.
        data: the result of the command.
        looked: the files.
        compared: by path a sample of each with predictions.
    """
    n = len(data["problems"])
    page = Page("Labelled frames, checked", f"against {data['base']}: {n} errors")
    page.section("Files")
    head = ["file", "compositions", "frames", "atoms", "labels"]
    page.table(head, [_row(file) for file in data["files"]], left=2)
    paste = " ".join(flag for flag in (data["flags"], data["units"]) if flag)
    if paste:
        page.text("Flags that these files need:")
        page.code(paste)
    page.section("Findings")
    rows = [
        [f["severity"], f["what"], f["path"], f["why"], named(f["frames"]) if f["frames"] else ""]
        for f in data["findings"]
    ]
    if rows:
        page.table(["", "what", "file", "found", "frames"], rows, left=5)
        page.points([f"{f['what']}: {f['remedy']}" for f in data["findings"] if f["remedy"]])
    else:
        page.text("Nothing to say.")
    page.section("Distributions")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "histograms.png"
        _draw(picture, looked, compared)
        page.picture(picture, "histograms of energies, forces and sizes; predictions and labels")
    page.write(path)


def _row(file: Mapping[str, Any]) -> list[str]:
    atoms = "-".join(map(str, dict.fromkeys(file["atoms"])))
    shown = ", ".join(f"{name} {n}" for name, n in file["compositions"].items())
    return [file["path"], shown, str(file["frames"]), atoms, ", ".join(file["labels"])]


def _draw(path: Path, looked: Sequence[Looked], compared: Mapping[str, Compared]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    (energies, forces), (sizes, parity) = figure.subplots(2, 2)
    for file in looked:
        if file.frames is None:
            continue
        frames, name = file.frames.configurations, Path(file.path).name
        left = without_composition(frames, energies_per_atom(file.frames))
        _histogram(energies, left, name)
        _histogram(forces, largest_forces(file.frames), name)
        _histogram(sizes, np.array([len(f.atomic_numbers) for f in frames], dtype=float), name)
        if file.path in compared:
            _parity(parity, compared[file.path], name)
    energies.set(xlabel="energy per atom beside fitted E0s, eV", ylabel="frames")
    forces.set(xlabel="largest force on an atom, eV/Å", ylabel="frames")
    sizes.set(xlabel="atoms", ylabel="frames")
    parity.set(xlabel="force predicted by the base model, eV/Å", ylabel="label, eV/Å")
    for axes in (energies, forces, sizes):
        axes.set_yscale("log")
    if energies.get_legend_handles_labels()[0]:
        energies.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def _histogram(axes: Axes, values: Array, name: str) -> None:
    known = values[np.isfinite(values)]
    if known.size:
        axes.hist(known, bins=_BINS, histtype="step", label=name)


def _parity(axes: Axes, compared: Compared, name: str) -> None:
    known = np.isfinite(compared.forces)
    labels, predicted = compared.forces[known], compared.predicted_forces[known]
    thin = np.random.default_rng(0).permutation(labels.size)[:_MOST_POINTS]
    axes.scatter(predicted[thin], labels[thin], s=4, alpha=0.4, linewidths=0, label=name)
    axes.axline((0, 0), slope=1, color="0.4", linewidth=0.8)
