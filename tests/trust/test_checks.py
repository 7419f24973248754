"""Verdicts: models with known faults fail the check of that fault, sound ones pass."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from ase.build import bulk
from helpers.faults import PairFault
from helpers.frames import ethanol

from mace_lora import AdapterConfig, inject, load_foundation, merge
from mace_lora.testing import randomise_
from mace_lora.trust import checks
from mace_lora.trust.checks import FAIL, PASS, TOLD, Asked
from mace_lora.trust.frames import dimers


@pytest.fixture(scope="module")
def mini() -> torch.nn.Module:
    return load_foundation("mini", dtype=torch.float64)


def with_e0s(model: torch.nn.Module, energies: list[float]) -> torch.nn.Module:
    changed = deepcopy(model)
    changed.atomic_energies_fn.atomic_energies[:] = torch.tensor(energies, dtype=torch.float64)
    return changed


class WrongForces(PairFault):
    """Forces that aren't the gradient of the energy: `strength` times as large."""

    def forward(self, data, **keywords):
        output = dict(self.model(data, **keywords))
        output["forces"] = self.strength * output["forces"]
        return output


class UpsideDown(PairFault):
    """The energy and forces of the model with the other sign."""

    def forward(self, data, **keywords):
        output = dict(self.model(data, **keywords))
        return output | {k: -output[k] for k in ("energy", "forces")}


class Bumpy(PairFault):
    """A crystal's energy oscillates with its volume, by `strength` eV."""

    def forward(self, data, **keywords):
        output = dict(self.model(data, **keywords))
        wave = torch.cos(5.0 * torch.linalg.det(data["cell"].view(-1, 3, 3)))
        return output | {"energy": output["energy"] + self.strength * wave}


def verdicts(asked: Asked) -> dict[str, str]:
    return {check.name: check.verdict for check in checks.all_checks(asked)}


def test_a_model_can_be_trusted_as_its_own_start(mini):
    found = verdicts(Asked(mini, mini, ethanol("test", 3), np.full(3, np.nan), ps=0.02))
    assert set(found.values()) == {PASS}
    assert {"E0s", "pairs of atoms", "compressed frames", "NVE", "heating"} <= found.keys()


def test_a_sound_model_passes_without_start_and_data(mini):
    found = verdicts(Asked(mini, ps=0.0))
    assert found == {"E0s": TOLD, "pairs of atoms": PASS}  # GFN2-xTB is in no table


def test_an_exploded_model_fails(mini):
    """The walls above all: its forces are as wrong as they are large."""
    model = deepcopy(mini)
    inject(model, AdapterConfig.create("full"))
    randomise_(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter *= 20
    found = verdicts(Asked(merge(model), mini, ethanol("test", 3), np.full(3, -100.0), ps=0.0))
    assert found["pairs of atoms"] == found["energies"] == FAIL


@pytest.mark.parametrize("known", [True, False])
def test_a_hole_fails(mini, known):
    model = PairFault(mini, -1e5)
    asked = Asked(model, mini if known else None, ethanol("test", 1), ps=0.0)
    check = checks.check_wall(asked, "pairs of atoms", dimers(asked.elements), checks.WALL)
    assert check.verdict == FAIL
    assert "H2" in check.why


@pytest.mark.parametrize(
    ("energies", "verdict"),
    [
        ([-13.6, -1029.5, -1485.0, -2042.0], PASS),  # all electrons
        ([-1.1, -1.3, -3.1, -1.5], PASS),  # PBE of VASP
        ([-16.3, -1037.6, -1490.7, -2048.3], PASS),  # averaged over many molecules
        ([-581.5, -239.1, -300.0, -197.6], FAIL),  # one molecule's energy spread over its elements
        ([-12.6, -146.4, -265.9, -431.6], TOLD),  # pseudopotentials that are not known here
        ([float("nan"), -1029.5, -1485.0, -2042.0], FAIL),
        ([-13.6, -1029.5, -1485.0, -4792.0], FAIL),  # deeper than all electrons of oxygen
        ([-13.6, 300.0, -1485.0, -2042.0], FAIL),
    ],
)
def test_e0s(mini, energies, verdict):
    check = checks.check_e0s(Asked(with_e0s(mini, energies), mini))
    assert check.verdict == verdict


def test_energies_off_the_labels_fail(mini):
    frames = ethanol("test", 3)
    own = checks.answers(mini, frames)
    table = checks.e0s(mini)
    energies = own.energy + np.array([sum(table[z] for z in f.numbers) for f in frames])
    per_atom = energies / [len(f) for f in frames]
    for shift, verdict in ((0.0, PASS), (0.4, PASS), (-0.6, FAIL)):
        check = checks.check_offset(Asked(mini, frames=frames, energies=per_atom + shift))
        assert check.verdict == verdict
        assert check.value == pytest.approx(abs(shift), abs=1e-9)
    untouched = checks.check_offset(Asked(mini, mini, frames, per_atom - 400.0))
    assert untouched.verdict == PASS  # labels of another theory are no fault of the start
    worse = checks.check_offset(Asked(with_e0s(mini, [-40.0] * 4), mini, frames, per_atom))
    assert worse.verdict == FAIL


def test_an_equation_of_state_upside_down_fails(mini):
    diamond = bulk("C", "diamond", a=3.57, cubic=True)
    sound = checks.check_equation_of_state(Asked(mini, mini), diamond)
    assert sound.verdict == PASS
    assert sound.value > 0
    assert (
        checks.check_equation_of_state(Asked(UpsideDown(mini, 1.0), mini), diamond).verdict == FAIL
    )


def test_a_bumpy_equation_of_state_fails(mini):
    diamond = bulk("C", "diamond", a=3.57, cubic=True)
    check = checks.check_equation_of_state(Asked(Bumpy(mini, 5.0), mini), diamond)
    assert check.verdict == FAIL
    assert "turns" in check.why


def test_short_dynamics_do_not_fail_a_sound_model(mini):
    """Over 0.025 ps, half of what is asked for, this frame would seem to drift by 8 meV."""
    assert checks.check_drift(Asked(mini, ps=0.05), ethanol("test", 1)[0]).verdict == PASS


def test_forces_that_are_no_gradient_heat_a_molecule(mini):
    frame = ethanol("test", 1)[0]
    good = checks.check_drift(Asked(mini, mini, ps=0.2), frame)
    bad = checks.check_drift(Asked(WrongForces(mini, 1.3), mini, ps=0.2), frame)
    assert (good.verdict, bad.verdict) == (PASS, FAIL)


def test_a_molecule_that_falls_apart_on_heating_fails(mini):
    frame = ethanol("test", 1)[0]
    asked = Asked(UpsideDown(mini, 1.0), mini, ps=0.1)
    check = checks.check_ramp(asked, frame)
    assert check.verdict == FAIL
    assert check.value < check.start == 0.1
