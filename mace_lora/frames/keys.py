"""Under which keys a file holds what a run needs: those that were asked for, or evident ones.

A key that was forgotten is the commonest mistake of all. Where a file allows only one reading, that
one is taken and told; otherwise a message says what the file has, with flags ready to paste.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import ase
import numpy as np

from mace_lora.errors import DataError
from mace_lora.frames.labels import DEFAULT_KEYS, under
from mace_lora.upstream.inputs import Input

# property -> key that mace-torch takes where no flag names one
DEFAULTS = {
    **DEFAULT_KEYS,
    "head": "head",
    "total_charge": "total_charge",
    "total_spin": "total_spin",
    "elec_temp": "elec_temp",
}
# Labels that are taken under ASE's own name, which is that of the label
EVIDENT_LABELS = ("energy", "forces", "stress")
# Names that an input goes by; those of the spin are its multiplicity
ALIASES = {
    "total_charge": ("total_charge", "charge", "net_charge"),
    "total_spin": ("total_spin", "spin", "multiplicity", "spin_multiplicity"),
}
# How a key looks that may hold a property
_LOOKS = {
    "energy": re.compile(r"energ|^e$|^e_?tot|^e_?(dft|ref)|toten", re.IGNORECASE),
    "forces": re.compile(r"force|^f$", re.IGNORECASE),
    "stress": re.compile(r"stress", re.IGNORECASE),
    "virials": re.compile(r"virial", re.IGNORECASE),
    "dipole": re.compile(r"dipole", re.IGNORECASE),
    "total_charge": re.compile(r"charge", re.IGNORECASE),
    "total_spin": re.compile(r"spin|multiplicity", re.IGNORECASE),
}
# ... and how one that is about it, but is not it
_OTHERWISE = re.compile(
    r"weight|per_?atom|free|kinetic|fermi|gap|std|var|sigma|error|uncertain|atomization|interaction"
    r"|contributions",
    re.IGNORECASE,
)
_MOST_NAMES = 15


@dataclass(frozen=True)
class Keys:
    """The keys of one file.

    Attributes:
        names: key by property, as in DEFAULTS.
        said: what was taken without being asked for, a sentence each, for the log.
    """

    names: dict[str, str]
    said: tuple[str, ...] = ()


def find(
    path: str,
    frames: Sequence[ase.Atoms],
    asked: Mapping[str, str],
    wanted: Collection[str] = EVIDENT_LABELS,
    inputs: Mapping[str, Input] | None = None,
) -> Keys:
    """The keys under which a file holds labels and inputs of a model.

    Args:
        path: of the file, for messages.
        frames: as ASE has read them.
        asked: key by property, as flags or their defaults give them.
        wanted: labels for which an evident key is looked for, where the default key is absent.
        inputs: those of the model, by name.

    Raises:
        DataError: an input of the model can't be told from the file: several keys may be it.
    """
    names = dict(asked)
    said: list[str] = []
    taken = _evident_labels(frames, asked, wanted)
    if taken:
        names |= taken
        found = ", ".join(f"{label} from {key!r}" for label, key in taken.items())
        said.append(
            f"{path} has no {_listed(asked[label] for label in taken)}: taken is {found} "
            f"({flags(taken)})"
        )
    for item in (inputs or {}).values():
        key = asked.get(item.name, item.key)
        if any(under(atoms, key) is not None for atoms in frames):
            names[item.name] = key
            continue
        key, sentence = _evident_input(path, frames, item, key)
        names[item.name] = key
        said += [sentence] if sentence else []
    return Keys(names, tuple(said))


def flags(names: Mapping[str, str]) -> str:
    """Flags that name these keys, ready to paste."""
    return " ".join(f"--{name}_key={key}" for name, key in names.items())


def names_in(frames: Iterable[ase.Atoms]) -> list[str]:
    """Every key of a file that may hold a property: of info, of arrays, of ASE's calculator."""
    found: dict[str, None] = {}
    for atoms in frames:
        results = getattr(atoms.calc, "results", {})
        found |= dict.fromkeys((*atoms.info, *atoms.arrays, *results))
    return sorted(found.keys() - {"numbers", "positions"})


def remedy(frames: Sequence[ase.Atoms], lacking: Mapping[str, str]) -> str:
    """What to say after "<file> has no energy ...": what the file has, and flags to paste.

    Args:
        frames: of the file.
        lacking: the labels that no frame has, with the keys that were asked for.
    """
    names = names_in(frames)
    shown = ", ".join(names[:_MOST_NAMES]) or "nothing beside the atoms"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    meant = {label: candidates(frames, label) for label in lacking}
    first = {label: found[0] for label, found in meant.items() if found}
    text = f"the file has {shown}{more}"
    if not first:
        return f"{text}; name the right ones with {_listed(f'--{label}_key' for label in lacking)}"
    others = [
        f"{label} may also be {_listed(map(repr, found[1:]), 'or')}"
        for label, found in meant.items()
        if len(found) > 1
    ]
    return f"{text}; if that is what is meant, add {flags(first)}" + "".join(
        f" ({other})" for other in others
    )


def candidates(frames: Sequence[ase.Atoms], name: str) -> list[str]:
    """Keys that may hold a property by their name and shape, the likeliest first."""
    looks = _LOOKS.get(name)
    if looks is None:
        return []
    found: dict[str, None] = {}
    for atoms in frames:
        for key in names_in([atoms]):
            if key in found or not looks.search(key) or _OTHERWISE.search(key):
                continue
            if key in atoms.arrays and name != "forces":
                continue
            if _fits(name, under(atoms, key), len(atoms)):
                found[key] = None
    return sorted(found, key=lambda key: (key != name, key != DEFAULTS[name], key))


def _fits(name: str, value: object, n_atoms: int) -> bool:
    """Whether a value has the shape of a property; a text may be a number that is written oddly."""
    if value is None or isinstance(value, bool):
        return False
    shape = np.asarray(value).shape
    if name == "forces":
        return bool(shape == (n_atoms, 3))
    if name in ("stress", "virials"):
        return int(np.prod(shape)) in (6, 9)
    if name == "dipole":
        return int(np.prod(shape)) == 3
    return shape in ((), (1,))


def _evident_labels(
    frames: Sequence[ase.Atoms], asked: Mapping[str, str], wanted: Collection[str]
) -> dict[str, str]:
    """Labels that no frame has under mace-torch's own key, and all under ASE's name for them."""
    present = {
        label for label in EVIDENT_LABELS if label in asked and _anywhere(frames, asked[label])
    }
    if any(asked[label] != label for label in present):
        # energies under REF_energy, and forces under ASE's name: those may be of another method
        return {}
    lacking = [
        label
        for label in EVIDENT_LABELS  # in this order, whatever that of `wanted`
        if label in wanted
        and label not in present
        and asked.get(label, DEFAULTS[label]) == DEFAULTS[label]
    ]
    return {label: label for label in lacking if _only_reading(frames, label)}


def _only_reading(frames: Sequence[ase.Atoms], label: str) -> bool:
    """Whether ASE's name for a label is the only key in the file that can be it."""
    found = candidates(frames, label)
    if not found or found[0] != label:
        return False
    if label == "stress" and not all(
        atoms.cell.rank == 3 for atoms in frames if under(atoms, label) is not None
    ):
        return False  # programs write a stress of molecules, too
    return all(_same(frames, label, other) for other in found[1:])


def _evident_input(
    path: str, frames: Sequence[ase.Atoms], item: Input, asked: str
) -> tuple[str, str]:
    """The key of an input that no frame has under the one that was asked for; a word about it.

    Raises:
        DataError: it can't be told.
    """
    found = candidates(frames, item.name)
    differs = [key for key in found if not _is_all(frames, key, item.default)]
    if not differs:  # no key, or nothing but neutral frames
        return asked, ""
    lacks = f"{path} has no {item.called} under the key {asked!r}, and the model reads one"
    best = differs[0]
    is_evident = (
        asked == DEFAULTS.get(item.name, item.key)
        and best in ALIASES.get(item.name, ())
        and all(_same(frames, best, other) for other in differs[1:])
        and not (item.name == "total_spin" and _has_zero(frames, best))
    )
    if is_evident:
        return best, f"{lacks}: taken is {best!r} (--{item.name}_key={best})"
    said = f"{lacks}: without it every frame counts as {item.default or 0:g}"
    if item.name == "total_spin":
        said += " (the multiplicity 2S + 1 is needed)"
    paste = " or ".join(f"--{item.name}_key={key}" for key in differs)
    raise DataError(f"{said}. It may be meant by {_listed(map(repr, differs), 'or')}: add {paste}")


def _anywhere(frames: Iterable[ase.Atoms], key: str) -> bool:
    return any(under(atoms, key) is not None for atoms in frames)


def _same(frames: Iterable[ase.Atoms], one: str, other: str) -> bool:
    return all(_equal(under(atoms, one), under(atoms, other)) for atoms in frames)


def _is_all(frames: Iterable[ase.Atoms], key: str, value: float | None) -> bool:
    values = (under(atoms, key) for atoms in frames)
    return value is not None and all(v is None or _equal(v, value) for v in values)


def _has_zero(frames: Iterable[ase.Atoms], key: str) -> bool:
    return any(_equal(under(atoms, key), 0) for atoms in frames)


def _equal(one: object, other: object) -> bool:
    try:
        return bool(np.array_equal(np.asarray(one, float), np.asarray(other, float)))
    except (TypeError, ValueError):
        return one is other


def _listed(words: Iterable[str], last: str = "and") -> str:
    """ "a, b and c"."""
    *most, end = list(words)
    return f"{', '.join(most)} {last} {end}" if most else end
