"""Mistaken units and signs are found and named, and good labels are left alone."""

from __future__ import annotations

from collections.abc import Callable

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from helpers.frames import DATA, TESTS, ethanol

from mace_lora.check import units
from mace_lora.check.compared import compare, sample
from mace_lora.check.files import look
from mace_lora.check.findings import ERROR, Finding
from mace_lora.frames.isolated_atoms import known_theories
from mace_lora.frames.units import UNITS, Units
from mace_lora.upstream import loading, predicting

Frames = list[ase.Atoms]


@pytest.fixture(scope="module")
def mini() -> torch.nn.Module:
    return loading.load("mini")


@pytest.fixture(scope="module")
def crystals(mini) -> Frames:
    """Diamond with another theory's pressure: mini's labels, changed a little."""
    rng = np.random.default_rng(1)
    frames = []
    for _ in range(12):
        frame = bulk("C", "diamond", a=3.6, cubic=True)
        frame.set_cell(frame.cell @ (np.eye(3) + 0.03 * rng.normal(size=(3, 3))), True)
        frame.positions += 0.05 * rng.normal(size=frame.positions.shape)
        frames.append(frame)
    found = predicting.predict(
        mini, [predicting.frames_to_batch(frames, mini)], compute_stress=True
    )
    stress, forces = (found[name].double().numpy() for name in ("stress", "forces"))
    sizes = 0.1 * np.std(stress), 0.2 * np.std(forces)
    for i, frame in enumerate(frames):
        frame.info["REF_energy"] = float(found["energy"][i])
        frame.info["REF_stress"] = stress[i] + sizes[0] * rng.normal(size=(3, 3)) - 0.1 * np.eye(3)
        frame.arrays["REF_forces"] = forces[8 * i : 8 * i + 8] + sizes[1] * rng.normal(size=(8, 3))
    return frames


def with_virials(frames: Frames) -> Frames:
    for frame in frames:
        frame.info["REF_virials"] = -frame.info.pop("REF_stress") * frame.get_volume()
    return frames


def molecules(n: int = 40) -> Frames:
    """Of many compositions, in the theory of mini."""
    frames = ase.io.read(DATA / "mini_holdout.xyz", ":")
    return frames[:: len(frames) // n][:n]


def mistaken(frames: Frames, which: slice = slice(None), **unit: str) -> Frames:
    """The same labels in other units."""
    factors = Units.parse(",".join(f"{k}={v}" for k, v in unit.items())).factors("")
    for frame in frames[which]:
        for label, factor in factors.items():
            place = frame.arrays if label == "forces" else frame.info
            place[f"REF_{label}"] = np.asarray(place[f"REF_{label}"]) / factor
    return frames


@pytest.fixture
def found(tmp_path, mini) -> Callable[..., list[Finding]]:
    """What is found of the units of frames in a file."""

    def get(frames: Frames, model: torch.nn.Module | None = None) -> list[Finding]:
        path, base = str(tmp_path / "frames.xyz"), model or mini
        ase.io.write(path, frames, format="extxyz")
        looked = look(path, {}, {}, base)
        assert looked.frames is not None, looked.findings
        configurations = looked.frames.configurations
        compared = compare(looked.frames, sample(configurations, 50, 3000, 12), base)
        assert compared is not None
        return units.findings(path, compared)

    return get


@pytest.mark.parametrize(
    "unit",
    [
        *({"energy": u} for u in ("meV", "Hartree", "Rydberg", "kcal/mol", "kJ/mol", "-eV")),
        *({"energy": u} for u in ("-Hartree", "-kJ/mol")),
        *({"forces": f"{u}/A"} for u in ("meV", "Hartree", "kcal/mol", "kJ/mol", "-eV")),
        *({"forces": u} for u in ("Hartree/Bohr", "-Hartree/Bohr", "-kcal/mol/A")),
        {"energy": "Hartree", "forces": "Hartree/Bohr"},
        {"energy": "Rydberg", "forces": "Rydberg/Bohr"},
        {"energy": "kJ/mol", "forces": "kJ/mol/nm"},
        {"energy": "kcal/mol", "forces": "-kcal/mol/A"},
    ],
    ids=str,
)
def test_mistaken_units_of_a_molecule(unit, found):
    findings = found(mistaken(ethanol("train", 20), **unit))
    assert {f.units for f in findings} == {f"{label}={u}" for label, u in unit.items()}
    assert {f.severity for f in findings} == {ERROR}


@pytest.mark.parametrize("unit", ["GPa", "kbar", "-kbar", "-eV/A^3", "Hartree/Bohr^3"])
def test_mistaken_stress(unit, found, crystals):
    frames = mistaken([f.copy() for f in crystals], stress=unit)
    assert [f.units for f in found(frames)] == [f"stress={unit}"]


@pytest.mark.parametrize("unit", ["-eV", "Hartree", "kJ/mol"])
def test_mistaken_virials(unit, found, crystals):
    frames = mistaken(with_virials([f.copy() for f in crystals]), virials=unit)
    assert [f.units for f in found(frames)] == [f"virials={unit}"]


@pytest.mark.parametrize("unit", ["Hartree", "kcal/mol"])
def test_molecules_of_many_compositions(unit, found):
    findings = found(mistaken(molecules(), energy=unit))
    assert [f.units for f in findings] == [f"energy={unit}"]


def test_energies_per_atom(found):
    frames = ethanol("train", 20)
    for frame in frames:
        frame.info["REF_energy"] /= len(frame)
    (finding,) = found(frames)
    assert "of an atom, not of the frame" in finding.why


def test_few_frames_in_hartree_are_doubted(found):
    """Too few to fluctuate: their size tells."""
    (finding,) = found(mistaken(ethanol("train", 3), energy="Hartree"))
    assert (finding.severity, finding.units) == ("doubt", "energy=Hartree")


def test_some_frames_in_another_unit(found):
    findings = found(mistaken(ethanol("train", 20), slice(4, 8), forces="Hartree/Bohr"))
    (finding,) = findings
    assert finding.frames == (4, 5, 6, 7)
    assert "Hartree/Bohr" in finding.why


# ---------------------------------------------------------------------- good labels


def _of_another_theory(seed: int) -> Frames:
    """Forces that differ by 0.35 eV/A, energies from other E0s."""
    rng, frames = np.random.default_rng(seed), ethanol("train", 20)
    for frame in frames:
        frame.info["REF_energy"] += 0.03 * len(frame) ** 0.5 * rng.normal() - 1.3 * len(frame)
        frame.arrays["REF_forces"] += 0.35 * rng.normal(size=(len(frame), 3))
    return frames


def _counted_from(theory: str) -> Frames:
    """Energies of molecules with the isolated atoms of another theory."""
    own = loading.load("mini")
    numbers = own.atomic_numbers.tolist()
    e0s = dict(zip(numbers, own.atomic_energies_fn.atomic_energies[0].tolist(), strict=True))
    frames = molecules()
    for frame in frames:
        table = known_theories()[theory]
        frame.info["REF_energy"] += sum(table[z] - e0s[z] for z in frame.numbers)
    return frames


def _noise(seed: int, n: int = 20) -> Frames:
    rng, frames = np.random.default_rng(seed), ethanol("train", n)
    for frame in frames:
        frame.info["REF_energy"] = 10 * rng.normal()
        frame.arrays["REF_forces"] = rng.normal(size=(len(frame), 3))
    return frames


def _without(label: str) -> Frames:
    frames = ethanol("train", 12)
    for frame in frames:
        frame.info.pop(label, None)
        frame.arrays.pop(label, None)
    return frames


def _charged() -> Frames:
    frames = ethanol("train", 20)
    for frame in frames[::2]:
        frame.info |= {"total_charge": 1, "REF_energy": frame.info["REF_energy"] + 10.0}
    return frames


def _with_isolated_atoms() -> Frames:
    atoms = [
        ase.Atoms(symbol, info={"REF_energy": e, "config_type": "IsolatedAtom"})
        for symbol, e in (("H", -13.6), ("C", -1027.0), ("O", -2038.0))
    ]
    return [*atoms, *ethanol("train", 15)]


def _with_a_broken_frame() -> Frames:
    frames = ethanol("train", 20)
    frames[7].arrays["REF_forces"] *= 1000
    frames[9].info["REF_energy"] += 1000
    return frames


GOOD: dict[str, Callable[[], Frames]] = {
    **{f"{n} frames": lambda n=n: ethanol("train", n) for n in (1, 2, 3, 5, 9, 20, 50)},
    **{f"other part, {n} frames": lambda n=n: ethanol("test", n) for n in (4, 30)},
    **{f"another theory, {seed}": lambda seed=seed: _of_another_theory(seed) for seed in range(4)},
    **{f"E0s of {theory}": lambda t=theory: _counted_from(t) for theory in known_theories()},
    **{f"noise, {seed}": lambda seed=seed: _noise(seed) for seed in range(4)},
    "two frames of noise": lambda: _noise(5, 2),
    "many compositions": molecules,
    "no energies": lambda: _without("REF_energy"),
    "no forces": lambda: _without("REF_forces"),
    "charged": _charged,
    "isolated atoms": _with_isolated_atoms,
    "broken frames": _with_a_broken_frame,
    "uracil": lambda: ase.io.read(TESTS / "data/uracil.xyz", ":"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_labels(name, found):
    assert found(GOOD[name]()) == []


@pytest.mark.parametrize("kind", ["stress", "virials", "two frames"])
def test_good_crystals(kind, found, crystals):
    frames = [f.copy() for f in crystals]
    if kind == "virials":
        with_virials(frames)
    assert found(frames[: 2 if kind == "two frames" else None]) == []


@pytest.mark.parametrize("name", ["foundation", "charge_spin", "residual"])
def test_an_untrained_model_knows_nothing(name, found, build):
    """Whatever the labels are: nothing is said that would stop a run."""
    model = build(name)
    for frames in (ethanol("train", 10), _noise(1)):
        assert not [f for f in found(frames, model) if f.severity == ERROR]


def test_every_unit_has_its_factor():
    """1 kcal = 4.184 kJ, 1 GPa = 10 kbar."""
    energy, stress = UNITS["energy"], UNITS["stress"]
    assert energy["kcal/mol"] / energy["kJ/mol"] == pytest.approx(4.184, rel=1e-6)
    assert stress["GPa"] == pytest.approx(10 * stress["kbar"])
    assert UNITS["forces"]["Hartree/Bohr"] == pytest.approx(51.42208619, rel=1e-6)
    assert stress["Hartree/Bohr^3"] == pytest.approx(29421.02648438959 * stress["GPa"], rel=1e-6)


@pytest.mark.parametrize(
    ("written", "given", "severities"),
    [
        ("Hartree/Bohr", "Hartree/Bohr", []),
        ("Hartree/A", "Rydberg/Bohr", []),  # so near to each other that the user is believed
        ("meV/Bohr", "meV/Bohr", []),  # which is not recognised, but known
        ("eV/A", "Hartree/Bohr", [ERROR]),
        ("Hartree/Bohr", "kcal/mol/A", [ERROR]),
        ("Hartree/Bohr", "-Hartree/Bohr", [ERROR]),
    ],
)
def test_units_that_are_given(written, given, severities, tmp_path, mini):
    path = str(tmp_path / "frames.xyz")
    ase.io.write(path, mistaken(ethanol("train", 12), forces=written), format="extxyz")
    factors = Units.parse(f"forces={given}").factors(path)
    frames = look(path, {}, factors, mini).frames
    compared = compare(frames, range(12), mini)
    found = units.findings(path, compared, factors)
    assert [f.severity for f in found] == severities
    if severities and written != "eV/A":
        assert found[0].units == f"forces={written}"
