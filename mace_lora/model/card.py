"""`README.md` of an adapter: what it is, what it belongs to and how to load it, for a colleague."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols

from mace_lora.files import whole_file

CARD, CONFIG = "README.md", "adapter_config.json"
_OURS = "library_name: mace-lora"  # by which a card of ours is known from one of the user's
# Name of a heading, and the text below it
Sections = Mapping[str, str]


def text(content: Mapping[str, Any], sections: Sections | None = None) -> str:
    """The card, with YAML on top as model hubs read it.

    Args:
        content: of `adapter_config.json`.
        sections: of the run that made it: data, settings, errors.
    """
    base, model = content["base"], content["model"]
    name = base.get("name") or "BASE"
    options = {k: v for k, v in content["options"].items() if v not in (None, [])}
    symbols = [chemical_symbols[z] for z in model["atomic_numbers"]]
    head = f", head {base['head']}" if base.get("head") else ""
    facts = [
        f"**Base**: `{Path(name).name}`{head}: a {base.get('class')} with fingerprint "
        f"`{base['fingerprint'][:12]}`. {_where(name)}",
        f"**Method**: `{content['method']}` ({', '.join(f'{k}={v}' for k, v in options.items())})",
        f"**Elements**: {' '.join(symbols)}; **precision** of training: {model['dtype']}",
        "**Written by** " + ", ".join(f"{k} {v}" for k, v in content["versions"].items()),
    ]
    parts = [
        "\n".join(["---", f"base_model: {Path(name).name}", _OURS, "tags: [mace, lora]", "---"]),
        "# Adapter of a MACE model",
        "A change of a foundation model's weights, for mace-lora. It is nothing without its base.",
        "\n".join(f"- {fact}" for fact in facts),
        _use(Path(name).name),
        *(f"## {heading}\n\n{body}" for heading, body in (sections or {}).items()),
        "## Licence and citation\n\nThe licences of the base model and of the training data hold "
        "for this adapter, too. Cite MACE (Batatia et al., NeurIPS 2022), the base model and the "
        "paper of the method.",
    ]
    return "\n\n".join(parts) + "\n"


def _where(name: str) -> str:
    if name == "mini":
        return "It comes with mace-lora."
    if name.endswith(".model"):
        return "A file: keep it with the adapter, or say where it is to be had."
    return "mace-torch downloads it by this name." if name != "BASE" else "It was given as a model."


def _use(base: str) -> str:
    return f"""## Use

```python
from mace_lora import MaceLoraCalculator

atoms.calc = MaceLoraCalculator(base="{base}", adapter="PATH_OF_THIS_FOLDER")
```

```bash
mace_lora merge --base {base} --adapter PATH_OF_THIS_FOLDER --output merged.model
```"""


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def is_ours(path: Path) -> bool:
    """Whether a card may be replaced: there is none, or it is none that a person wrote."""
    return not path.exists() or _OURS in path.read_text(encoding="utf-8", errors="replace")[:500]


def add(folder: str | Path, sections: Sections) -> None:
    """Write the card of an adapter directory again, with sections of its run."""
    folder = Path(folder)
    if is_ours(folder / CARD):
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with whole_file(folder / CARD) as new:
            new.write_text(text(content, sections), encoding="utf-8")
