"""Pictures: parity of one run; learning curves and error against training frames over runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from mace_lora.files import whole_file
from reproduction import runs

Row = dict[str, Any]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def parity(result: Row, folder: Path) -> None:
    """Predictions of a run's last stage against labels, a row of panels per test set.

    Energies per atom, from the mean of the labels on.
    """
    stage = list(result["errors"])[-1]
    tests = list(result["errors"][stage])
    arrays = np.load(folder / f"predictions_{stage}.npz")
    figure = _figure(8, 3.7 * len(tests))
    for i, test in enumerate(tests):
        get = {k: arrays[f"{test}/{k}"] for k in ("atoms", "energy", "energy_reference")}
        reference = get["energy_reference"] / get["atoms"]
        energy = 1e3 * (get["energy"] / get["atoms"] - reference.mean())
        errors = result["errors"][stage][test]
        for j, (x, y, label, unit, text) in enumerate(
            (
                (
                    1e3 * (reference - reference.mean()),
                    energy,
                    "energy",
                    "meV per atom",
                    f"MAE {errors['energy_per_atom_mae']:.1f} meV per atom",
                ),
                (
                    arrays[f"{test}/forces_reference"].ravel(),
                    arrays[f"{test}/forces"].ravel(),
                    "force component",
                    "eV/Å",
                    f"MAE {errors['forces_mae']:.1f} meV/Å",
                ),
            )
        ):
            axes = figure.add_subplot(len(tests), 2, 2 * i + j + 1)
            axes.plot(x, y, ".", markersize=3, alpha=0.4, rasterized=True)
            ends = [min(x.min(), y.min()), max(x.max(), y.max())]
            axes.plot(ends, ends, color="black", linewidth=0.8)
            axes.set(
                xlabel=f"reference {label} ({unit})",
                ylabel=f"predicted {label} ({unit})",
                title=f"{test}: {text}",
            )
    figure.suptitle(f"{result['dataset']} {result['system']}, {result['run']}")
    _save(figure, folder / "parity.png")


def learning_curves(found: list[Row], out: Path) -> None:
    """Validation errors against optimiser steps, every run of a molecule in one picture."""
    for (dataset, system), mine in _by_system(found):
        figure = _figure(11, 4.2)
        panels = [figure.add_subplot(1, 2, i + 1) for i in range(2)]
        for result in mine:
            folder = out / "runs" / dataset / system / result["run"]
            for axes, key in zip(panels, ("mae_e_per_atom", "mae_f"), strict=True):
                points = _curve(result, folder, key)
                if points:
                    axes.plot(*zip(*points, strict=True), label=result["run"], linewidth=1.2)
        for axes, label in zip(
            panels, ("energy MAE (meV per atom)", "force MAE (meV/Å)"), strict=True
        ):
            _logarithmic(axes, "optimiser steps", f"validation {label}")
        panels[1].legend(fontsize=6)
        figure.suptitle(f"{dataset} {system}")
        _save(figure, out / f"learning_curves_{dataset}_{system}.png")


def _curve(result: Row, folder: Path, key: str) -> list[tuple[int, float]]:
    """(optimiser steps done, error in meV or meV/A) of each validation of a run."""
    points = {}
    for row in runs.rows(folder, "eval"):
        if isinstance(row.get(key), float):
            epoch = -1 if row["epoch"] is None else row["epoch"]  # None: before training
            done = runs.steps_until(result["train_frames"], result["settings"], epoch)
            points[done] = 1e3 * row[key]
    return sorted(points.items())


def error_against_frames(table: list[Row], out: Path) -> None:
    """Test errors against the number of training frames, where a method was run with several."""
    shown = [row for row in table if row["last_stage"]]
    for (dataset, system), mine in _by_system(shown):
        if len({row["train_frames"] for row in mine}) < 2:
            continue
        for test in mine[0]["errors"]:
            figure = _figure(10, 4)
            for i, (what, unit) in enumerate((("energy", "meV"), ("forces", "meV/Å"))):
                axes = figure.add_subplot(1, 2, i + 1)
                for name in dict.fromkeys(_without_frames(row) for row in mine):
                    rows = [r for r in mine if _without_frames(r) == name and test in r["errors"]]
                    rows.sort(key=lambda r: r["train_frames"])
                    axes.errorbar(
                        [r["train_frames"] for r in rows],
                        [r["errors"][test][what]["mean"] for r in rows],
                        [r["errors"][test][what]["std"] or 0.0 for r in rows],
                        marker="o",
                        markersize=3,
                        label=name,
                    )
                axes.set_xscale("log")
                axes.set_xticks(sorted({r["train_frames"] for r in mine}))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
                measure = mine[0]["measure"].upper()
                _logarithmic(axes, "training frames", f"{test}: {what} {measure} ({unit})")
            axes.legend(fontsize=7)
            figure.suptitle(f"{dataset} {system}")
            _save(figure, out / f"error_against_frames_{dataset}_{system}_{test}.png")


def _without_frames(row: Row) -> str:
    return row["variant"].rsplit("-n", 1)[0]


def _by_system(found: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        groups.setdefault((row["dataset"], row["system"]), []).append(row)
    return list(groups.items())


def _logarithmic(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.grid(alpha=0.3, which="both")
