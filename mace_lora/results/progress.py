"""What a person sees of a run: a bar while it goes on, a picture of the errors afterwards."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from tqdm.auto import tqdm

from mace_lora.files import whole_file

# what is drawn and summed up: key of upstream's metrics, label, unit after multiplication by 1000
_CURVES = (
    ("rmse_e_per_atom", "energy RMSE", "meV per atom"),
    ("rmse_f", "force RMSE", "meV/Å"),
    ("rmse_stress", "stress RMSE", "meV/Å³"),
)


def named(errors: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Quantity, unit and error, of errors as mace-torch calls them, in eV and A."""
    return [(label, unit, 1e3 * errors[key]) for key, label, unit in _CURVES if key in errors]


class ProgressBar:
    """Steps done and left, loss, validation errors, time left; silent unless stderr is a terminal
    or this is a notebook.

    Log lines go through the bar while it is shown, so that neither tears the other.
    """

    def __init__(
        self, steps: int, steps_per_epoch: int, *, done: int = 0, enabled: bool = True
    ) -> None:
        self._enabled = enabled and (sys.stderr.isatty() or _in_a_notebook())
        self._steps = steps
        self._done = done  # in an earlier part of the run
        self._per_epoch = max(1, steps_per_epoch)
        self._stack = ExitStack()
        self._bar: tqdm | None = None
        self._shown: dict[str, str] = {}

    def __enter__(self) -> ProgressBar:
        if self._enabled:
            self._bar = self._stack.enter_context(
                tqdm(
                    total=self._steps,
                    initial=self._done,
                    unit="step",
                    dynamic_ncols=True,
                    leave=False,
                )
            )
            self._stack.enter_context(_log_lines_above_the_bar())
        return self

    def __exit__(self, *_: object) -> None:
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

    def validated(self, metrics: Mapping[str, object]) -> None:
        """Validation errors, as upstream reports them (eV, eV/A)."""
        if self._bar is None:
            return
        for key, label in (("rmse_e_per_atom", "E/atom meV"), ("rmse_f", "F meV/A")):
            if isinstance(error := metrics.get(key), float):
                self._shown[label] = f"{1e3 * error:.1f}"


def _in_a_notebook() -> bool:
    """Whether Jupyter runs this process."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


class _AboveTheBar(logging.Handler):
    """A console handler's twin that lets tqdm make room for each line."""

    def __init__(self, console: logging.StreamHandler[TextIO]) -> None:
        super().__init__(console.level)
        self.setFormatter(console.formatter)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self._console.stream)
        self.flush()


@contextmanager
def _log_lines_above_the_bar() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [
        _AboveTheBar(h)
        if isinstance(h, logging.StreamHandler) and h.stream in (sys.stdout, sys.stderr)
        else h
        for h in before
    ]
    try:
        yield
    finally:
        root.handlers[:] = before


# Epoch, None before training, and its errors
Row = tuple[int | None, dict[str, float]]


@dataclass
class History:
    """Validation errors by epoch; epoch None is the model before training."""

    rows: list[tuple[int | None, str, dict[str, float]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def add(self, epoch: int | None, head: str, metrics: Mapping[str, object]) -> None:
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
        self.rows.append((epoch, head, numbers))

    def heads(self) -> list[str]:
        """Names of the heads that were validated."""
        return list(dict.fromkeys(head for _, head, _ in self.rows))

    def changes(self, head: str) -> list[tuple[str, str, float, float]]:
        """Quantity, unit, validation error before training and at the epoch of the lowest loss."""
        return self.beside(head, self._ends(head)[0][1])

    def summary(self) -> str:
        """Validation errors before training and at the epoch of the lowest loss, per head."""
        texts = []
        for head in self.heads():
            parts = [
                f"{label} {before:.1f} -> {best:.1f} {unit}"
                for label, unit, before, best in self.changes(head)
            ]
            texts.append(f"{head}: {', '.join(parts)}")
        return "; ".join(texts)

    def has_learnt(self) -> bool:
        """Whether the validation loss of some head fell below that before training, if known."""
        if not any(epoch is None and "loss" in metrics for epoch, _, metrics in self.rows):
            return True
        ends = [self._ends(head) for head in self.heads()]
        return any(best["loss"] < (1 - 1e-6) * before["loss"] for (_, before), (_, best) in ends)

    def losses(self, head: str) -> list[float]:
        """The validation losses of the epochs that were judged."""
        return [m["loss"] for e, h, m in self.rows if h == head and e is not None and "loss" in m]

    def beside(self, head: str, other: Mapping[str, float]) -> list[tuple[str, str, float, float]]:
        """Quantity, unit, the error of `other`, and that of validation at the lowest loss.

        Args:
            other: errors of another set, as mace-torch calls them, eV and A.
        """
        best = {label: value for label, _, value in named(self._ends(head)[1][1])}
        return [(q, unit, value, best[q]) for q, unit, value in named(other) if q in best]

    def _ends(self, head: str) -> tuple[Row, Row]:
        """The epoch and errors before training, and those of the lowest loss, which are kept."""
        mine: list[Row] = [(e, m) for e, h, m in self.rows if h == head]
        before = next(((e, m) for e, m in mine if e is None), mine[0])
        trained = [row for row in mine if row[0] is not None] or [before]
        return before, min(trained, key=lambda row: row[1].get("loss", float("inf")))

    def plot(self, path: Path, title: str = "") -> None:
        """Errors on the validation set against the epoch, as a PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        panels = [c for c in _CURVES if any(c[0] in m for _, _, m in self.rows)]
        heads = self.heads()
        figure = Figure(figsize=(4.5 * max(1, len(panels)), 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        for i, (key, label, unit) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            for head in heads:
                points = [
                    (_trained(e), 1e3 * m[key]) for e, h, m in self.rows if h == head and key in m
                ]
                (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=3)
                (_, before), (epoch, best) = self._ends(head)
                name = f"{head}: " if len(heads) > 1 else ""
                at = _trained(epoch)
                line.set_label(f"{name}{1e3 * before[key]:.1f} → {1e3 * best[key]:.1f}, epoch {at}")
                axes.plot(at, 1e3 * best[key], "*", color=line.get_color(), markersize=13)
            axes.set(xlabel="epochs trained", ylabel=f"validation {label} ({unit})", yscale="log")
            for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                axis(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.tick_params(axis="y", which="minor", labelsize=7)
            axes.grid(alpha=0.3, which="both")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(loc="best")
        figure.suptitle(title)
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")


def _trained(epoch: int | None) -> int:
    """How many epochs had been trained when the errors of `epoch` were computed."""
    return 0 if epoch is None else epoch + 1
