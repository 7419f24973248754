"""What a person sees of a run: a bar while it goes on, a picture of the errors afterwards."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mace_lora.files import whole_file


class ProgressBar:
    """Steps done and left, loss, validation errors, time left; silent unless stderr is a terminal.

    Log lines go through the bar while it is shown, so that neither tears the other.
    """

    def __init__(self, steps: int, steps_per_epoch: int, *, enabled: bool = True) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._steps = steps
        self._per_epoch = max(1, steps_per_epoch)
        self._stack = ExitStack()
        self._bar: tqdm | None = None
        self._shown: dict[str, str] = {}

    def __enter__(self) -> ProgressBar:
        if self._enabled:
            self._bar = self._stack.enter_context(
                tqdm(total=self._steps, unit="step", dynamic_ncols=True, leave=False)
            )
            self._stack.enter_context(logging_redirect_tqdm([logging.getLogger()]))
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def step(self, loss: float) -> None:
        """One optimiser step is done."""
        if self._bar is not None:
            self._bar.update(1)
            self._shown["loss"] = f"{loss:.3g}"
            self._bar.set_description(
                f"epoch {(self._bar.n - 1) // self._per_epoch}", refresh=False
            )
            self._bar.set_postfix(self._shown, refresh=False)

    def validated(self, metrics: Mapping[str, Any]) -> None:
        """Validation errors, as upstream reports them (eV, eV/A)."""
        if self._bar is None:
            return
        for key, label in (("mae_e_per_atom", "E/atom meV"), ("mae_f", "F meV/A")):
            if isinstance(metrics.get(key), float):
                self._shown[label] = f"{1e3 * metrics[key]:.1f}"


@dataclass
class History:
    """Validation errors by epoch; epoch None is the model before training."""

    rows: list[tuple[int | None, str, dict[str, float]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def add(self, epoch: int | None, head: str, metrics: Mapping[str, Any]) -> None:
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
        self.rows.append((epoch, head, numbers))

    def plot(self, path: Path, title: str = "") -> None:
        """Energy and force MAE on the validation set against the epoch, as a PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        panels = [("mae_e_per_atom", "energy MAE (meV per atom)"), ("mae_f", "force MAE (meV/Å)")]
        panels = [p for p in panels if any(p[0] in m for _, _, m in self.rows)]
        figure = Figure(figsize=(4.5 * max(1, len(panels)), 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        for i, (key, label) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            for head in dict.fromkeys(h for _, h, _ in self.rows):
                points = [
                    (0 if e is None else e + 1, 1e3 * m[key])
                    for e, h, m in self.rows
                    if h == head and key in m
                ]
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=head)
                axes.axhline(points[0][1], color="0.7", linestyle="--", linewidth=1)
            axes.set(xlabel="epochs trained", ylabel=f"validation {label}", yscale="log")
            axes.annotate(
                f"{points[0][1]:.1f} → {min(p[1] for p in points):.1f}",
                (0.97, 0.93),
                xycoords="axes fraction",
                ha="right",
            )
            if len({h for _, h, _ in self.rows}) > 1:
                axes.legend()
        figure.suptitle(title)
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
