"""What is odd in sets of frames by themselves: duplicates, outliers, forces that don't add up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from ase import Atoms
from scipy.spatial import cKDTree

from mace_lora.check.compared import Array, Compared, composition
from mace_lora.check.findings import DOUBT, TOLD, Finding
from mace_lora.frames.reading import XyzFrames
from mace_lora.upstream.graphs import Configuration, periodic_in

_SAME = 3  # decimals, A: frames that agree in so many are the same
_OTHER_LABEL = 1e-3  # eV per atom, between the same frame twice
_Z = 12.0  # robust standard deviations
_ENERGY_LEAST, _FORCE_LEAST = 0.3, 20.0  # eV per atom, eV/A: less is no outlier
_NET_PART, _NET_LEAST = 0.2, 0.2  # of the root of the sum of squares, and eV/A
_OFFSET = 0.1  # eV per atom, between files or heads
_ENOUGH = 20  # frames, to say what is usual
_FAR = 8.0  # times the 90 % quantile of distances to the nearest frame
_MOST_ATOMS = 400_000  # of which shapes are computed


def findings(files: Sequence[XyzFrames]) -> Iterator[Finding]:
    """What is odd in each of the files, and between them."""
    for file in files:
        if file.configurations:
            yield from duplicates(file)
            yield from outliers(file)
            yield from net_forces(file)
            yield from periodicity(file)
            yield from isolated(file)
    yield from overlaps(files)
    yield from far_frames(files)


def _key(frame: Configuration) -> Hashable:
    cell = frame.cell if frame.cell is not None and any(periodic_in(frame)) else np.zeros((3, 3))
    numbers = np.concatenate([frame.positions.ravel(), np.asarray(cell, dtype=float).ravel()])
    rounded = np.round(numbers, _SAME) + 0.0  # no -0
    return frame.atomic_numbers.tobytes(), rounded.tobytes(), str(frame.properties.get("head"))


def _places(file: XyzFrames, numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(file.place(i)) for i in numbers)


def energies_per_atom(file: XyzFrames) -> Array:
    """(n_frames,), eV; NaN where a frame has none, and for atoms alone."""
    found = [f.properties.get("energy") for f in file.configurations]
    return np.array(
        [
            np.nan
            if e is None or len(f.atomic_numbers) < 2
            else float(np.asarray(e)) / len(f.atomic_numbers)
            for e, f in zip(found, file.configurations, strict=True)
        ]
    )


def duplicates(file: XyzFrames) -> Iterator[Finding]:
    """Frames that are in the file twice, with the same energy or with another."""
    groups = defaultdict(list)
    for i, frame in enumerate(file.configurations):
        groups[_key(frame)].append(i)
    several = [group for group in groups.values() if len(group) > 1]
    energies = energies_per_atom(file)
    other = [g for g in several if np.ptp(energies[g]) > _OTHER_LABEL]
    same = [g for g in several if g not in other]
    for groups_, what, why in (
        (same, "duplicates", "the same frame again"),
        (other, "contradiction", "the same frame again, with another energy"),
    ):
        again = sorted(i for group in groups_ for i in group[1:])
        if again:
            first = f"frame {file.place(groups_[0][1])} is frame {file.place(groups_[0][0])}"
            remedy = "keep one of each" if groups_ is same else "keep the right one"
            yield Finding(DOUBT, what, file.path, f"{why} ({first})", _places(file, again), remedy)


def overlaps(files: Sequence[XyzFrames]) -> Iterator[Finding]:
    """Frames of one file that are in an earlier one, too."""
    seen: dict[Hashable, tuple[str, str]] = {}
    for file in files:
        keys = [_key(frame) for frame in file.configurations]
        common = defaultdict(list)
        for i, key in enumerate(keys):
            if key in seen:
                common[seen[key][0]].append(i)
        for other, numbers in common.items():
            first = f"frame {file.place(numbers[0])} is its frame {seen[keys[numbers[0]]][1]}"
            why = f"{len(numbers)} of {len(keys)} frames are in {other}, too ({first})"
            remedy = "leave them out of one, or errors on the other come out too small"
            yield Finding(DOUBT, "overlap", file.path, why, _places(file, numbers), remedy)
        for i, key in enumerate(keys):
            seen.setdefault(key, (file.path, file.place(i)))


def _robust(values: Array) -> Array:
    """Distances from the median, in standard deviations as the median of distances gives them."""
    centred = np.abs(values - np.nanmedian(values))
    return centred / max(1.4826 * float(np.nanmedian(centred)), 1e-12)


def without_composition(frames: Sequence[Configuration], energies: Array) -> Array:
    """(n_frames,), eV per atom: what is left of energies per atom beside fitted E0s."""
    known = np.isfinite(energies)
    left = np.full(len(energies), np.nan)
    if known.any():
        sizes = np.array([len(f.atomic_numbers) for f in frames])
        shares = composition(frames) / sizes[:, None]
        kept = known.copy()
        for _ in range(3):  # fitted anew without what lies far off
            fit = np.linalg.lstsq(shares[kept], energies[kept], rcond=None)[0]
            left[known] = (energies - shares @ fit)[known]
            kept = known & ~(_robust(left) > _Z)
    return left


def outliers(file: XyzFrames) -> Iterator[Finding]:
    """Energies that lie far from those of the other frames, and forces that do."""
    if len(file.configurations) < _ENOUGH:
        return
    left = without_composition(file.configurations, energies_per_atom(file))
    wild = np.flatnonzero(
        (_robust(left) > _Z) & (np.abs(left - np.nanmedian(left)) > _ENERGY_LEAST)
    )
    if len(wild):
        worst = wild[np.argmax(np.abs(left[wild]))]
        why = f"far from the rest beside fitted E0s, up to {left[worst]:+.3g} eV per atom "
        why += f"(frame {file.place(int(worst))})"
        yield Finding(DOUBT, "outliers, energy", file.path, why, _places(file, wild.tolist()))
    largest = largest_forces(file)
    z = np.nan_to_num(_robust(np.log(np.maximum(largest, 1e-3))))
    wild = np.flatnonzero((largest > _FORCE_LEAST) & (z > _Z / 2))
    if len(wild):
        why = (
            f"forces of up to {largest[wild].max():.3g} eV/A, {np.nanmedian(largest):.3g} is usual"
        )
        yield Finding(DOUBT, "outliers, forces", file.path, why, _places(file, wild.tolist()))


def largest_forces(file: XyzFrames) -> Array:
    """(n_frames,), eV/A: the largest force on an atom; NaN where a frame has none."""
    found = [f.properties.get("forces") for f in file.configurations]
    return np.array(
        [np.nan if f is None else float(np.linalg.norm(np.asarray(f), axis=1).max()) for f in found]
    )


def net_forces(file: XyzFrames) -> Iterator[Finding]:
    """Frames whose forces don't add up to zero."""
    wrong, largest = [], 0.0
    for i, frame in enumerate(file.configurations):
        forces = frame.properties.get("forces")
        if forces is None or len(frame.atomic_numbers) < 2:
            continue
        net = float(np.linalg.norm(np.asarray(forces).sum(axis=0)))
        if net > max(_NET_LEAST, _NET_PART * float(np.linalg.norm(np.asarray(forces)))):
            wrong.append(i)
            largest = max(largest, net)
    if wrong:
        why = f"forces on the whole frame of up to {largest:.3g} eV/A, where 0 is expected"
        remedy = "were atoms left out, their order changed, or some held fixed?"
        yield Finding(DOUBT, "net forces", file.path, why, _places(file, wrong), remedy)


def periodicity(file: XyzFrames) -> Iterator[Finding]:
    """Frames that are periodic in other directions than most."""
    kinds = defaultdict(list)
    for i, frame in enumerate(file.configurations):
        kinds["".join("FT"[p] for p in periodic_in(frame))].append(i)
    if len(kinds) < 2:
        return
    rare = min(kinds, key=lambda kind: len(kinds[kind]))
    shown = ", ".join(f"{len(found)} of pbc {kind}" for kind, found in sorted(kinds.items()))
    common = {_formula(file.configurations[i]) for k in kinds if k != rare for i in kinds[k]}
    mixed = any(_formula(file.configurations[i]) in common for i in kinds[rare])
    why = shown + (", also of one composition" if mixed else "")
    places = _places(file, kinds[rare])
    yield Finding(DOUBT if mixed else TOLD, "mixed periodicity", file.path, why, places)


def _formula(frame: Configuration) -> str:
    return str(Atoms(frame.atomic_numbers).get_chemical_formula())


def isolated(file: XyzFrames) -> Iterator[Finding]:
    """Atoms alone in a frame, which E0s are taken from where the frame says so."""
    alone = [i for i, f in enumerate(file.configurations) if len(f.atomic_numbers) == 1]
    named = [i for i in alone if file.configurations[i].config_type == "IsolatedAtom"]
    if named:
        why = "E0s are taken from them in training"
        yield Finding(TOLD, "isolated atoms", file.path, why, _places(file, named))
    unnamed = [i for i in alone if i not in named]
    if unnamed:
        why = "atoms alone, which teach a model nothing but are no E0s either"
        remedy = "write config_type=IsolatedAtom into them to have them taken for E0s"
        yield Finding(DOUBT, "isolated atoms", file.path, why, _places(file, unnamed), remedy)


# ---------------------------------------------------------------------- far from all others


def far_frames(files: Sequence[XyzFrames]) -> Iterator[Finding]:
    """Frames whose shape is far from that of any other."""
    frames = [(file, i) for file in files for i in range(len(file.configurations))]
    atoms = sum(len(file.configurations[i].atomic_numbers) for file, i in frames)
    frames = frames[:: max(1, -(-atoms // _MOST_ATOMS))]
    if len(frames) < _ENOUGH:
        return
    shapes = np.array([shape(file.configurations[i]) for file, i in frames])
    nearest = cKDTree(shapes).query(shapes, k=2)[0][:, 1]
    usual = max(float(np.quantile(nearest, 0.9)), 1e-3)
    for file in files:
        far = [
            i
            for (owner, i), d in zip(frames, nearest, strict=True)
            if owner is file and d > _FAR * usual
        ]
        if far:
            why = f"more than {_FAR:.0f} times as far from the nearest other frame as is usual"
            yield Finding(DOUBT, "far from all others", file.path, why, _places(file, far))


def shape(frame: Configuration) -> Array:
    """(7,), A: what changes little where a frame does: spread of the atoms, volume, composition.

    Distances are between atoms as they stand in the file, those that are near each other.
    """
    n = len(frame.atomic_numbers)
    tree = cKDTree(frame.positions)
    near = tree.query(frame.positions, k=min(4, n))[0].reshape(n, -1)[:, 1:]
    near = near if near.size else np.zeros((1, 1))
    periodic = all(periodic_in(frame)) and frame.cell is not None
    volume = np.abs(np.linalg.det(frame.cell)) if periodic else 0.0  # type: ignore[arg-type]
    spread = 0.0 if periodic else float(frame.positions.std(axis=0).max())
    mean_number = float(np.mean(frame.atomic_numbers))
    return np.array(
        [near.min(), near.mean(), near.max(), spread, (volume / n) ** (1 / 3), mean_number, n**0.5]
    )


# ---------------------------------------------------------------------- between files and heads


def offsets(compared: Sequence[tuple[str, Compared]]) -> Iterator[Finding]:
    """Files, and heads and types of frames within a file, whose energies are counted from other
    E0s than those of the others, beside what is linear in composition.

    Args:
        compared: path and sample of each file; of files nothing is said where elements differ.
    """
    remedy = "of another theory or other E0s? Then train them as heads of their own (--heads)"
    for path, c in compared:
        kinds = np.array(c.kinds)
        found = _offset(
            [(kind or "no head or type", c, kinds == kind) for kind in sorted(set(c.kinds))]
        )
        if found is not None:
            low, high, by = found
            of = np.flatnonzero(kinds == high)
            why = f"energies of frames of {high} lie {by:.3g} eV per atom above those of {low}"
            yield Finding(DOUBT, "offset", path, why, tuple(c.places[i] for i in of), remedy)
    if len({(tuple(c.elements), c.counts.shape[1]) for _, c in compared}) == 1:
        found = _offset([(path, c, np.ones(len(c.sizes), dtype=bool)) for path, c in compared])
        if found is not None:
            low, high, by = found
            why = f"energies lie {by:.3g} eV per atom above those of {low}"
            yield Finding(DOUBT, "offset", high, why, remedy=remedy)


def _offset(
    groups: Sequence[tuple[str, Compared, npt.NDArray[np.bool_]]],
) -> tuple[str, str, float] | None:
    """The lowest and the highest of groups of frames, and by how much, in eV per atom; if at all.

    Args:
        groups: name, sample, and which frames of it.
    """
    named = []
    for name, c, of in groups:
        of = of & np.isfinite(c.energy)
        shares = c.counts[of] / c.sizes[of, None]
        named.append((name, shares, (c.energy - c.predicted_energy)[of] / c.sizes[of]))
    named = [group for group in named if len(group[1]) > 1]
    if len(named) < 2:
        return None
    shares = np.concatenate([group[1] for group in named])
    fit = np.linalg.lstsq(shares, np.concatenate([group[2] for group in named]), rcond=None)[0]
    rests = [left - shares @ fit for _, shares, left in named]
    means = [float(np.median(rest)) for rest in rests]
    spreads = [float(np.median(np.abs(rest - np.median(rest)))) for rest in rests]
    if np.ptp(means) < max(_OFFSET, 10 * max(spreads)):
        return None
    order = np.argsort(means)
    return named[order[0]][0], named[order[-1]][0], float(np.ptp(means))
