"""Write the tables of flags in configs/README.md, from the classes that the flags are made of.

python scripts/flags_page.py            # write them
python scripts/flags_page.py --check    # exit with 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path

from mace_lora.adapters.options import AdapterOptions
from mace_lora.adapters.registry import METHODS, options_of
from mace_lora.training.options import RunOptions
from mace_lora.training.recipes import BY_DATA, RECIPE

PAGE = Path(__file__).parent.parent / "configs" / "README.md"
BEGIN, END = "<!-- flags: written by scripts/flags_page.py -->", "<!-- end of flags -->"


def shown(value: object) -> str:
    """A default or a preset's value, as one would type it."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value)) or "nothing"
    return "nothing" if value is None else str(value)


def default(field: Field[object]) -> str:
    made = field.default_factory is not MISSING
    return shown(field.default_factory() if made else field.default)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [
        "| " + " | ".join(" ".join(c.split()).replace("|", r"\|") for c in r) + " |" for r in lines
    ]


def meaning(field: Field[object]) -> str:
    """The help text, and the values to choose from where it doesn't name them all."""
    text = str(field.metadata["help"]).replace("%%", "%")
    choices = [str(choice) for choice in field.metadata.get("choices") or ()]
    if all(choice in text for choice in choices):
        return text
    return f"{text} ({', '.join(choices)})"


def method_rows() -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Rows of the options that all methods have, and of those that some have."""
    same: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for method in METHODS:
        for field in options_of(method).fields():
            same[field.name, meaning(field)][default(field)].append(method)
    for_all = {field.name for field in fields(AdapterOptions)}
    common, own = [], []
    for (name, text), defaults in same.items():
        methods = [m for ms in defaults.values() for m in ms]
        values = [f"{v} ({', '.join(m)})" if len(defaults) > 1 else v for v, m in defaults.items()]
        if name in for_all:
            common.append((f"`--<method>_{name}`", ", ".join(values), text))
        else:
            flags = ", ".join(f"`--{m}_{name}`" for m in methods)
            own.append((flags, ", ".join(values), text))
    return common, own


def suits() -> list[tuple[str, ...]]:
    """Rows of the flags that take another value with an adapter than in mace-torch."""
    by_data = ", ".join(f"`--{flag}`" for flag in BY_DATA)
    rows = [(f"`--{flag}`", shown(c.value), c.why) for flag, c in RECIPE.items()]
    return [*rows, (by_data, "as the log says", "number and size of the training frames")]


def preset_rows() -> list[tuple[str, ...]]:
    return [
        (
            f"`--{method}_preset={name}`",
            ", ".join(f"{k} {shown(v)}" for k, v in values.items()),
        )
        for method in METHODS
        for name, values in options_of(method).presets.items()
    ]


def tables() -> str:
    """The generated part of the page."""
    common, own = method_rows()
    head = ("flag", "default", "meaning")
    run = [(f"`--{f.name}`", default(f), meaning(f)) for f in RunOptions.flags()]
    choose = [
        ("`--adapter`", "nothing", f"the method: {', '.join(METHODS)}"),
        ("`--lora`", "False", "`--lora=True` is the same as `--adapter=lora`"),
    ]
    parts = [
        ("Choosing a method", table(head, choose)),
        ("Options of every method", table(head, common)),
        ("Options of some methods", table(head, own)),
        ("Presets", table(("flag", "what it sets, unless you give it"), preset_rows())),
        ("The run", table(head, run)),
        ("What suits a fine-tuning, unless you give it", table(("flag", "value", "why"), suits())),
    ]
    return "\n\n".join(f"### {title}\n\n" + "\n".join(lines) for title, lines in parts)


def written(page: str) -> str:
    """The page with its tables as they should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    if check:
        sys.exit(written(page) != page)
    PAGE.write_text(written(page), encoding="utf-8")


if __name__ == "__main__":
    main()
