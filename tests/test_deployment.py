"""The merged model in other people's programs: ASE, LAMMPS's two export formats, TorchSim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from adapter_folders import make_adapter
from ase import units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from mace.calculators import MACECalculator
from mace.calculators.lammps_mliap_mace import LAMMPS_MLIAP_MACE  # noqa: F401  (to unpickle it)

from mace_lora import MaceLoraCalculator, load_foundation
from mace_lora.cli import main_tools
from mace_lora.host.models import frames_to_batch


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> tuple[Path, Path]:
    """An adapter of `mini` that changes a little, and the model that `mace_lora merge` wrote."""
    folder = tmp_path_factory.mktemp("deployment")
    base = load_foundation("mini", dtype=torch.float64)
    adapter = make_adapter(base, folder / "adapter", "lora", alpha=0.02)
    flags = ["--base", "mini", "--adapter", str(adapter), "--output", str(folder / "m.model")]
    with pytest.raises(SystemExit) as stop:
        main_tools(["merge", *flags])
    assert stop.value.code == 0
    return folder / "m.model", adapter


@pytest.fixture
def atoms(frames) -> ase.Atoms:
    return frames[0]


def expected(path: Path, atoms: ase.Atoms) -> tuple[float, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = MACECalculator(str(path), default_dtype="float64")
    return atoms.get_potential_energy(), atoms.get_forces()


def test_the_adapter_changes_the_model(merged, atoms):
    base = MACECalculator(models=load_foundation("mini", dtype=torch.float64))
    atoms.calc = base
    energy, forces = expected(merged[0], atoms)
    assert abs(energy - atoms.get_potential_energy()) > 1e-3
    assert np.abs(forces - atoms.get_forces()).max() > 1e-3


def fluctuation(calculator, atoms: ase.Atoms, step: float) -> tuple[float, float]:
    """Standard deviation and drift of the total energy (eV) over 50 fs of NVE."""
    atoms = atoms.copy()
    atoms.calc = calculator
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    md = VelocityVerlet(atoms, timestep=step * units.fs)
    energies = []
    md.attach(lambda: energies.append(atoms.get_total_energy()))
    md.run(int(50 / step))
    return float(np.std(energies)), abs(energies[-1] - energies[0])


@pytest.mark.slow
def test_molecular_dynamics_conserves_energy(merged, atoms):
    """As Verlet does for forces that are the energy's gradient: errors fall as the step squared."""
    calculator = MaceLoraCalculator(base="mini", adapter=merged[1], default_dtype="float64")
    atoms.calc = calculator
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=25)
    coarse, drift = fluctuation(calculator, atoms, 0.5)
    fine, _ = fluctuation(calculator, atoms, 0.25)
    assert drift < 0.02
    assert 3 < coarse / fine < 5.5


def exported(path: Path, *flags: str) -> None:
    """mace-torch's own command `mace_create_lammps_model`."""
    command = [sys.executable, "-m", "mace.cli.create_lammps_model", str(path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_lammps_torchscript(merged, atoms):
    path, _ = merged
    exported(path)
    lammps_model = torch.jit.load(f"{path}-lammps.pt")
    batch = frames_to_batch([atoms], torch.load(path, weights_only=False)).to_dict()
    batch["positions"].requires_grad_(True)
    found = lammps_model(batch, torch.ones(len(atoms), dtype=torch.float64), False)
    energy, forces = expected(path, atoms)
    assert found["total_energy_local"].item() == pytest.approx(energy, abs=1e-9)
    assert np.allclose(found["forces"].numpy(), forces, atol=1e-9)


class Neighbours:
    """What LAMMPS hands to an ML-IAP model, of a molecule on one process: no ghost atoms."""

    def __init__(self, atoms: ase.Atoms, elements: list[str], cutoff: float) -> None:
        first, second = np.nonzero(
            (atoms.get_all_distances() < cutoff) & ~np.eye(len(atoms), dtype=bool)
        )
        self.pair_i, self.pair_j = first, second
        self.rij = atoms.positions[second] - atoms.positions[first]
        self.elems = np.array([elements.index(s) for s in atoms.symbols])
        self.nlocal = self.ntotal = len(atoms)
        self.npairs = len(first)
        self.eatoms = np.zeros(len(atoms))
        self.forces = np.zeros((len(atoms), 3))
        self.energy = 0.0

    def forward_exchange(self, features: torch.Tensor, out: torch.Tensor, _: int) -> None:
        out.copy_(features)

    def reverse_exchange(self, features: torch.Tensor, out: torch.Tensor, _: int) -> None:
        out.copy_(features)

    def update_pair_forces_gpu(self, pair_forces: torch.Tensor) -> None:
        pair_forces = pair_forces.detach().numpy()
        np.add.at(self.forces, self.pair_i, pair_forces)
        np.add.at(self.forces, self.pair_j, -pair_forces)


@pytest.mark.slow
def test_lammps_mliap(merged, atoms):
    """The export converts to cuequivariance, and LAMMPS drives it with pairs of neighbours."""
    pytest.importorskip("cuequivariance_torch")
    path, _ = merged
    exported(path, "--format=mliap")
    lammps_model = torch.load(f"{path}-mliap_lammps.pt", weights_only=False)
    data = Neighbours(atoms, lammps_model.element_types, 2 * lammps_model.rcutfac)
    lammps_model.compute_forces(data)
    energy, forces = expected(path, atoms)
    assert data.energy == pytest.approx(energy, abs=1e-8)
    assert data.eatoms.sum() == pytest.approx(energy, abs=1e-8)
    assert np.allclose(data.forces, forces, atol=1e-8)


def test_torchsim(merged, frames):
    """Several molecules in one batch."""
    torch_sim = pytest.importorskip("torch_sim")
    from torch_sim.models.mace import MaceModel

    path, _ = merged
    settings = {"device": torch.device("cpu"), "dtype": torch.float64}
    model = MaceModel(torch.load(path, weights_only=False), **settings)
    found = model(torch_sim.io.atoms_to_state(frames, **settings))
    forces = found["forces"].detach().numpy().reshape(len(frames), -1, 3)
    for i, atoms in enumerate(frames):
        energy, expected_forces = expected(path, atoms)
        assert found["energy"][i].item() == pytest.approx(energy, abs=1e-9)
        assert np.allclose(forces[i], expected_forces, atol=1e-9)
