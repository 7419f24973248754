"""What an untouched model predicts is computed once, and never taken for another's answer."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from helpers.frames import ethanol

from mace_lora import load_foundation
from mace_lora.frames.reading import configuration_of
from mace_lora.upstream import library
from mace_lora.upstream.answers import Answers
from mace_lora.upstream.predicting import frames_to_batch, frames_to_data, predict


@pytest.fixture(scope="module")
def mini() -> torch.nn.Module:
    return load_foundation("mini", dtype=torch.float64)


@pytest.fixture
def calls(mini) -> list[int]:
    """Frames of each call of `mini`."""
    seen: list[int] = []
    hook = mini.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]["ptr"]) - 1))
    yield seen
    hook.remove()


def plain(model, frames) -> dict[str, np.ndarray]:
    found = predict(model, [frames_to_batch(frames, model)])
    return {name: value.numpy() for name, value in found.items()}


def configurations(frames):
    return [configuration_of(atoms, {}, "Default") for atoms in frames]


def close(one, other) -> bool:
    return all(np.allclose(one[k], other[k], rtol=0, atol=1e-9) for k in ("energy", "forces"))


def test_frames_are_predicted_once_whatever_form_they_have(mini, calls):
    frames, answers = ethanol("train", 5), Answers()
    wanted = plain(mini, frames)
    calls.clear()
    first = answers.predict(mini, configurations(frames[:3]))
    assert close(first, {"energy": wanted["energy"][:3], "forces": wanted["forces"][:27]})
    assert sum(calls) == 3
    assert close(answers.predict(mini, frames_to_data(frames, mini)), wanted)
    assert sum(calls) == 5
    assert np.allclose(answers.energies(mini, configurations(frames)), wanted["energy"])
    assert np.allclose(answers.forces(mini, frames_to_data(frames, mini)), wanted["forces"])
    assert sum(calls) == 5


def test_a_stress_that_was_not_asked_for_is_computed(mini):
    (atoms,), answers = ethanol("train", 1), Answers()
    atoms.set_cell([9, 9, 9])
    atoms.pbc = True
    one = configurations([atoms])
    assert "stress" not in answers.predict(mini, one)
    found = answers.predict(mini, one, compute_stress=True)["stress"]
    batch = frames_to_batch([atoms], mini)
    wanted = predict(mini, [batch], compute_stress=True)["stress"].numpy()
    assert np.allclose(found, wanted, atol=1e-12)
    assert np.allclose(answers.predict(mini, one, compute_stress=True)["stress"], wanted)


def test_another_cell_or_place_is_another_frame(mini):
    (atoms,), answers = ethanol("train", 1), Answers()
    moved, packed = atoms.copy(), atoms.copy()
    moved.positions[0, 0] += 0.1
    packed.set_cell([6, 6, 6])
    packed.pbc = True
    for frame in (atoms, moved, packed):
        assert close(answers.predict(mini, configurations([frame])), plain(mini, [frame]))


def test_other_e0s_are_no_other_model(mini):
    """As of a run that begins with E0s of its own: the interaction is known, energies move."""
    frames, answers = ethanol("train", 4), Answers()
    answers.predict(mini, configurations(frames))
    start = deepcopy(mini)
    start.atomic_energies_fn.atomic_energies += 2.0
    seen = []
    start.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]["ptr"]) - 1))
    wanted = plain(mini, frames)
    wanted["energy"] += 18.0
    assert close(answers.predict(start, frames_to_data(frames, start)), wanted)
    assert sum(seen) == 1  # to see that it is the same


def test_a_model_that_differs_is_asked_itself(mini):
    frames, answers = ethanol("train", 3), Answers()
    answers.predict(mini, configurations(frames))
    other = deepcopy(mini)
    with torch.no_grad():
        next(other.readouts[0].parameters()).mul_(1.01)
    assert answers.forces(other, frames_to_data(frames, other)) is None
    assert close(answers.predict(other, configurations(frames)), plain(other, frames))
    assert close(answers.predict(mini, configurations(frames)), plain(mini, frames))


def test_what_others_let_a_model_predict_is_remembered(mini, calls):
    frames, answers = ethanol("train", 3), Answers()
    batch = library.batch(frames_to_data(frames, mini))
    wanted = plain(mini, frames)
    answers.begin(mini)
    with answers.listening(mini):
        mini(batch.to_dict(), training=False)
    calls.clear()
    assert close(answers.predict(mini, configurations(frames)), wanted)
    assert calls == []
    answers.begin(mini)
    answers.predict(mini, configurations(frames))
    assert sum(calls) == 3


@pytest.mark.parametrize("name", ["two_heads_biased_readout", "charge_spin"])
def test_models_that_see_more_than_atoms_and_cell_are_asked_anew(build, name):
    model, answers = build(name), Answers()
    graphs = frames_to_data(ethanol("train", 2), model)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(1))
    for n in (1, 2):
        answers.predict(model, graphs)
        assert len(seen) == n
