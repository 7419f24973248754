"""What suits a fine-tuning where flags are not given, and that the user's word wins."""

from __future__ import annotations

import ase.io
import numpy as np
import pytest
import yaml
from helpers.frames import ethanol
from helpers.running import here, results, same_weights

from mace_lora import cli
from mace_lora.training import recipes
from mace_lora.training.defaults import stresses
from mace_lora.upstream import graphs

LINE = ["--name=x", "--train_file=t.xyz", "--foundation_model=mini", "--adapter=full"]


def chosen(*flags: str) -> dict[str, object]:
    _, _, options = cli.parse([*LINE, *flags])
    return {flag: choice.value for flag, choice in options.chosen.items()}


def lora(*flags: str) -> dict[str, object]:
    _, _, options = cli.parse([*LINE[:3], "--lora=True", *flags])
    return {flag: choice.value for flag, choice in options.chosen.items()}


def test_all_flags_of_the_recipe_are_set_and_what_is_given_wins():
    args, _, options = cli.parse([*LINE, "--lr=0.1", "--protect=False"])
    found = chosen("--lr=0.1", "--protect=False")
    expected = {k: c.value for k, c in recipes.RECIPE.items() if k not in ("lr", "protect")}
    assert found == {**expected, "weight_decay": 0.01}  # with the rate a thousandth at a step
    for flag, value in found.items():
        assert getattr(args, flag, None) == value or getattr(options, flag, None) == value
    assert args.lr == 0.1
    assert options.protect is False


@pytest.mark.parametrize(
    ("given", "absent"),
    [
        (["--energy_weight=1000"], {"forces_weight"}),
        (["--loss=huber"], {"energy_weight", "forces_weight"}),
        (["--optimizer=adam"], {"weight_decay"}),
        (["--scheduler=ExponentialLR"], {"schedule"}),
        (["--swa", "--start_swa=5"], {"schedule"}),
        (["--lbfgs"], {"lr", "ema", "clip_grad", "protect", "schedule"}),
        (["--multiheads_finetuning=True", "--pt_train_file=t.xyz"], {"lr", "ema", "protect"}),
    ],
)
def test_nothing_is_set_that_contradicts_what_is_given(given, absent):
    assert not absent & chosen(*given).keys()


@pytest.mark.parametrize(("rank", "alpha", "rate"), [(4, 1, 0.02), (16, 8, 0.01), (4, 4, 0.005)])
def test_the_rate_makes_up_for_a_small_scale_of_the_updates(rank, alpha, rate):
    assert lora(f"--lora_rank={rank}", f"--lora_alpha={alpha}")["lr"] == pytest.approx(rate)


def test_mace_torchs_own_defaults():
    assert chosen("--defaults=mace-torch") == {}
    args, _, _ = cli.parse(LINE[:3])  # and without an adapter
    assert (args.lr, args.ema, args.forces_weight) == (0.01, False, 100.0)


@pytest.mark.parametrize(
    ("frames", "atoms", "batch"), [(6, 54, 1), (50, 450, 5), (5000, 45000, 10), (100, 150000, 1)]
)
def test_batches_follow_the_number_of_frames_and_their_size(frames, atoms, batch):
    assert recipes.by_data(frames, atoms, 0)["batch_size"].value == batch


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_there_are_enough_steps_and_not_too_many_validations(steps):
    found = {flag: choice.value for flag, choice in recipes.by_steps(steps).items()}
    assert found["max_num_epochs"] * steps >= recipes.STEPS
    assert found["max_num_epochs"] >= recipes.LEAST_EPOCHS
    assert found["eval_interval"] * steps >= min(recipes.STEPS_PER_VALIDATION, steps)


def frame(pbc, stress):
    return graphs.configuration(
        atomic_numbers=np.array([1]),
        positions=np.zeros((1, 3)),
        properties={"stress": stress},
        property_weights={},
        cell=3 * np.eye(3),
        pbc=pbc,
    )


def test_a_stress_counts_where_all_that_have_one_are_crystals():
    crystal, bare = frame((True,) * 3, np.ones((3, 3))), frame((True,) * 3, None)
    slab = frame((True, True, False), np.ones((3, 3)))
    assert stresses([crystal, bare, crystal]) == 2
    assert stresses([crystal, slab]) == 0
    assert stresses([crystal], [slab]) == 0
    assert stresses([bare], [crystal]) == 0  # there is nothing to train on


@pytest.fixture
def crystals(tmp_path, small_data):
    """Files of frames with cells and a stress, by part."""
    made = {}
    for part in ("train", "valid"):
        frames = ethanol(part, 6)
        for i, atoms in enumerate(frames):
            atoms.set_cell(8 * np.eye(3))
            atoms.pbc = True
            atoms.info["REF_stress"] = 1e-3 * (i + 1) * np.eye(3)
        made[part] = str(tmp_path / f"{part}.xyz")
        ase.io.write(made[part], frames)
    return made


def test_stress_is_trained_where_there_is_one_and_the_yaml_repeats_the_run(tmp_path, crystals):
    files = [f"--{part}_file={path}" for part, path in crystals.items()]
    line = ["--name=run", "--foundation_model=mini", "--lora=True", "--seed=1", "--protect=False"]
    line += ["--max_num_epochs=2", "--defaults=fine-tuning"]
    assert here(tmp_path / "one", *line, *files) == ""
    log = (tmp_path / "one/logs/run_run-1.log").read_text()
    assert "| --loss             | stress" in log
    found = yaml.safe_load((tmp_path / "one/run.yaml").read_text())
    assert (found["loss"], found["batch_size"], found["lr"]) == ("stress", 1, 0.02)
    config = f"--config={tmp_path / 'one/run.yaml'}"
    assert here(tmp_path / "two", config, "--defaults=fine-tuning") == ""
    assert results(tmp_path / "one") == results(tmp_path / "two")
    assert same_weights(tmp_path / "one/run.model", tmp_path / "two/run.model")
