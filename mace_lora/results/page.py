"""A page of HTML in one file, pictures included, that a browser shows and a mail carries."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from mace_lora.files import whole_file

PANEL = 520  # pixels: about the width of one panel in our pictures
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; border-bottom: 1px solid #d5dbe3; margin-top: 2rem; }
p, li { overflow-wrap: anywhere; }
div { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; font-variant-numeric: tabular-nums; }
.name { white-space: nowrap; }
.number { text-align: right; }
td.number { white-space: nowrap; }
th { border-bottom: 1px solid #d5dbe3; font-weight: 600; }
code, pre { font: 13px/1.45 ui-monospace, monospace; background: #f3f5f8; border-radius: 4px; }
pre { padding: .7rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
code { padding: .1rem .3rem; overflow-wrap: anywhere; }
img { max-width: 100%; }
@media (max-width: 40rem) {  /* a phone: one panel fills the screen, the others are beside it */
  img { max-width: none; width: calc(var(--panels) * 92vw); }
}
ul { padding-left: 1.2rem; }
"""


class Page:
    """A title and sections, in the order in which they are added."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(subtitle)}</p>"]

    def section(self, heading: str) -> None:
        self._parts.append(f"<h2>{escape(heading)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def points(self, texts: Sequence[str]) -> None:
        """A list; nothing where there are no texts."""
        if texts:
            items = "\n".join(f"<li>{escape(text)}</li>" for text in texts)
            self._parts.append(f"<ul>{items}</ul>")

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> None:
        """The first `left` columns flush left, the others flush right; no `head` if it is empty."""
        lines: list[tuple[str, Sequence[object]]] = [("th", head)] if head else []
        lines += [("td", row) for row in rows]
        text = "\n".join(
            "<tr>"
            + "".join(
                f"<{tag} class={'name' if i < left else 'number'}>{escape(str(cell))}</{tag}>"
                for i, cell in enumerate(cells)
            )
            + "</tr>"
            for tag, cells in lines
        )
        self._parts.append(f"<div><table>{text}</table></div>")

    def facts(self, facts: Mapping[str, object]) -> None:
        """Names and values, all flush left."""
        rows = "\n".join(
            f"<tr><td class=name>{escape(key)}</td><td><code>{escape(str(value))}</code></td></tr>"
            for key, value in facts.items()
        )
        self._parts.append(f"<div><table>{rows}</table></div>")

    def picture(self, path: Path, alt: str) -> None:
        """A PNG of panels side by side, embedded; nothing where the file is missing."""
        if path.exists():
            png = path.read_bytes()
            panels = max(1, round(int.from_bytes(png[16:20], "big") / PANEL))  # of its width
            source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
            self._parts.append(
                f'<div><img style="--panels: {panels}" alt="{escape(alt)}" src="{source}"></div>'
            )

    def write(self, path: Path) -> None:
        """Write the page whole or not at all."""
        body = "\n".join(self._parts)
        text = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head>\n"
            f"<body>\n{body}\n</body></html>\n"
        )
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
