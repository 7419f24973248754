"""What is said of a run at its end."""

from __future__ import annotations

import pytest

from mace_lora.results.progress import History
from mace_lora.results.verdict import command, judge, lines

FLAGS = {"energy_weight": 1.0, "forces_weight": 100.0, "max_num_epochs": 20, "lr": 0.01}


def history(energies, forces, losses=None) -> History:
    made = History()
    losses = losses or [1.0 / (i + 1) for i in range(len(energies))]
    for i, (e, f, loss) in enumerate(zip(energies, forces, losses, strict=True)):
        errors = {"rmse_e_per_atom": e / 1e3, "rmse_f": f / 1e3, "loss": loss}
        made.add(None if i == 0 else i - 1, "Default", errors)
    return made


def verdict(run: History, training=None, frames: int = 100):
    return judge(run, {"Default": training or {}}, {"Default": frames}, FLAGS)


def test_energies_that_got_worse_come_first_with_the_flag_to_change():
    found = verdict(history([11.2, 25.1, 25.1], [300, 200, 100]), frames=4)
    first = lines(found, "")[0]
    assert first.startswith("energy RMSE got worse, 11.2 -> 25.1 meV per atom")
    assert "raise --energy_weight (it was 1)" in first
    line = command(found, "my", "my.yaml")
    assert line.startswith("mace_run_train --config=my.yaml --name=my_2 --energy_weight=10")


def test_overfitting_is_seen_beside_the_training_errors():
    run = history([9, 5, 4], [300, 60, 55])
    found = verdict(run, {"rmse_f": 0.018, "rmse_e_per_atom": 0.001})
    assert "training 18.0, of validation 55.0" in found.bad[0]
    assert not verdict(run, {"rmse_f": 0.050, "rmse_e_per_atom": 0.001}).bad


@pytest.mark.parametrize(("last", "told"), [(0.4, True), (0.095, False)])
def test_a_run_that_was_still_improving(last, told):
    losses = (
        [1.0, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1, 0.095]
        if not told
        else [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4]
    )
    found = verdict(history([9] * 8, [300] * 8, losses))
    assert any("still improving" in text for text in found.told) is told
    assert (found.change.get("max_num_epochs") == 40) is told


def test_few_validation_frames():
    assert (
        "validation of 6 frames says little" in verdict(history([9, 5], [9, 5]), frames=6).told[0]
    )


def test_a_good_run_is_called_one():
    found = verdict(history([9, 5], [300, 100]))
    assert lines(found, command(found, "a", "a.yaml")) == [
        "every error is lower than before training"
    ]
