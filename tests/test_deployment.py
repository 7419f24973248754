"""The merged model in other people's programs: ASE, LAMMPS's two export formats, TorchSim."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk
from ase.data import chemical_symbols
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from helpers.adapter_folders import make_adapter
from mace.calculators import MACECalculator
from mace.calculators.lammps_mliap_mace import LAMMPS_MLIAP_MACE  # noqa: F401  (to unpickle it)

from mace_lora import MaceLoraCalculator, load_foundation
from mace_lora.cli import main_tools
from mace_lora.upstream.predicting import frames_to_batch


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


LAMMPS_SCRIPT = """
units metal
atom_style atomic
atom_modify map yes
newton on
read_data crystal.data
pair_style mliap unified {model} 0
pair_coeff * * {elements}
velocity all create 300 1
fix move all nve
timestep 0.0005
thermo_style custom step pe ke etotal pxx pyy pzz
thermo_modify format float %.12g
thermo 1
dump forces all custom 1000 forces.txt id fx fy fz
dump_modify forces sort id format float %.12g
run 10
"""


def lammps_with_mliap() -> str:
    """A LAMMPS that can run ML-IAP models written in Python, from $LAMMPS or the PATH."""
    program = os.environ.get("LAMMPS") or shutil.which("lmp") or shutil.which("lammps")
    wanted = {"KOKKOS", "ML-IAP", "PYTHON"}
    if program is None:
        pytest.skip(f"no LAMMPS: $LAMMPS may name one with the packages {sorted(wanted)}")
    said = subprocess.run([program, "-h"], capture_output=True, text=True, check=False).stdout
    if missing := wanted - set(said.split()):
        pytest.skip(f"{program} is built without the packages {sorted(missing)}")
    return program


@pytest.mark.slow
def test_lammps_itself(merged, tmp_path, monkeypatch):
    """A crystal smaller than the cutoff's sphere, so that features travel to ghost atoms."""
    program = lammps_with_mliap()
    path, _ = merged
    monkeypatch.setenv("MACE_ALLOW_CPU", "true")  # read when the model is exported
    exported(path, "--format=mliap")
    elements = [chemical_symbols[z] for z in torch.load(path, weights_only=False).atomic_numbers]
    crystal = bulk("C", "diamond", a=3.6, cubic=True) * (2, 2, 2)
    crystal.rattle(0.05, seed=0)
    crystal.symbols[:8] = "H"
    crystal.symbols[8:16] = "O"
    data = {"format": "lammps-data", "specorder": elements, "masses": True}
    ase.io.write(tmp_path / "crystal.data", crystal, **data)
    model = f"{path}-mliap_lammps.pt"
    (tmp_path / "in.txt").write_text(LAMMPS_SCRIPT.format(model=model, elements=" ".join(elements)))
    packages = [os.environ.get("PYTHONPATH", ""), *(p for p in sys.path if "site-packages" in p)]
    kokkos = ["-k", "on", "t", "1", "-sf", "kk", "-pk", "kokkos", "newton", "on", "neigh", "half"]
    done = subprocess.run(
        [program, *kokkos, "-in", "in.txt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.split("PotEng")[1].split("Loop time")[0].splitlines()[1:]
    thermo = np.array([[float(x) for x in line.split()] for line in lines])
    crystal.calc = MACECalculator(str(path), default_dtype="float64")
    assert thermo[0, 1] == pytest.approx(crystal.get_potential_energy(), abs=1e-7)
    pressure = -crystal.get_stress()[:3] / units.bar
    kinetic = 2 / 3 * thermo[0, 2] / crystal.get_volume() / units.bar
    assert thermo[0, 4:].mean() - kinetic == pytest.approx(pressure.mean(), rel=1e-5)
    found = np.loadtxt(tmp_path / "forces.txt", skiprows=9, max_rows=len(crystal))[:, 1:]
    assert np.allclose(found, crystal.get_forces(), atol=1e-7)
    total = thermo[:, 3]
    assert len(total) == 11
    assert np.ptp(total) < 0.02 * np.ptp(thermo[:, 1])


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
