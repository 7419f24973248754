"""From files to losses and errors: mace-torch's own way through our functions, on frames of every
kind, against numbers that are computed one at a time."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from helpers import plain_losses
from helpers.plain_losses import Plain
from hypothesis import given, settings
from hypothesis import strategies as st
from mace import data as mace_data
from mace import tools
from mace.tools import torch_geometric
from mace.tools.run_train_utils import load_dataset_for_path
from mace.tools.scripts_utils import get_dataset_from_xyz

from mace_lora.training import losses, metrics
from mace_lora.training.data import Data
from mace_lora.upstream import names as upstream
from mace_lora.upstream.precision import default_dtype

LOSSES = ("weighted", "forces_only", "stress", "virials", "huber", "universal", "l1l2energyforces")
FACTORS = {"energy": 2.0, "forces": 3.0, "stress": 5.0, "virials": 7.0}
TABLE = tools.AtomicNumberTable([1, 6, 8])
OWN, REF = "ase", "ref"


def settings_of(loss: str) -> argparse.Namespace:
    weights = {f"{name}_weight": factor for name, factor in FACTORS.items()}
    more = {"huber_delta": plain_losses.DELTA, "r_max": 2.5, "model": "MACE"}
    return argparse.Namespace(loss=loss, **weights, **more)


class Anything(torch.nn.Module):
    """In a model's place: outputs that depend on positions, and on the cell as a stress does."""

    def forward(self, batch, **_):
        positions = batch["positions"]
        per_frame = torch.zeros(len(batch["ptr"]) - 1, 3, 3, dtype=positions.dtype)
        outer = positions[:, :, None] * positions[:, None, :]
        virials = per_frame.index_add(0, batch["batch"], outer)
        volume = torch.linalg.det(batch["cell"].view(-1, 3, 3)).abs()
        return {
            "energy": virials.sum((1, 2)),
            "forces": 150 * torch.sin(positions),
            "virials": virials,
            "stress": virials / volume.view(-1, 1, 1),
        }


def predicted(atoms: ase.Atoms) -> dict[str, np.ndarray]:
    """What Anything gives for one frame."""
    virials = atoms.positions.T @ atoms.positions
    found = {"energy": virials.sum(), "forces": 150 * np.sin(atoms.positions), "virials": virials}
    return {**found, "stress": virials / (atoms.get_volume() if atoms.cell.rank == 3 else 1.0)}


@st.composite
def labelled(draw, keys: str) -> tuple[ase.Atoms, Plain]:
    """A frame as it is written, and what is true of it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 4))
    pbc = draw(st.sampled_from([(0, 0, 0), (1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 1, 1)]))
    cell = np.diag([6.0, 7.0, 8.0]) + rng.uniform(-0.5, 0.5, (3, 3))
    grid = np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 2]])[:n]
    atoms = ase.Atoms(rng.choice([1, 6, 8], n), grid + rng.uniform(0, 0.5, (n, 3)), cell=cell)
    atoms.pbc = pbc
    if not any(pbc) and draw(st.booleans()):
        atoms.cell = None
    half = rng.normal(size=(3, 3))
    labels = {
        "energy": np.float64(10 * rng.normal()),
        "forces": 200 * rng.normal(size=(n, 3)),
        "stress": half + half.T,
        "virials": 3 * (half + half.T),
    }
    lacking = draw(st.sets(st.sampled_from(list(labels))))
    lacking |= {"stress"} if atoms.cell.rank < 3 else set()
    labels = {name: value for name, value in labels.items() if name not in lacking}
    names = {"frame": "config_weight", "energy": "config_energy_weight"}
    names |= {"forces": "config_forces_weight", "stress": "config_stress_weight"}
    chosen = draw(st.dictionaries(st.sampled_from(list(names)), st.sampled_from([0.0, 0.5, 2.0])))
    atoms.info |= {names[name]: weight for name, weight in chosen.items()}
    kind = draw(st.sampled_from([None, "liquid", "300", "T"]))
    if kind is not None:
        atoms.info["config_type"] = kind
    _write_labels(draw, atoms, labels, keys)
    if draw(st.booleans()):
        atoms.set_constraint(FixAtoms(draw(st.lists(st.integers(0, n - 1), unique=True))))
    of_kind = {"300": 3.0, "T": 0.0}.get(kind, 1.0)
    weight = chosen.pop("frame", 1.0) * of_kind
    return atoms, Plain(labels, predicted(atoms), n, weight, chosen)


def _write_labels(draw, atoms: ase.Atoms, labels: dict[str, np.ndarray], keys: str) -> None:
    form = draw(st.sampled_from(["six", "matrix"]))
    results = {}
    for name, value in labels.items():
        if name in ("stress", "virials") and (form == "six" or keys == OWN):
            value = value[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        if keys == OWN and name != "virials":
            results[name] = value
        else:
            place = atoms.arrays if name == "forces" else atoms.info
            place[f"REF_{name}"] = value
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)


def through_mace_torch(path: Path, args: argparse.Namespace, keys: str, batch_size: int):
    """Loss and errors of Anything, as mace-torch's script comes to them with our functions."""
    specification = mace_data.KeySpecification.from_defaults()
    if keys == OWN:
        specification.info_keys |= {"energy": "energy", "stress": "stress"}
        specification.arrays_keys |= {"forces": "forces"}
    own = {"loss": losses.of_run, "metrics": metrics.metrics}
    script = upstream.module("mace.cli.run_train")
    with default_dtype(torch.float64), upstream.substituted({**Data(args).substitutes(), **own}):
        collections, _ = get_dataset_from_xyz(
            work_dir=str(path.parent),
            train_path=str(path),
            valid_path=str(path),
            valid_fraction=0.1,
            key_specification=specification,
            config_type_weights={"300": 3.0, True: 0.0},
            keep_isolated_atoms=True,
        )
        graphs = load_dataset_for_path(
            str(path), 2.5, TABLE, ["Default"], head_config=None, collection=collections.train
        )
        loader = torch_geometric.dataloader.DataLoader(graphs, batch_size=batch_size)
        loss_fn = script.get_loss_fn(args, dipole_only=False, compute_dipole=False)
        outputs = dict.fromkeys(("forces", "virials", "stress"), True)
        return upstream.module("mace.tools.train").evaluate(
            Anything(), loss_fn, loader, outputs, torch.device("cpu")
        )


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_losses_and_errors_are_those_of_plain_numbers(data):
    keys = data.draw(st.sampled_from([OWN, REF]))
    name = data.draw(st.sampled_from(LOSSES))
    frames = data.draw(st.lists(labelled(keys), min_size=1, max_size=6))
    batch_size = data.draw(st.integers(1, 6))
    present = set().union(*(plain.labels for _, plain in frames))
    counted = plain_losses.COUNTED.get(name, ("energy", "forces"))
    if not {"energy", "forces"} & present:
        return  # nothing to train on
    args = settings_of(name)
    for label in set(counted) - present:  # as one who has none of them must say
        setattr(args, f"{label}_weight", 0.0)
    factors = {label: getattr(args, f"{label}_weight") for label in FACTORS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.xyz"
        ase.io.write(path, [atoms for atoms, _ in frames], format="extxyz")
        found, errors = through_mace_torch(path, args, keys, batch_size)
    plain = [one for _, one in frames]
    batches = [plain[i : i + batch_size] for i in range(0, len(plain), batch_size)]
    expected = sum(plain_losses.loss(name, batch, factors) for batch in batches) / len(plain)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for error, value in plain_losses.errors(plain).items():
        assert errors[error] == pytest.approx(value, rel=1e-6, abs=1e-9), error
    for error in ("rmse_e_per_atom", "rmse_f", "rmse_stress", "rmse_virials_per_atom"):
        assert (error in errors) == (error in plain_losses.errors(plain))
