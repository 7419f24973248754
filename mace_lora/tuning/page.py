"""What short runs have shown, on a page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mace_lora.files import whole_file
from mace_lora.results.page import Page
from mace_lora.tuning.search import Tried
from mace_lora.tuning.trials import QUANTITIES


def write(
    path: Path, tried: Sequence[Tried], by_frames: Sequence[Tried], said: str, config: str
) -> None:
    """Write the page whole or not at all.

    Args:
        path: of the page.
        tried: the search; the winner is the last.
        by_frames: the winner on parts of the frames.
        said: in a sentence, what more frames would bring.
        config: the winning configuration, as YAML.
    """
    winner = tried[-1]
    page = Page(
        "Settings, tried in short runs", f"{len(tried)} runs; the best: {winner.candidate.name}"
    )
    page.section("The winner")
    page.text("To train with it: mace_run_train --config=FILE, with this in the file")
    page.code(config)
    page.section("Tried")
    page.table(head(tried), rows(sorted(tried, key=lambda t: (-t.steps, t.outcome.score))))
    page.section("Would more frames help?")
    page.text(said)
    page.table(head(by_frames), rows(by_frames))
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "frames.png"
        _draw(picture, by_frames)
        page.picture(picture, "validation errors by number of training frames")
    page.write(path)


def head(tried: Sequence[Tried]) -> list[str]:
    """The columns of `rows`."""
    errors = [QUANTITIES[q] for q in tried[0].outcome.after]
    return ["settings", "steps", "frames", *errors, "left of the errors"]


def rows(tried: Sequence[Tried]) -> list[list[str]]:
    """Validation RMSE of each."""
    return [
        [
            t.candidate.name,
            str(t.steps),
            str(t.frames),
            *(f"{error:.2f}" for error in t.outcome.after.values()),
            f"{t.outcome.score:.3f}",
        ]
        for t in tried
    ]


def _draw(path: Path, by_frames: Sequence[Tried]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quantities = list(by_frames[0].outcome.after)
    figure = Figure(figsize=(4.2 * len(quantities), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, quantity in enumerate(quantities):
        axes = figure.add_subplot(1, len(quantities), i + 1)
        frames = [t.frames for t in by_frames]
        axes.plot(frames, [t.outcome.after[quantity] for t in by_frames], marker="o")
        axes.axhline(by_frames[-1].outcome.before[quantity], color="0.6", linestyle="--")
        axes.set(xlabel="training frames", ylabel=f"validation {QUANTITIES[quantity]}")
        axes.set(xscale="log", yscale="log", xticks=frames, xticklabels=frames)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    with whole_file(path) as new:
        figure.savefig(new, dpi=130, format="png")
