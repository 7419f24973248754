"""How long molecular dynamics lasts at several temperatures, and how its energy drifts."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms

from mace_lora.trust.dynamics import drift, langevin, nve


@dataclass(frozen=True)
class Lengths:
    """What is simulated: picoseconds of each run, seeds of each temperature, time step in fs."""

    temperatures: tuple[float, ...] = (500.0, 1000.0, 1500.0)
    seeds: int = 3
    langevin_ps: float = 1.0
    nve_ps: float = 0.5
    step_fs: float = 0.5


def simulate(
    model: torch.nn.Module, frames: list[Atoms], lengths: Lengths
) -> dict[str, float | list[list[float | str]]]:
    """Mean picoseconds until broken by temperature, every single run, and the mean drift in NVE;
    run number i starts from frame number i.
    """
    model = deepcopy(model)  # a calculator changes it
    found: dict[str, float | list[list[float | str]]] = {}
    runs: list[list[float | str]] = []
    starts = [frames[seed % len(frames)] for seed in range(lengths.seeds)]
    for kelvin in lengths.temperatures:
        lasted = []
        for seed, frame in enumerate(starts):
            path = langevin(
                model, frame, lambda _, k=kelvin: k, lengths.langevin_ps, seed, lengths.step_fs
            )
            lasted.append(path.ps)
            runs.append([kelvin, seed, path.ps, path.trouble])
        found[f"ps_{kelvin:g}K"] = float(np.mean(lasted))
    drifts = [
        drift(nve(model, frame, lengths.nve_ps, seed, lengths.step_fs))
        for seed, frame in enumerate(starts)
    ]
    return found | {"runs": runs, "nve_drift": float(np.mean(drifts))}
