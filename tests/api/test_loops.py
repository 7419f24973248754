"""What a loop of one's own is made of: batches with the right labels, and fast steps."""

from __future__ import annotations

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from helpers.frames import DATA, crystals, ethanol

from mace_lora import AdapterConfig, adapter_parameters, batches, fast_steps, inject
from mace_lora.errors import ConfigError, DataError
from mace_lora.frames.attached import labelled
from mace_lora.testing import randomise_


def loss(model: torch.nn.Module, batch) -> torch.Tensor:
    output = model(batch.to_dict(), training=True, compute_stress=True)
    terms = ("energy", "forces", "stress")
    return sum((output[name] - getattr(batch, name)).square().mean() for name in terms)


@pytest.mark.parametrize("method", ["lora", "full", "mmea"])
def test_fast_steps_give_the_gradients(base, method):
    """After a step of an optimiser in the block; after the block it is mace-torch's model."""
    inject(base, AdapterConfig.create(method))
    randomise_(base, 0, 0.1)
    (batch,) = batches(crystals(), base)
    parameters = adapter_parameters(base)
    optimiser = torch.optim.SGD(parameters.values(), lr=1e-9)

    def gradients() -> dict[str, torch.Tensor]:
        optimiser.zero_grad()
        loss(base, batch).backward()
        return {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}

    def own() -> dict[int, object]:
        return {id(module): vars(module).get("forward") for module in base.modules()}

    before = own()
    with fast_steps(base) as same:
        assert same is base
        gradients()
        optimiser.step()
        fast = gradients()
        assert own() != before  # the backend is at work
    assert own() == before
    eager = gradients()
    assert eager.keys() == fast.keys()
    for name, gradient in eager.items():
        scale = max(float(gradient.abs().max()), 1.0)
        assert float((gradient - fast[name]).abs().max()) <= 1e-10 * scale, name


def test_fast_steps_refuse():
    with pytest.raises(ConfigError, match="a model is needed"), fast_steps("mini"):
        pass


def test_batches_hold_the_labels(base):
    frames = [*ethanol("train", 3), *crystals()]
    del frames[1].info["REF_energy"]
    found = batches(frames, base, batch_size=2)
    parts = list(found)
    assert len(found) == len(parts) == 3
    assert [part.num_graphs for part in parts] == [2, 2, 1]
    energy = torch.cat([part.energy for part in parts])
    assert energy.dtype == next(base.parameters()).dtype
    wanted = [frame.info.get("REF_energy", 0.0) for frame in frames]
    assert energy.tolist() == pytest.approx(wanted)
    weights = torch.cat([part.energy_weight for part in parts])
    assert weights.tolist() == [1, 0, 1, 1, 1]
    forces = torch.cat([part.forces for part in parts]).numpy()
    assert np.allclose(forces, np.concatenate([f.arrays["REF_forces"] for f in frames]))
    xx, yy, zz, yz, xz, xy = frames[-1].info["REF_stress"]
    matrix = [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]
    assert np.allclose(parts[-1].stress[0].numpy(), matrix)
    assert [float(part.stress_weight[0]) for part in parts] == [0, 0, 1]


def test_batches_shuffle(base):
    frames = ethanol("train", 6)
    wanted = sorted(frame.info["REF_energy"] for frame in frames)
    shuffled = batches(frames, base, batch_size=2, shuffle=True)
    torch.manual_seed(3)
    rounds = [torch.cat([batch.energy for batch in shuffled]).tolist() for _ in range(2)]
    assert rounds[0] != rounds[1]
    assert all(sorted(energies) == pytest.approx(wanted) for energies in rounds)
    torch.manual_seed(3)
    assert torch.cat([batch.energy for batch in shuffled]).tolist() == rounds[0]


def test_batches_of_a_file(base, tmp_path):
    path = tmp_path / "own.xyz"
    frames = ethanol("train", 2)
    for frame in frames:
        frame.info["dft"] = 2.0 * frame.info["REF_energy"]
    ase.io.write(path, frames)
    (batch,) = batches(path, base)
    (other,) = batches(str(path), base, energy_key="dft")
    assert torch.allclose(other.energy, 2 * batch.energy)
    assert torch.equal(other.forces, batch.forces)


@pytest.mark.parametrize(
    ("frames", "options", "words"),
    [
        ("none.xyz", {}, "frames=none.xyz: there is no such file"),
        ([ase.Atoms("Au", pbc=False)], {}, "Au"),
        ([ase.Atoms("H2", [[0, 0, 0]] * 2)], {}, "on one spot"),
        (DATA / "ethanol_train.xyz", {"batch_size": 0}, "batch_size=0"),
        (DATA / "ethanol_train.xyz", {"head": "none"}, "no head 'none'; known: Default"),
        (DATA / "ethanol_train.xyz", {"keys": {"enrgy": "a"}}, "Did you mean 'energy'"),
    ],
)
def test_batches_refuse(base, frames, options, words):
    with pytest.raises((ConfigError, DataError), match=words):
        batches(frames, base, **options)


# ------------------------------------------------------------------ labels in memory


def test_one_calculator_of_several_frames():
    """Its results are of the last frame that it was asked for, never labels of the others."""
    calculator = LennardJones(sigma=1.0, rc=5.0)
    frames = [ase.Atoms("H2", [[0, 0, 0], [0, 0, d]]) for d in (1.0, 1.2)]
    energies = []
    for frame in frames:
        frame.calc = calculator
        energies.append(frame.get_potential_energy())
    assert energies[0] != energies[1]
    found = labelled(frames, "frames")
    assert [frame.info["REF_energy"] for frame in found] == pytest.approx(energies)
    assert all(frame.calc is None for frame in found)


def test_forces_of_fixed_atoms_are_labels():
    atoms = ase.Atoms("H2", [[0, 0, 0], [0, 0, 1.2]], constraint=FixAtoms([0, 1]))
    forces = np.array([[0, 0, 1.0], [0, 0, -1.0]])
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=forces)
    (found,) = labelled(atoms, "frames")
    assert not found.constraints
    assert np.array_equal(found.arrays["REF_forces"], forces)
    assert atoms.constraints  # the caller's are left as they were
    assert "REF_forces" not in atoms.arrays


def test_results_of_other_positions_are_refused():
    atoms = ase.Atoms("H2", [[0, 0, 0], [0, 0, 1.2]])
    atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    atoms.positions += 0.1
    with pytest.raises(DataError, match=r"frames\[0\]: positions changed"):
        labelled([atoms], "frames")


def test_labels_go_through_a_file(tmp_path):
    """Own keys stay, ASE's names too, and what no file can hold is left out."""
    frames = crystals()
    for frame in frames:
        forces, stress = frame.arrays.pop("REF_forces"), frame.info.pop("REF_stress")
        frame.info["total"] = frame.info.pop("REF_energy")
        frame.info["made by"] = object()
        frame.info["config_type"] = "bulk"
        frame.calc = SinglePointCalculator(frame, forces=forces, stress=stress)
    asked = {"energy": "total", "forces": "forces", "stress": "stress"}
    ase.io.write(tmp_path / "a.xyz", labelled(frames, "frames", asked), format="extxyz")
    for frame, read in zip(frames, ase.io.read(tmp_path / "a.xyz", ":"), strict=True):
        assert read.info["total"] == frame.info["total"]
        assert np.allclose(read.get_forces(), frame.calc.results["forces"], atol=1e-8)
        assert np.allclose(read.get_stress(), frame.calc.results["stress"])
        assert read.info["config_type"] == "bulk"
        assert "made by" not in read.info
