"""Pictures of predictions against labels, and of dynamics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mace_lora.files import whole_file
from mace_lora.results.evaluation import FAR, UNITS
from mace_lora.results.labelled import LabelledFrames, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {"energy": "energy per atom (eV)", "forces": "forces (eV/Å)", "stress": "stress (eV/Å³)"}
# More points than this make a picture slow and show no more
MOST_POINTS = 20000


def parity(
    data: Sequence[tuple[LabelledFrames, Mapping[str, Values]]], path: str | Path, title: str = ""
) -> None:
    """Predictions against labels: a row per file, a panel per quantity, a colour per model.

    Args:
        data: frames, and what each model (by name) predicts for them.
        path: of the PNG, written whole or not at all.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quantities = [
        q for q in _LABELS if any(np.isfinite(getattr(f.labels, q)).any() for f, _ in data)
    ]
    size = (4.3 * len(quantities), 3.9 * len(data) + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(data), len(quantities), squeeze=False)
    for row, (frames, predictions) in zip(panels, data, strict=True):
        for axes, quantity in zip(row, quantities, strict=True):
            _panel(axes, quantity, getattr(frames.labels, quantity), predictions)
            axes.set_title(frames.name, fontsize=9)
    figure.suptitle(title)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _panel(
    axes: Axes, quantity: str, labels: np.ndarray, predictions: Mapping[str, Values]
) -> None:
    known = np.isfinite(labels)
    if not known.any():
        axes.set_axis_off()
        return
    truth = labels[known]
    origin = truth.mean() if quantity == "energy" else 0.0
    low, high = truth.min() - origin, truth.max() - origin
    thin = np.random.default_rng(0).permutation(truth.size)[:MOST_POINTS]
    for name, values in predictions.items():
        found = getattr(values, quantity)[known]
        rmse = 1e3 * np.sqrt(((found - truth) ** 2).mean())
        label = f"{name}: RMSE {rmse:.3g}" if rmse < 1000 else f"{name}: RMSE {rmse:,.0f}"
        label += f" {UNITS[quantity]}"
        if quantity != "energy" or rmse <= FAR:
            low, high = min(low, found.min() - origin), max(high, found.max() - origin)
        else:
            label += " (outside)"
        axes.scatter(
            truth[thin] - origin, found[thin] - origin, s=6, alpha=0.5, linewidths=0, label=label
        )
    margin = 0.04 * (high - low) or 1e-3
    line = (low - margin, high + margin)
    axes.plot(line, line, color="0.4", linewidth=0.8, zorder=0)
    what = _LABELS[quantity] + (" − mean label" if quantity == "energy" else "")
    axes.set(xlim=line, ylim=line, xlabel=f"label: {what}", ylabel=f"predicted: {what}")
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=7, markerscale=2)


def dynamics(
    log: Mapping[str, np.ndarray], n_atoms: int, path: str | Path, title: str, kelvin: float
) -> None:
    """Energies and temperature with time.

    Args:
        log: time_ps, potential_eV, total_eV and temperature_K, each (n_samples,).
        n_atoms: energies are shown per atom.
        path: of the PNG, written whole or not at all.
        title: above the picture.
        kelvin: the temperature that was asked for.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    energies, temperature = figure.subplots(2, 1, sharex=True)
    for name, colour in (("potential", "#94a3b8"), ("total", "#c2410c")):
        values = 1e3 * log[f"{name}_eV"] / n_atoms
        energies.plot(log["time_ps"], values - values[0], label=name, color=colour)
    energies.set_ylabel("energy − first (meV per atom)")
    energies.legend(fontsize=9)
    temperature.plot(log["time_ps"], log["temperature_K"], color="#1d4ed8")
    temperature.axhline(kelvin, color="0.4", linewidth=0.8, linestyle="--")
    temperature.set(xlabel="time (ps)", ylabel="temperature (K)")
    for axes in (energies, temperature):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
