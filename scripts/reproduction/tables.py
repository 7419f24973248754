"""One table over all runs: rows as JSON, and the same as Markdown."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from mace_lora.files import whole_file
from reproduction.protocol import MEASURE, PUBLISHED, methods

Row = dict[str, Any]


def results(out: Path) -> list[Row]:
    """All finished runs under a folder, in the order of data sets, molecules and methods."""
    found = [json.loads(p.read_text()) for p in sorted(out.glob("runs/*/*/*/result.json"))]
    order = {name: i for i, name in enumerate(methods(study=True))}
    datasets = {name: i for i, name in enumerate(MEASURE)}
    found.sort(
        key=lambda r: (
            datasets[r["dataset"]],
            r["system"],
            r["train_frames"],
            order.get(r["method"], len(order)),
            r["run"],
        )
    )
    return found


def rows(found: list[Row]) -> list[Row]:
    """A row per data set, molecule, method, settings, number of frames and stage: means over seeds.

    Errors in meV and meV/A, as the paper of the data set gives them (MAE or RMSE).
    """
    groups: dict[tuple, list[Row]] = {}
    for result in found:
        for stage in result["errors"]:
            key = (result["dataset"], result["system"], _variant(result), stage)
            groups.setdefault(key, []).append(result)
    return [_row(group, key[-1]) for key, group in groups.items()]


def _variant(result: Row) -> str:
    """The name of a run without its seed."""
    return result["run"].rsplit("-seed", 1)[0]


def _row(group: list[Row], stage: str) -> Row:
    first = group[0]
    measure = MEASURE[first["dataset"]]
    errors = {}
    for test in first["errors"][stage]:
        values = [r["errors"][stage][test] for r in group]
        errors[test] = {
            what: _mean([v[f"{what}_{measure}"] for v in values]) for what in ("energy", "forces")
        } | {"frames": values[0]["frames"]}
    last = stage == list(first["errors"])[-1]
    published = (first["dataset"], first["system"], first["method"], first["foundation_model"])
    row = {key: first[key] for key in ("dataset", "system", "method", "title", "foundation_model")}
    return row | {
        "variant": _variant(first),
        "stage": stage,
        "last_stage": last,
        "measure": measure,
        "train_frames": first["train_frames"],
        "steps": first["steps"],
        "trainable_parameters": first["trainable_parameters"],
        "seeds": [r["seed"] for r in group],
        "runs": [r["run"] for r in group],
        "errors": errors,
        "forgetting": _forgetting(group) if last else None,
        "published": PUBLISHED.get(published),
    }


def _forgetting(group: list[Row]) -> Row | None:
    """Force MAE (meV/A) and energy MAE (meV per atom), before and after."""
    if any(r["forgetting"] is None for r in group):
        return None
    return {
        what: {
            "before": group[0]["forgetting"]["before"][f"{what}_mae"],
            "after": _mean([r["forgetting"]["after"][f"{what}_mae"] for r in group]),
        }
        for what in ("forces", "energy_per_atom")
    }


def _mean(values: list[float]) -> Row:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": spread}


def _cell(value: Row, digits: int = 1) -> str:
    text = f"{value['mean']:.{digits}f}"
    return text if value["std"] is None else f"{text} ± {value['std']:.{digits}f}"


def markdown(table: list[Row]) -> str:
    """All systems side by side, if there are several; then a section per data set and molecule with
    a line per row. Of each run the last stage.
    """
    shown = [row for row in table if row["last_stage"]]
    systems = list(dict.fromkeys((r["dataset"], r["system"]) for r in shown))
    lines = [*_overview(shown), ""] if len(systems) > 1 else []
    for key in systems:
        mine = [row for row in shown if (row["dataset"], row["system"]) == key]
        lines += [*_section(mine), ""]
    return "\n".join(lines)


def _overview(shown: list[Row]) -> list[str]:
    """A line per method, a column per test set: energy / forces, the lowest mean in bold."""
    tests = ((r["system"], r["measure"], test) for r in shown for test in r["errors"])
    columns = list(dict.fromkeys(tests))
    lines: dict[tuple[str, str], Row] = {}
    for row in shown:
        name = row["title"] + _differing(row)
        line = lines.setdefault((row["foundation_model"] or "", name), {"name": name, **row})
        for test, errors in row["errors"].items():
            line[row["system"], row["measure"], test] = errors
    lowest = {
        (column, what): min(r[column][what]["mean"] for r in lines.values() if column in r)
        for column in columns
        for what in ("energy", "forces")
    }

    def cell(row: Row, column: tuple[str, str, str]) -> str:
        texts = []
        for what in ("energy", "forces") if column in row else ():
            value = row[column][what]
            mark = "**" if value["mean"] == lowest[column, what] else ""
            texts.append(f"{mark}{value['mean']:.1f}{mark}")
        return " / ".join(texts)

    head = ["meV / meV/Å", "trained parameters"]
    head += [f"{system} {test} ({measure.upper()})" for system, measure, test in columns]
    return [
        "### All systems",
        "",
        _line(head),
        "|---" * len(head) + "|",
        *(
            _line([r["name"], f"{r['trainable_parameters']:,}", *(cell(r, c) for c in columns)])
            for r in lines.values()
        ),
    ]


def _section(mine: list[Row]) -> list[str]:
    first = mine[0]
    tests = list(dict.fromkeys(test for row in mine for test in row["errors"]))
    measure = first["measure"].upper()
    name = (
        first["dataset"]
        if first["dataset"] == first["system"]
        else (f"{first['dataset']} {first['system']}")
    )
    head = ["", "trained parameters", "frames", "steps", "seeds"]
    for test in tests:
        head += [f"{test}: energy, meV", f"{test}: forces, meV/Å"]
    forgetting = any(row["forgetting"] for row in mine)
    if forgetting:
        head += ["forgetting: forces, meV/Å", "forgetting: energy, meV/atom"]
    published = any(row["published"] for row in mine)
    if published:
        head += ["published"]
    lines = [f"### {name} ({measure})", "", _line(head), "|---" * len(head) + "|"]
    for row in mine:
        cells = [
            row["title"] + _differing(row),
            f"{row['trainable_parameters']:,}",
            str(row["train_frames"]),
            str(row["steps"]),
            str(len(row["seeds"])),
        ]
        for test in tests:
            errors = row["errors"].get(test)
            cells += (
                ["", ""] if errors is None else [_cell(errors[w]) for w in ("energy", "forces")]
            )
        if forgetting:
            f = row["forgetting"]
            cells += (
                ["", ""]
                if f is None
                else [
                    f"{f[what]['before']:.0f} → {_cell(f[what]['after'], 0)}"
                    for what in ("forces", "energy_per_atom")
                ]
            )
        if published:
            p = row["published"]
            cells += ["" if p is None else _published(p, row["measure"])]
        lines.append(_line(cells))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _differing(row: Row) -> str:
    """The flags that were given by hand, which the run's name carries."""
    extra = row["variant"].removeprefix(row["method"]).rsplit("-n", 1)[0].strip("-")
    return f" ({extra.replace('-', ', ')})" if extra else ""


def _published(figure: Row, measure: str) -> str:
    return (
        f"{figure[f'energy_{measure}']} meV, {figure[f'forces_{measure}']} meV/Å with "
        f"{figure['trainable_parameters']:,} parameters"
    )


def write(out: Path) -> list[Row]:
    """table.json and table.md over all finished runs under `out`; the rows."""
    table = rows(results(out))
    with whole_file(out / "table.json") as temporary:
        temporary.write_text(json.dumps(table, indent=2) + "\n")
    with whole_file(out / "table.md") as temporary:
        temporary.write_text(markdown(table) + "\n", encoding="utf-8")
    return table
