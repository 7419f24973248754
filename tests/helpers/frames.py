"""Labelled frames for tests, and where files are."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import ase
import ase.io
import numpy as np

DATA = Path(str(resources.files("mace_lora") / "data"))
TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def ethanol(part: str, n: int) -> list[ase.Atoms]:
    frames = ase.io.read(DATA / f"ethanol_{part}.xyz", index=f":{n}")
    for frame in frames:
        frame.pbc = False
    return frames


def molecules() -> list[ase.Atoms]:
    """Molecules of several sizes, with labels."""
    frames = ethanol("train", 4)
    for frame, n in zip(frames, (9, 7, 5, 8), strict=True):
        del frame[n:]
    return frames


def crystals() -> list[ase.Atoms]:
    """Periodic cells of different sizes, with energies, forces and stresses."""
    rng = np.random.default_rng(0)
    frames = []
    for n, box in ((2, 3.1), (1, 2.6)):
        unit = ase.Atoms("CO", [[0, 0, 0], [0.5 * box] * 3], cell=[box] * 3, pbc=True)
        frame = unit.repeat((n, 1, 1))
        frame.positions += 0.1 * rng.normal(size=frame.positions.shape)
        frame.info["REF_energy"] = -3.0 * len(frame)
        frame.info["REF_stress"] = 0.01 * rng.normal(size=6)
        frame.arrays["REF_forces"] = rng.normal(size=frame.positions.shape)
        frames.append(frame)
    return frames


FRAMES = {"one molecule": lambda: ethanol("train", 3), "mixed": molecules, "periodic": crystals}
