"""rMD17, 3BPA and acetylacetone as files that can be trained on: found, checked, converted, split.

Sources: Christensen and von Lilienfeld 2020 (rMD17, doi:10.6084/m9.figshare.12672038); Kovacs et
al. 2021 (3BPA) and Batatia et al. 2022 (acetylacetone), from github.com/davkovacs/BOTNet-datasets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import ase.io
import ase.units
import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.formula import Formula

from mace_lora.errors import ConfigError, DataError, did_you_mean
from mace_lora.files import whole_file

RMD17 = {
    "aspirin": "C9H8O4",
    "azobenzene": "C12H10N2",
    "benzene": "C6H6",
    "ethanol": "C2H6O",
    "malonaldehyde": "C3H4O2",
    "naphthalene": "C10H8",
    "paracetamol": "C8H9NO2",
    "salicylic": "C7H6O3",
    "toluene": "C7H8",
    "uracil": "C4H4N2O2",
}
SYSTEMS = {"rmd17": RMD17, "3bpa": {"3bpa": "C12H12N2O"}, "acac": {"acac": "C5H8O2"}}
# Folder of the originals, training file, test files by name
BOTNET = {
    "3bpa": (
        "dataset_3BPA",
        "train_300K.xyz",
        {
            "300K": "test_300K.xyz",
            "600K": "test_600K.xyz",
            "1200K": "test_1200K.xyz",
            "dihedral_120": "test_dih_beta120.xyz",
            "dihedral_150": "test_dih_beta150.xyz",
            "dihedral_180": "test_dih_beta180.xyz",
        },
    ),
    "acac": (
        "dataset_acac",
        "train_300K.xyz",
        {"300K": "test_MD_300K.xyz", "600K": "test_MD_600K.xyz"},
    ),
}
# Where the 3BPA test sets are not to be had: its other training set, at 300, 600 and 1200 K mixed
STAND_IN = ("mixedT_stand_in", "train_mixedT.xyz")
# Numbers of frames of the published protocols
RMD17_TRAIN, RMD17_VALID, RMD17_TEST = 50, 50, 1000
BOTNET_TRAIN, BOTNET_VALID = 450, 50
SPLIT_SEED = 123

# Total energies of atoms at DFT level, eV, to within a per cent: they tell eV from other units
ATOMS_EV = {"H": -13.6, "C": -1028.0, "N": -1485.0, "O": -2041.0}
UNITS = {"kcal/mol": 23.0605, "kJ/mol": 96.4853, "Hartree": 1 / 27.2114}
FORCE_RMS = (0.03, 10.0)  # eV/A, of molecules between a relaxed scan and 1200 K


@dataclass(frozen=True)
class System:
    """A molecule of a data set."""

    dataset: str
    name: str

    @property
    def formula(self) -> str:
        return SYSTEMS[self.dataset][self.name]

    @property
    def numbers(self) -> frozenset[int]:
        """Its atomic numbers."""
        return frozenset(atomic_numbers[s] for s in Formula(self.formula).count())

    @property
    def label(self) -> str:
        return self.name if self.name == self.dataset else f"{self.dataset} {self.name}"

    @property
    def n_train(self) -> int:
        """Training frames of the published protocol."""
        return RMD17_TRAIN if self.dataset == "rmd17" else BOTNET_TRAIN


@dataclass
class Sets:
    """Frames of one system by purpose, labelled REF_energy (eV) and REF_forces (eV/A).

    `train` may hold more frames than the protocol trains on, for curves against their number: the
    first so many are taken.
    """

    train: list[Atoms]
    valid: list[Atoms]
    tests: dict[str, list[Atoms]]
    sources: list[Path]
    notes: list[str] = field(default_factory=list)


def select(dataset: str, names: Iterable[str] = ()) -> list[System]:
    """Systems by data set ("all" for every one) and, optionally, by names.

    Raises:
        ConfigError: no such data set or molecule.
    """
    if dataset == "all":
        return [System(d, n) for d in SYSTEMS for n in SYSTEMS[d]]
    if dataset not in SYSTEMS:
        raise ConfigError(f"unknown data set {dataset!r}; {did_you_mean(dataset, SYSTEMS)}")
    known = SYSTEMS[dataset]
    for name in names:
        if name not in known:
            raise ConfigError(f"{dataset} has no molecule {name!r}; {did_you_mean(name, known)}")
    return [System(dataset, n) for n in (list(names) or known)]


def labelled(atoms: Atoms, energy: float, forces: np.ndarray) -> Atoms:
    """The frame as an isolated molecule with mace-torch's default names for the labels."""
    frame = Atoms(numbers=atoms.numbers, positions=atoms.positions)
    frame.info["REF_energy"] = float(energy)
    frame.arrays["REF_forces"] = np.array(forces, dtype=float)
    return frame


def read_xyz(path: Path) -> list[Atoms]:
    """Frames of an extended XYZ file whose labels are called REF_energy or energy, and so forces.

    Raises:
        DataError: the file can't be read, or a frame has no labels.
    """
    try:
        frames = ase.io.read(path, index=":")
    except Exception as error:  # ASE raises many kinds for a broken file
        raise DataError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    found = []
    for i, atoms in enumerate(frames):
        results = atoms.calc.results if atoms.calc is not None else {}
        energy = atoms.info.get("REF_energy", results.get("energy"))
        forces = atoms.arrays.get("REF_forces", results.get("forces"))
        if energy is None or forces is None:
            raise DataError(f"{path}, frame {i} has no energy or no forces")
        found.append(labelled(atoms, energy, forces))
    return found


def read_rmd17(path: Path, indices: np.ndarray) -> list[Atoms]:
    """Frames of an original rMD17 file, converted from kcal/mol and kcal/mol/A."""
    unit = ase.units.kcal / ase.units.mol
    content = np.load(path)
    numbers, coords = content["nuclear_charges"], content["coords"]
    energies, forces = content["energies"], content["forces"]
    if indices.max() >= len(coords):
        raise DataError(f"{path} has {len(coords)} frames; the split asks for {indices.max()}")
    return [
        labelled(Atoms(numbers=numbers, positions=coords[i]), energies[i] * unit, forces[i] * unit)
        for i in indices
    ]


def load(system: System, data_dir: Path) -> Sets:
    """The frames of `system` from a folder of originals or of ready splits, checked.

    Raises:
        DataError: nothing to be found there, or not what it should be.
    """
    sets = (
        _load_rmd17(system, data_dir)
        if system.dataset == "rmd17"
        else _load_botnet(system, data_dir)
    )
    for name, frames in {"train": sets.train, "valid": sets.valid, **sets.tests}.items():
        check(f"{system.label}, {name}", frames, system.formula)
    _drop_seen(sets)
    return sets


def _first(data_dir: Path, *candidates: str) -> Path | None:
    return next((data_dir / c for c in candidates if (data_dir / c).exists()), None)


def _load_rmd17(system: System, data_dir: Path) -> Sets:
    name = system.name
    ready = _first(data_dir, *(f"{p}{q}{name}" for p in ("rmd17/", "") for q in ("revised_", "")))
    npz = _first(data_dir, *(f"{p}npz_data/rmd17_{name}.npz" for p in ("rmd17/", "")))
    if npz is not None:
        splits = [npz.parents[1] / "splits" / f"index_{part}_01.csv" for part in ("train", "test")]
        missing = [str(s) for s in splits if not s.exists()]
        if missing:
            raise DataError(f"{npz} is there, but not its split {', '.join(missing)}")
        train, test = (np.loadtxt(s, dtype=int) for s in splits)
        frames = read_rmd17(npz, train)
        tests = {"MD": read_rmd17(npz, test[:RMD17_TEST])}
        return Sets(frames[:-RMD17_VALID], frames[-RMD17_VALID:], tests, [npz, *splits])
    if ready is not None:
        files = [ready / f"{part}.xyz" for part in ("train", "valid", "test")]
        train, valid, test = (read_xyz(f) for f in files)
        return Sets(train, valid[:RMD17_VALID], {"MD": test[:RMD17_TEST]}, files)
    raise DataError(
        f"{data_dir} holds no rMD17 {name}: expected rmd17/npz_data/rmd17_{name}.npz and "
        f"rmd17/splits of the original archive, or rmd17/revised_{name}/train.xyz, valid.xyz, "
        "test.xyz; scripts/fetch_data.py downloads the originals"
    )


def _load_botnet(system: System, data_dir: Path) -> Sets:
    original, train, tests = BOTNET[system.dataset]
    folder = _first(data_dir, f"{original}/{train}", f"{system.dataset}/{train}", train)
    if folder is None:
        raise DataError(
            f"{data_dir} holds no {system.dataset}: expected {original}/{train} or "
            f"{system.dataset}/{train}; scripts/fetch_data.py downloads the originals"
        )
    folder = folder.parent
    present = {name: folder / file for name, file in tests.items() if (folder / file).exists()}
    notes = [f"test set {n} ({tests[n]}) is not there" for n in tests if n not in present]
    if not present and (folder / STAND_IN[1]).exists():
        present = {STAND_IN[0]: folder / STAND_IN[1]}
        notes.append(
            f"{STAND_IN[1]} stands in for the test sets: these are not the papers' figures"
        )
    if not present:
        raise DataError(f"{folder} holds no test set: expected {', '.join(tests.values())}")
    frames = read_xyz(folder / train)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(frames))
    shuffled = [frames[i] for i in order]
    return Sets(
        shuffled[:-BOTNET_VALID],
        shuffled[-BOTNET_VALID:],
        {name: read_xyz(path) for name, path in present.items()},
        [folder / train, *present.values()],
        notes,
    )


def check(where: str, frames: list[Atoms], formula: str) -> None:
    """Raises DataError: no frames, another molecule, labels that are not finite, other units."""
    if not frames:
        raise DataError(f"{where}: there are no frames")
    expected = Formula(formula).count()
    scale = sum(ATOMS_EV[s] * n for s, n in expected.items())
    for i, frame in enumerate(frames):
        if frame.symbols.formula.count() != expected:
            raise DataError(f"{where}, frame {i} is {frame.symbols.formula}, expected {formula}")
        values = (frame.info["REF_energy"], frame.arrays["REF_forces"], frame.positions)
        if not all(np.isfinite(v).all() for v in values):
            raise DataError(f"{where}, frame {i}: a label or a position is not finite")
        ratio = frame.info["REF_energy"] / scale
        if not 0.97 < ratio < 1.03:
            unit = next((u for u, r in UNITS.items() if 0.97 < ratio / r < 1.03), None)
            raise DataError(
                f"{where}, frame {i}: an energy of {frame.info['REF_energy']:.6g} is not in eV"
                + (f" but looks like {unit}" if unit else f"; about {scale:.6g} is expected")
            )
    rms = np.sqrt(np.mean(np.concatenate([f.arrays["REF_forces"] for f in frames]) ** 2))
    if not FORCE_RMS[0] < rms < FORCE_RMS[1]:
        raise DataError(
            f"{where}: forces of {rms:.3g} on average (RMS) can't be in eV/A, "
            f"where {FORCE_RMS[0]} to {FORCE_RMS[1]} is expected"
        )


def _drop_seen(sets: Sets) -> None:
    """Remove from the test sets what is trained or validated on: 3BPA's mixed-T shares frames."""
    seen = {_identity(frame) for frame in (*sets.train, *sets.valid)}
    for name, frames in sets.tests.items():
        kept = [frame for frame in frames if _identity(frame) not in seen]
        if len(kept) < len(frames):
            n = len(frames) - len(kept)
            sets.notes.append(
                f"{n} of {len(frames)} frames of {name} are trained or validated on: left out"
            )
            sets.tests[name] = kept


def _identity(frame: Atoms) -> bytes:
    return frame.numbers.tobytes() + np.round(frame.positions, 5).tobytes()


def prepare(system: System, data_dir: Path, out: Path) -> Path:
    """Write train.xyz, valid.xyz, test_<name>.xyz and data.json of `system`; the folder of them.

    Where data.json is there, the files are complete and are taken as they are.
    """
    folder = out / system.dataset / system.name
    if (folder / "data.json").exists():
        return folder
    sets = load(system, data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": sets.train, "valid": sets.valid}
    parts |= {f"test_{name}": frames for name, frames in sets.tests.items()}
    for name, frames in parts.items():
        write_xyz(folder / f"{name}.xyz", frames)
    description = {
        "dataset": system.dataset,
        "system": system.name,
        "formula": system.formula,
        "units": {"energy": "eV", "forces": "eV/Angstrom"},
        "frames": {name: len(frames) for name, frames in parts.items()},
        "sha256": {name: sha256(folder / f"{name}.xyz") for name in parts},
        "sources": [str(path) for path in sets.sources],
        "notes": sets.notes,
    }
    with whole_file(folder / "data.json") as temporary:  # last: it says that the rest is complete
        temporary.write_text(json.dumps(description, indent=2) + "\n")
    return folder


def write_xyz(path: Path, frames: list[Atoms]) -> None:
    with whole_file(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
