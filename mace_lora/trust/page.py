"""The verdicts as a page of HTML, with pictures of the walls."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mace_lora.results.page import Page
from mace_lora.trust.checks import COLUMNS, FAIL, Asked, Check, cells

_COLOURS = {"model": "#c2410c", "start": "#94a3b8"}


def write(path: Path, title: str, asked: Asked, checks: Sequence[Check]) -> None:
    """Write the page whole or not at all."""
    failed = [check.name for check in checks if check.verdict == FAIL]
    page = Page(title, f"Failed: {', '.join(failed)}" if failed else "No check failed")
    page.section("Checks")
    page.table(COLUMNS, [cells(vars(check)) for check in checks], left=2)
    page.points([f"{check.name}: {check.why}" for check in checks if check.why])
    if asked.curves:
        page.section("Energies against the start's")
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "curves.png"
            _draw(asked, picture)
            page.picture(picture, "energies of pairs of atoms by distance, model and start")
    page.write(path)


def _draw(asked: Asked, path: Path) -> None:
    """Two pictures side by side, which a phone can show as well."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    n = len(asked.curves)
    figure, axes = pyplot.subplots((n + 1) // 2, 2, figsize=(7, 2.4 * ((n + 1) // 2)))
    for axis, (title, lines) in zip(axes.flat, asked.curves.items(), strict=False):
        for name, (x, y) in lines.items():
            axis.plot(x, y, label=name, color=_COLOURS[name], lw=2 if name == "model" else 4)
        axis.set_title(title, fontsize=11)
        pair = title != "equation of state"
        axis.set_xlabel("distance, Å" if pair else "length of the cell, relative", fontsize=9)
        axis.set_ylabel("eV, 0 at 3 Å" if pair else "eV per atom", fontsize=9)
        if pair:  # the walls themselves are hundreds of eV high
            axis.set_ylim(-10, 40)
    for axis in list(axes.flat)[n:]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
