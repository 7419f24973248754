"""Atoms on one spot, in many frames at once: its cost grows with atoms, not with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from ase.geometry import complete_cell, minkowski_reduce
from scipy.spatial import cKDTree

from mace_lora.upstream.graphs import Configuration, periodic_in

Array: TypeAlias = npt.NDArray[np.float64]

# Atoms nearer than this, in A, are the same atom twice
SAME_SPOT = 0.1


def first_overlap(frames: Sequence[Configuration]) -> tuple[int, int, int] | None:
    """The first frame in which two atoms, or an atom and an image of another, are on one spot.

    Args:
        frames: with positions and cells that are finite; periodic vectors span something.

    Returns:
        Its number among `frames`, and the two atoms; None where there is none.
    """
    if not frames:
        return None
    sizes = [len(frame.positions) for frame in frames]
    frame_of = np.repeat(np.arange(len(frames)), sizes)
    atom_of = np.concatenate([np.arange(n) for n in sizes])
    positions = np.concatenate([np.asarray(f.positions, dtype=float) for f in frames])
    points, origin = _with_images(positions, frame_of, frames)
    # Frames are kept apart by a fourth coordinate
    apart = np.column_stack([points, frame_of[origin].astype(float)])
    pairs = origin[cKDTree(apart).query_pairs(SAME_SPOT, output_type="ndarray")]
    if not len(pairs):
        return None
    one, other = min((min(a, b), max(a, b)) for a, b in pairs.tolist())
    return int(frame_of[one]), int(atom_of[one]), int(atom_of[other])


def _with_images(
    positions: Array, frame_of: npt.NDArray[np.int64], frames: Sequence[Configuration]
) -> tuple[Array, npt.NDArray[np.int64]]:
    """The atoms inside their cells, with the images just outside; and whose image each one is."""
    origin = np.arange(len(positions))
    periodic = np.array([periodic_in(f) for f in frames])
    if not periodic.any():
        return positions, origin
    cells = np.array([_full_cell(f) for f in frames])
    inverse = np.linalg.inv(cells)
    margins = SAME_SPOT * np.linalg.norm(inverse, axis=1)  # of each face, in units of the vectors
    inside = np.einsum("ni,nij->nj", positions, inverse[frame_of])
    inside -= np.where(periodic[frame_of], np.floor(inside), 0.0)
    for axis in range(3):
        mine = frame_of[origin]
        near = np.where(periodic[mine, axis], margins[mine, axis], -1.0)
        copies = []
        for is_near, shift in (
            (inside[:, axis] < near, 1.0),
            (inside[:, axis] > 1.0 - near, -1.0),
        ):
            copy = inside[is_near].copy()
            copy[:, axis] += shift
            copies.append((copy, origin[is_near]))
        inside = np.concatenate([inside, *(c for c, _ in copies)])
        origin = np.concatenate([origin, *(o for _, o in copies)])
    return np.einsum("ni,nij->nj", inside, cells[frame_of[origin]]), origin


def _full_cell(frame: Configuration) -> Array:
    """Lattice vectors in periodic directions, unit vectors across them in the others."""
    periodic = periodic_in(frame)
    if not any(periodic):
        return np.eye(3)
    cell = np.asarray(frame.cell, dtype=float)
    if all(periodic):
        return cell
    cell = np.where(np.array(periodic)[:, None], cell, 0.0)
    return np.asarray(complete_cell(cell))


def is_alone(frame: Configuration, cutoff: float) -> bool:
    """Whether a frame is one atom, with no image of itself within `cutoff`, A."""
    if len(frame.positions) != 1:
        return False
    periodic = periodic_in(frame)
    if not any(periodic):
        return True
    cell, _ = minkowski_reduce(_full_cell(frame), pbc=periodic)
    lengths = np.asarray(np.linalg.norm(cell, axis=1))
    return bool(min(lengths[list(periodic)]) > cutoff)
