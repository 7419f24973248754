"""Units and signs of labels, found by regressing them on what the base model predicts.

Another theory changes forces by some tens of per cent, another unit by a factor of 20 or more, and
another sign turns the correlation. So a fault is called only where labels and predictions go
together, and then it is certain; where they don't, the base model knows nothing, and nothing is
said. Energies are compared without what is linear in composition, which E0s take up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mace_lora.check.compared import Array, Compared
from mace_lora.check.findings import DOUBT, ERROR, Finding
from mace_lora.frames.units import UNITS

# Units that are recognised, the usual one first; in --units there are more. What lies within a
# third of another (Rydberg/Bohr and Hartree/A, kJ/mol/nm and meV/A) is told by the energies' unit
_ENERGIES = ("eV", "meV", "Hartree", "Rydberg", "kcal/mol", "kJ/mol")
_RECOGNISED = {
    "energy": _ENERGIES,
    "forces": (
        *("eV/A", "meV/A", "Hartree/Bohr", "Hartree/A", "Rydberg/Bohr", "kcal/mol/A"),
        *("kJ/mol/A", "kJ/mol/nm"),
    ),
    "stress": ("eV/A^3", "GPa", "kbar", "Hartree/Bohr^3"),
    "virials": _ENERGIES,
}
_LEAST = {"energy": 0.6, "forces": 0.8, "stress": 0.8, "virials": 0.8}  # correlation
_KNOWN_NOTHING = 0.5  # correlation of forces below which a base model's energies say nothing
_SURE, _LIKELY = 5.0, 3.0  # standard errors of the correlation, for an error and for a doubt
_NUMBERS = 8  # beyond those that are fitted
_NEAR, _ALIKE = math.log(1.7), math.log(1.35)
_TRIMMED, _TRIM_FROM = 99.0, 200  # per cent kept, by size; of so many numbers or more
# From energies that a theory would give, in eV per atom and as a part of the energy
_CLOSE, _PART = 3.0, 0.02
_PER_ATOM = "eV per atom"


@dataclass(frozen=True)
class Fit:
    """How labels go with predictions.

    Attributes:
        ratio: of their sizes, with the sign of the correlation.
        r: the correlation.
        sigmas: how many of its standard errors it is.
    """

    ratio: float
    r: float
    sigmas: float

    def goes_together(self, label: str, sigmas: float) -> bool:
        """Whether labels and predictions do, beyond chance."""
        return abs(self.r) >= _LEAST[label] and self.sigmas > sigmas


def findings(
    path: str, compared: Compared, given: Mapping[str, float] | None = None
) -> list[Finding]:
    """Mistaken units and signs of a file's labels.

    Args:
        path: of the file, for messages.
        compared: a sample of it.
        given: by label the factor that its labels are multiplied by already (`--units`). Units are
            looked for in what stands in the file.
    """
    given = given or {}
    as_written = {label: getattr(compared, label) / factor for label, factor in given.items()}
    compared = replace(compared, **as_written)
    fits = all_fits(compared)
    found = _findings(path, compared, fits)
    for label, factor in given.items():
        mine = [finding for finding in found if finding.what == label]
        fit = fits.get(label)
        is_clear = fit is not None and fit.goes_together(label, _SURE)
        if any(f"{label}={unit}" == f.units for f in mine for unit in _names(label, factor)) or (
            fit is not None and fit.ratio * factor > 0 and _is_near(fit.ratio * factor)
        ):
            found = [finding for finding in found if finding not in mine]
        elif is_clear and not mine:
            why = f"in {_RECOGNISED[label][0]} already, and --units has them multiplied by "
            remedy = f"leave {label} out of --units for this file"
            found.append(Finding(ERROR, label, path, f"{why}{factor:.6g}", remedy=remedy))
    return found


def _names(label: str, factor: float) -> list[str]:
    """The units of `--units` that stand for a factor."""
    sign = "-" if factor < 0 else ""
    return [f"{sign}{unit}" for unit, value in UNITS[label].items() if value == abs(factor)]


def _is_near(ratio: float) -> bool:
    """Whether labels are about as large as predictions."""
    return abs(math.log(abs(ratio))) < _NEAR


def _findings(path: str, compared: Compared, fits: Mapping[str, Fit]) -> list[Finding]:
    found: list[Finding] = []
    unit = ""
    if "energy" in fits or np.isfinite(compared.energy).any():
        found += _energy(path, compared, fits)
        unit = found[0].units.removeprefix("energy=").removeprefix("-") if found else ""
    for label in ("forces", "stress", "virials"):
        if label in fits:
            found += _judged(path, label, fits[label], prefer=unit)
    if not any(finding.what == "forces" for finding in found):
        found += _mixed_forces(path, compared)
    return found


def all_fits(compared: Compared) -> dict[str, Fit]:
    """By label; those that the sample has enough numbers of."""
    frames = np.isfinite(compared.energy)
    found = {
        "energy": _energy_fit(compared, compared.energy, frames),
        "forces": _fit(compared.forces, compared.predicted_forces),
    }
    for label in ("stress", "virials"):
        one, other = getattr(compared, label), getattr(compared, f"predicted_{label}")
        known = np.isfinite(one).all(axis=(1, 2)) & np.isfinite(other).all(axis=(1, 2))
        if known.sum() > 2:
            # around their means: another theory has another volume at rest
            one, other = one[known] - one[known].mean(0), other[known] - other[known].mean(0)
            found[label] = _fit(one, other, lost=9)
    return {label: fit for label, fit in found.items() if fit is not None}


def _fit(labels: Array, predicted: Array, lost: int = 0) -> Fit | None:
    known = np.isfinite(labels) & np.isfinite(predicted)
    y, x = labels[known], predicted[known]
    if y.size >= _TRIM_FROM:  # a few broken frames must not decide
        kept = (np.abs(y) <= np.percentile(np.abs(y), _TRIMMED)) & (
            np.abs(x) <= np.percentile(np.abs(x), _TRIMMED)
        )
        y, x = y[kept], x[kept]
    free = y.size - lost
    sizes = float(np.sqrt(y @ y)), float(np.sqrt(x @ x))
    if free < _NUMBERS or not min(sizes) > 1e-9:
        return None
    r = float(np.clip(x @ y / (sizes[0] * sizes[1]), -1, 1))
    error = math.sqrt(max(1 - r * r, 1e-12) / free)
    return Fit(math.copysign(sizes[0] / sizes[1], r), r, abs(r) / error)


def _energy_fit(compared: Compared, energy: Array, frames: np.ndarray) -> Fit | None:
    """Of what is left of energies (n,), eV, beside the part linear in composition."""
    if frames.sum() < _NUMBERS:
        return None
    weights = 1 / np.sqrt(compared.sizes[frames])
    counts = compared.counts[frames] * weights[:, None]
    left = []
    for values in (energy[frames] * weights, compared.predicted_energy[frames] * weights):
        left.append(values - counts @ np.linalg.lstsq(counts, values, rcond=None)[0])
    return _fit(left[0], left[1], lost=int(np.linalg.matrix_rank(counts)))


# ---------------------------------------------------------------------- verdicts


def _judged(path: str, label: str, fit: Fit, prefer: str = "") -> list[Finding]:
    """A finding where the labels are in another unit or of the other sign."""
    if not fit.goes_together(label, _LIKELY):
        return []
    usual = _RECOGNISED[label][0]
    ranked = _ranked(label, fit.ratio, prefer)
    unit, distance = ranked[0]
    if unit == usual and fit.ratio > 0:
        return []
    evidence = f"{fit.ratio:.3g} times what the base model predicts (correlation {fit.r:.2f})"
    if distance > _NEAR:
        why = f"{evidence}, and in no unit that is known here"
        return [Finding(DOUBT, label, path, why, remedy=f"{usual} is needed")]
    others = [name for name, d in ranked[1:] if d - distance < _ALIKE and d < _NEAR]
    severity = ERROR if fit.sigmas > _SURE else DOUBT
    return [_mistaken(path, label, unit, fit.ratio < 0, evidence, others, severity=severity)]


def _ranked(label: str, ratio: float, prefer: str) -> list[tuple[str, float]]:
    """Recognised units by the distance of their factors from that of labels to predictions."""
    found = [(unit, _distance(ratio, label, unit)) for unit in _RECOGNISED[label]]
    found.sort(key=lambda item: item[1])
    near = [item for item in found if item[1] - found[0][1] < _ALIKE]
    if prefer:
        preferred = [item for item in near if item[0].startswith(f"{prefer}/")]
    else:  # the commonest
        preferred = [min(near, key=lambda item: _RECOGNISED[label].index(item[0]))]
    return preferred + [item for item in found if item not in preferred]


def _distance(ratio: float, label: str, unit: str) -> float:
    """Of a ratio of labels in `unit` to predictions from the one it should have, as a logarithm."""
    return abs(math.log(abs(ratio) * UNITS[label][unit]))


def _mistaken(
    path: str,
    label: str,
    unit: str,
    is_turned: bool,
    evidence: str,
    others: list[str],
    frames: tuple[int, ...] = (),
    severity: str = ERROR,
) -> Finding:
    usual = _RECOGNISED[label][0]
    factor = UNITS[label][unit] * (-1 if is_turned else 1)
    faults = [f"in {unit}" + "".join(f" (or {name})" for name in others)] if unit != usual else []
    faults += ["of the wrong sign"] if is_turned else []
    part = f"{label}={'-' if is_turned else ''}{unit}"
    return Finding(
        severity,
        label,
        path,
        f"{' and '.join(faults)}: {evidence}",
        frames,
        f"multiply by {factor:.6g}" + ("" if frames else f" (--units={part})"),
        "" if frames else part,
    )


def _mixed_forces(path: str, compared: Compared) -> Iterator[Finding]:
    """Frames whose forces are in another unit than those of the rest."""
    parts: dict[tuple[str, bool], list[int]] = {}
    for i, place in enumerate(compared.places):
        mine = compared.frame_of == i
        fit = _fit(compared.forces[mine], compared.predicted_forces[mine])
        if fit is None or not fit.goes_together("forces", _SURE):
            continue
        unit, distance = _ranked("forces", fit.ratio, "")[0]
        if distance <= _NEAR:
            parts.setdefault((unit, fit.ratio < 0), []).append(place)
    usual = parts.pop((_RECOGNISED["forces"][0], False), [])
    for (unit, is_turned), places in parts.items():
        if len(places) > 1 and len(usual) > len(places):
            evidence = f"{len(places)} of {len(compared.places)} frames that were looked at"
            yield _mistaken(path, "forces", unit, is_turned, evidence, [], tuple(places))


# ---------------------------------------------------------------------- energies


def _energy(path: str, compared: Compared, fits: Mapping[str, Fit]) -> list[Finding]:
    """By their fluctuations, and by their size where these say nothing or leave a choice."""
    fit = fits.get("energy")
    if "forces" in fits and abs(fits["forces"].r) < _KNOWN_NOTHING:
        return []
    found = [] if fit is None else _judged(path, "energy", fit)
    is_clear = fit is not None and fit.goes_together("energy", _SURE)
    if is_clear and not found:
        return []
    by_size = _by_size(compared, fit if is_clear else None)
    if by_size is None:
        return found
    unit, is_turned = by_size
    evidence = "then they are near to isolated atoms of a known theory and the base model's"
    evidence += " interaction" + (f" (correlation {fit.r:.2f})" if fit is not None else "")
    if unit == _PER_ATOM:
        why = f"of an atom, not of the frame: {evidence}"
        remedy = "multiply each by the number of atoms: training takes energies of whole frames"
        return [Finding(ERROR, "energy", path, why, remedy=remedy)]
    severity = ERROR if is_clear else DOUBT
    return [_mistaken(path, "energy", unit, is_turned, evidence, [], severity=severity)]


def _by_size(compared: Compared, fit: Fit | None) -> tuple[str, bool] | None:
    """The unit, and whether the sign is turned, with which energies are those of a known theory.

    None where no unit or no theory fits.

    Args:
        compared: the sample.
        fit: of fluctuations that are of another unit or sign; the units that agree with it are
            tried. None: all are tried, where the energies as they stand are of no known theory.
    """
    known = np.isfinite(compared.energy)
    if not compared.apart or not known.any():
        return None
    sizes, energy = compared.sizes[known], compared.energy[known]

    def distance(values: Array) -> tuple[float, float]:
        """From the nearest theory, in eV per atom, and as a part of the energy."""
        apart = min(
            float(np.median(np.abs(values - expected[known]) / sizes))
            for expected in compared.apart.values()
        )
        return apart, apart / max(float(np.median(np.abs(values) / sizes)), 1e-9)

    if fit is None and (distance(energy)[0] < _CLOSE or distance(energy)[1] < _PART):
        return None
    options = {(_PER_ATOM, False): energy * sizes}
    for unit, turned in itertools.product(_ENERGIES, (False, True)):
        if fit is None or (
            (fit.ratio < 0) == turned and _distance(fit.ratio, "energy", unit) < _NEAR
        ):
            options[unit, turned] = energy * UNITS["energy"][unit] * (-1 if turned else 1)
    best = min(options, key=lambda option: distance(options[option])[1])
    apart, part = distance(options[best])
    return best if apart < _CLOSE and part < _PART else None
