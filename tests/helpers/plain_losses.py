"""Losses and errors of frames, one number at a time: slow, and plainly right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

DELTA = 0.01


@dataclass
class Plain:
    """One frame: labels and predictions by name, absent where there is none; its weights."""

    labels: Mapping[str, np.ndarray]
    predictions: Mapping[str, np.ndarray]
    n_atoms: int
    weight: float = 1.0
    label_weights: Mapping[str, float] = field(default_factory=dict)

    def weight_of(self, name: str) -> float:
        return float(self.label_weights.get(name, 1.0)) if name in self.labels else 0.0

    def difference(self, name: str) -> np.ndarray:
        label = self.labels.get(name, np.zeros_like(self.predictions[name]))
        return np.asarray(label - self.predictions[name], dtype=float)


def huber(x: float, delta: float) -> float:
    return 0.5 * x * x if abs(x) < delta else delta * (abs(x) - 0.5 * delta)


def _squared(frame: Plain, name: str) -> list[float]:
    per = frame.n_atoms if name in ("energy", "virials") else 1
    w = frame.weight * frame.weight_of(name)
    return [w * (x / per) ** 2 for x in frame.difference(name).ravel()]


def _absolute(frame: Plain, name: str) -> list[float]:
    w = frame.weight * frame.weight_of(name)
    if name == "energy":
        return [w * abs(float(frame.difference(name))) / frame.n_atoms]
    return [w * float(np.sqrt((row**2).sum())) for row in frame.difference(name)]


def _huber(frame: Plain, name: str) -> list[float]:
    per = frame.n_atoms if name == "energy" else 1
    w = frame.weight * frame.weight_of(name)
    return [w * huber(x / per, DELTA) for x in frame.difference(name).ravel()]


def _universal(frame: Plain, name: str) -> list[float]:
    per = frame.n_atoms if name == "energy" else 1
    w, total = frame.weight_of(name), []
    rows = np.atleast_2d(frame.difference(name))
    labels = np.atleast_2d(frame.labels.get(name, np.zeros_like(rows)))
    for row, label in zip(rows, labels, strict=True):
        size = w * float(np.sqrt((label**2).sum()))
        large = [f for limit, f in ((300, 0.1), (200, 0.4), (100, 0.7)) if size >= limit]
        delta = DELTA * (large[0] if large and name == "forces" else 1.0)
        total += [frame.weight * huber(w * x / per, delta) for x in row]
    return total


_KINDS = {"huber": _huber, "universal": _universal, "l1l2energyforces": _absolute}
COUNTED = {
    "forces_only": ("forces",),
    "stress": ("energy", "forces", "stress"),
    "virials": ("energy", "forces", "virials"),
    "huber": ("energy", "forces", "stress"),
    "universal": ("energy", "forces", "stress"),
}


def loss(name: str, frames: Sequence[Plain], factors: Mapping[str, float]) -> float:
    """Of one batch."""
    term = _KINDS.get(name, _squared)
    return sum(
        factors[label] * float(np.mean([x for frame in frames for x in term(frame, label)]))
        for label in COUNTED.get(name, ("energy", "forces"))
    )


def errors(frames: Sequence[Plain]) -> dict[str, float]:
    """By the names of mace-torch, over numbers that have a label of any weight."""
    found: dict[str, float] = {}
    for label, short in (("energy", "e"), ("forces", "f"), ("stress", "stress"), ("virials",) * 2):
        mine = [f for f in frames if f.weight * f.weight_of(label) > 0]
        if not mine:
            continue
        x = np.concatenate([f.difference(label).ravel() for f in mine])
        found |= {f"mae_{short}": np.abs(x).mean(), f"rmse_{short}": np.sqrt((x**2).mean())}
        if label in ("energy", "virials"):
            x = np.concatenate([f.difference(label).ravel() / f.n_atoms for f in mine])
            found[f"rmse_{short}_per_atom"] = np.sqrt((x**2).mean())
        if label == "energy":
            found["mae_e_per_atom"] = np.abs(x).mean()
        if label == "forces":
            y = np.concatenate([f.labels[label].ravel() for f in mine])
            found["rel_mae_f"] = 100 * np.abs(x).mean() / (np.abs(y).mean() + 1e-9)
            found["rel_rmse_f"] = 100 * found["rmse_f"] / (np.sqrt((y**2).mean()) + 1e-9)
    return found
