"""Units of labels in files, and `--units`, which has them converted on reading. Knows no numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mace_lora.errors import ConfigError, did_you_mean

HARTREE, BOHR = 27.211386245988, 0.529177210903  # eV, A
_GPA = 1 / 160.21766208  # eV/A^3
_ENERGIES = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": HARTREE,
    "Rydberg": HARTREE / 2,
    "kcal/mol": 0.0433641153,
    "kJ/mol": 0.0103642697,
}
# label -> unit -> what one of it is in eV, eV/A, eV/A^3; the first is that of training
UNITS: Mapping[str, Mapping[str, float]] = {
    "energy": _ENERGIES,
    "forces": {
        **{f"{unit}/A": value for unit, value in _ENERGIES.items()},
        **{f"{unit}/Bohr": value / BOHR for unit, value in _ENERGIES.items()},
        "kJ/mol/nm": _ENERGIES["kJ/mol"] / 10,
    },
    "stress": {
        "eV/A^3": 1.0,
        "GPa": _GPA,
        "kbar": _GPA / 10,
        "bar": _GPA / 1e4,
        "Hartree/Bohr^3": HARTREE / BOHR**3,
    },
    "virials": _ENERGIES,
}
EXAMPLE = "--units=energy=Hartree,forces=Hartree/Bohr,stress=-kbar"
HELP = (
    "units of the labels in the files, to be converted on reading: "
    f"{EXAMPLE.removeprefix('--units=')}; a minus turns the sign, and test.xyz:energy=meV is for "
    "one file (files of replay need that)"
)


@dataclass(frozen=True)
class Units:
    """What `--units` says: (file or "", label, factor to eV, eV/A, eV/A^3) for each of its parts.

    `Units()` leaves all labels as they are.
    """

    parts: tuple[tuple[str, str, float], ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> Units:
        """
        Raises:
            ConfigError: no such label or unit.
        """
        parts = [part.strip() for part in (text or "").split(",") if part.strip()]
        return cls(tuple(_part(part) for part in parts))

    def factors(self, path: str, alone: bool = False) -> dict[str, float]:
        """By label the factor for a file; what is said for this file goes before the rest.

        Args:
            path: the file.
            alone: only what is said for this very file.
        """
        general = {} if alone else {name: f for file, name, f in self.parts if not file}
        own = {name: f for file, name, f in self.parts if file in (path, Path(path).name)}
        return general | own

    def check_named(self, paths: list[str]) -> None:
        """Raises ConfigError where a part is for a file that is none of `paths`."""
        known = dict.fromkeys([*paths, *(Path(path).name for path in paths)])
        for file, label, _ in self.parts:
            if file and file not in known:
                raise ConfigError(
                    f"--units={file}:{label}=...: no such file is read; {did_you_mean(file, known)}"
                )


def _part(text: str) -> tuple[str, str, float]:
    left, equals, unit = text.rpartition("=")
    file, _, label = left.rpartition(":")
    if not equals or label not in UNITS:
        raise ConfigError(
            f"--units: {text!r} is not understood; <label>=<unit> is needed with a label of "
            f"{', '.join(UNITS)}, such as {EXAMPLE}"
        )
    known = {name.lower(): value for name, value in UNITS[label].items()}
    plain = unit.strip().removeprefix("-").replace("Å", "A")
    if plain.lower() not in known:
        raise ConfigError(
            f"--units: {label}={unit}: {did_you_mean(plain, UNITS[label])}, with a minus before it "
            "where the sign is the other one"
        )
    return file, label, known[plain.lower()] * (-1 if unit.strip().startswith("-") else 1)
