"""All that we take from mace-torch or put in the place of something of its own: README.md's tables.

`names` checks the rows and does the substituting. No other file of the package names a module of
mace-torch, except for the imports of `mini`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

# Field of `Row` by the head of its column
_FIELDS = {
    "where": "module",
    "name": "signature",
    "ours": "use",
    "for": "use",
    "why": "why",
    "unnecessary with": "until",
    "when": "when",
    "package": "package",
}


@dataclass(frozen=True)
class Row:
    """One name.

    Its signature has in parentheses the parameters that we rely on; without parentheses it may be
    any object.
    """

    module: str  # where it is looked up
    signature: str
    use: str  # what stands there instead, or what we call it for
    why: str = ""  # the reason for a substitute
    until: str = ""  # what would make the substitute unnecessary
    when: str = ""  # ours stands there, if not while mace-torch's script runs
    package: str = ""  # must be installed for this name to exist

    @property
    def attribute(self) -> str:
        """The name in its module; a dot leads into a class."""
        return self.signature.partition("(")[0]

    @property
    def parameters(self) -> list[str]:
        """The parameters that must be there."""
        inside = self.signature.partition("(")[2].rstrip(")")
        return inside.split(", ") if inside else []


def _read(page: str) -> dict[str, Row]:
    """The rows of all tables whose first column is `key`, by that key."""
    rows: dict[str, Row] = {}
    head: list[str] = []
    for line in page.splitlines():
        key, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if not line.startswith("|"):
            head = []
        elif key == "key":
            head = [_FIELDS[cell] for cell in cells]
        elif head and key != "---":
            where, name, *others = cells
            rows[key] = Row(
                **dict(zip(head, [where.strip("`"), name.strip("`"), *others], strict=True))
            )
    return rows


ROWS: dict[str, Row] = _read((resources.files(__package__) / "README.md").read_text("utf-8"))
