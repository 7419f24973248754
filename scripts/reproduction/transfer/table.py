"""One row per method: its best learning rate on each training set, means, ratios to baselines."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mace_lora.files import whole_file
from reproduction.transfer.assess import DYNAMICS, ERRORS, Found, validation

Row = dict[str, Any]


def _others(key: str) -> Callable[[Found], float | None]:
    return lambda r: _mean(o[key] for o in r["others"].values())


def _truth(r: Found) -> float | None:
    return r["truth"]["after"]["forces_mae"] if "truth" in r else None


def _foreign(r: Found) -> float | None:
    return r["foreign"]["relative"] if r["foreign"] else None


# Columns: heading, value of a run, whether a ratio to the best baseline says anything
COLUMNS: dict[str, tuple[str, Callable[[Found], float | None], bool]] = {
    "target_forces": ("target F", lambda r: r["target"]["forces"], True),
    "target_energy": ("target E", lambda r: r["target"]["energy"], True),
    "others_forces": ("others F", _others("forces"), True),
    "others_energy": ("others E", _others("energy"), True),
    "others_absolute": ("others E, absolute", _others("energy_absolute"), True),
    "kept_mild": ("kept, mild F", lambda r: r["kept"]["mild"]["forces"], True),
    "kept_strong": ("kept, strong F", lambda r: r["kept"]["strong"]["forces"], True),
    "truth": ("kept, labels F", _truth, True),
    "wall_dimers": ("wall, pairs F", lambda r: r["dimers"]["forces"], True),
    "wall_dimers_relative": ("wall, pairs", lambda r: r["dimers"]["relative"], True),
    "wall_foreign_relative": ("wall, foreign pairs", _foreign, True),
    "wall_compressed_relative": ("wall, compressed", lambda r: r["compressed"]["relative"], True),
    "wall_compressed": ("wall, compressed F", lambda r: r["compressed"]["forces"], True),
    "holes": ("holes", lambda r: r["dimers"]["holes"] + r["compressed"]["holes"], False),
    "nve_drift": ("NVE drift", lambda r: r.get("dynamics", {}).get("nve_drift"), False),
    "ms_per_step": ("ms/step", lambda r: 1e3 * r["seconds_per_step"], True),
    "seconds": ("seconds", lambda r: r["seconds"], False),
}


def results(out: Path) -> list[Found]:
    """All evaluated runs under a folder, with their dynamics where there are any."""
    found = []
    for path in sorted(out.glob(f"*/runs/*/*/*/{ERRORS}")):
        result = json.loads(path.read_text())
        simulated = path.with_name(DYNAMICS)
        if simulated.exists():
            result["dynamics"] = json.loads(simulated.read_text())
        found.append(result)
    return found


def best_rates(found: list[Found]) -> list[Found]:
    """Of each method (foundation, budget, training set) the results of all seeds at the learning
    rate whose validation error, mean over seeds, is lowest.
    """
    groups: dict[tuple[Any, ...], dict[float, list[Found]]] = {}
    for r in found:
        key = (r["foundation"], r["steps"], r["system"], r["variant"])
        groups.setdefault(key, {}).setdefault(r["rate"], []).append(r)
    chosen = []
    for rates in groups.values():
        chosen += min(rates.values(), key=lambda rs: statistics.mean(map(validation, rs)))
    return chosen


def rows(found: list[Found]) -> list[Row]:
    """A row per foundation, budget and method: means over seeds, then over training sets.

    `ratios` are geometric means over training sets of the value divided by that of the best
    baseline there, each column with the baseline that is best in it.
    """
    chosen = best_rates(found)
    made = []
    for foundation, steps in dict.fromkeys((r["foundation"], r["steps"]) for r in chosen):
        mine = [r for r in chosen if (r["foundation"], r["steps"]) == (foundation, steps)]
        best = _best_baselines(mine)
        for variant in dict.fromkeys(r["variant"] for r in mine):
            group = [r for r in mine if r["variant"] == variant]
            made.append({"foundation": foundation, "steps": steps, **_row(group, best)})
    return made


def _by_system(group: list[Found]) -> dict[str, list[Found]]:
    found: dict[str, list[Found]] = {}
    for r in group:
        found.setdefault(r["system"], []).append(r)
    return found


def _values(group: list[Found], column: str) -> dict[str, float]:
    """Means over seeds by training set, of those where the column has a value."""
    value = COLUMNS[column][1]
    means = {s: _mean(value(r) for r in rs) for s, rs in _by_system(group).items()}
    return {s: m for s, m in means.items() if m is not None}


def _best_baselines(group: list[Found]) -> dict[str, dict[str, float]]:
    """By column and training set the lowest value of a baseline."""
    baselines = [r for r in group if r["baseline"]]
    variants = list(dict.fromkeys(r["variant"] for r in baselines))
    best: dict[str, dict[str, float]] = {}
    for column in COLUMNS:
        lowest: dict[str, float] = {}
        for variant in variants:
            mine = [r for r in baselines if r["variant"] == variant]
            for system, value in _values(mine, column).items():
                if math.isfinite(value):  # of a baseline that diverged it isn't
                    lowest[system] = min(value, lowest.get(system, math.inf))
        best[column] = lowest
    return best


def _row(group: list[Found], best: dict[str, dict[str, float]]) -> Row:
    first = group[0]
    means, ratios = {}, {}
    for column, (_, _, has_ratio) in COLUMNS.items():
        values = _values(group, column)
        means[column] = _mean(values.values())
        pairs = [(v, best[column][s]) for s, v in values.items() if s in best[column]]
        if has_ratio and pairs and all(v > 0 and b > 0 for v, b in pairs):
            ratios[column] = math.exp(_known_mean(math.log(v / b) for v, b in pairs))
    simulated = [r["dynamics"] for r in group if "dynamics" in r]
    lasted = [k for k in (simulated[0] if simulated else {}) if k.startswith("ps_")]
    return {
        "method": first["method"],
        "variant": first["variant"],
        "title": first["title"],
        "baseline": first["baseline"],
        "trainable_parameters": first["trainable_parameters"],
        "rates": {s: rs[0]["rate"] for s, rs in _by_system(group).items()},
        "seeds": {s: [r["seed"] for r in rs] for s, rs in _by_system(group).items()},
        "means": means,
        "ratios": ratios,
        "md": {k.removeprefix("ps_"): _mean(d.get(k) for d in simulated) for k in lasted},
        "notes": {r["system"]: r["notes"] for r in group},
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _known_mean(values: Iterable[float]) -> float:
    return statistics.fmean(list(values))


def markdown(made: list[Row]) -> str:
    """A section per foundation model and budget, each with values and ratios, and all notes."""
    lines: list[str] = []
    for foundation, steps in dict.fromkeys((r["foundation"], r["steps"]) for r in made):
        mine = [r for r in made if (r["foundation"], r["steps"]) == (foundation, steps)]
        lines += [f"### {foundation}, {steps} steps", "", *_values_table(mine), ""]
        if any(r["baseline"] for r in mine):
            lines += ["Divided by the best baseline:", "", *_ratios_table(mine), ""]
        notes = {f"{s}: {n}" for r in mine for s, ns in r["notes"].items() for n in ns}
        lines += [f"- {note}" for note in sorted(notes)] + ([""] if notes else [])
    return "\n".join(lines)


def _values_table(mine: list[Row]) -> list[str]:
    shown = [c for c in COLUMNS if any(r["means"][c] is not None for r in mine)]
    kelvins = list(dict.fromkeys(k for r in mine for k in r["md"]))
    head = ["", "trained parameters", "lr by set", *(COLUMNS[c][0] for c in shown)]
    lines = _head([*head, *(f"MD {k}, ps" for k in kelvins)])
    for row in mine:
        rates = ", ".join(f"{s} {rate:g}" for s, rate in row["rates"].items())
        cells = [row["variant"], f"{row['trainable_parameters']:,}", rates]
        cells += [_cell(row["means"][c]) for c in shown]
        lines.append(_line([*cells, *(_cell(row["md"].get(k)) for k in kelvins)]))
    return lines


def _ratios_table(mine: list[Row]) -> list[str]:
    shown = [c for c in COLUMNS if any(c in r["ratios"] for r in mine)]
    lines = _head(["", *(COLUMNS[c][0] for c in shown)])
    for row in mine:
        ratios = [row["ratios"].get(c) for c in shown]
        cells = ["" if r is None else f"{r:.2f}" for r in ratios]
        lines.append(_line([row["variant"], *cells]))
    return lines


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), "|---" * len(cells) + "|"]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(out: Path) -> list[Row]:
    """table.json and table.md over all evaluated runs under `out`; the rows."""
    made = rows(results(out))
    with whole_file(out / "table.json") as temporary:
        temporary.write_text(json.dumps(made, indent=2) + "\n")
    with whole_file(out / "table.md") as temporary:
        temporary.write_text(markdown(made) + "\n", encoding="utf-8")
    return made
