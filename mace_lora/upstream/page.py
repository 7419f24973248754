"""The tables of what is substituted and called, as README.md of this folder shows them."""

from __future__ import annotations

from collections.abc import Sequence

from mace_lora.upstream.substitutions import CALLED, CHANGED, RUN, SUBSTITUTED, Row


def markdown() -> str:
    """The tables as README.md shows them."""
    head = ("name", "ours", "why", "unnecessary with")
    run = [row for row in SUBSTITUTED.values() if row.when == RUN]
    others = [row for row in (*SUBSTITUTED.values(), *CHANGED.values()) if row.when != RUN]
    parts = [
        f"Substituted {RUN}:",
        _table(head, [(_name(row), row.use, row.why, row.until) for row in run]),
        "Substituted at other times:",
        _table(
            (*head, "when"), [(_name(row), row.use, row.why, row.until, row.when) for row in others]
        ),
        "Only called:",
        _table(("name", "for"), [(_name(row), row.use) for row in CALLED.values()]),
    ]
    return "\n\n".join(parts)


def _name(row: Row) -> str:
    return f"`{row.module}.{row.signature}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
