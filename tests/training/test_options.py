"""Options of the adapters and of a training run, each by what it does."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers.adapter_folders import make_adapter
from helpers.running import run_command

from mace_lora import AdapterConfig, cli, inject, load_adapter, merge, save_adapter, unload
from mace_lora.adapters.registry import METHODS, options_of
from mace_lora.errors import ArtefactError, ConfigError, NoLayerMatched
from mace_lora.model.injection import adapter_parameters, adapters
from mace_lora.model.layers import find_sites
from mace_lora.model.merging import changes
from mace_lora.testing import outputs, randomise_, worst
from mace_lora.training.epochs.optimised import parameter_groups
from mace_lora.training.epochs.steps import Steps, steps_done
from mace_lora.training.options import RunOptions

LOW_RANK = [m for m in METHODS if any(f.name == "dropout" for f in options_of(m).fields())]


def adapted(model, method="lora", seed=0, **options):
    inject(model, AdapterConfig.create(method, **options))
    randomise_(model, seed)
    return model


def names(model) -> set[str]:
    return {name for name, _ in adapters(model)}


@pytest.mark.parametrize("method", METHODS)
def test_exclude(model, method):
    every = names(adapted(deepcopy(model), method))
    some = names(adapted(model, method, exclude=("readouts", r"^interactions\.0\.")))
    left_out = {n for n in every if n.startswith(("readouts", "interactions.0."))}
    assert left_out
    assert some == every - left_out


def test_exclude_must_match(model):
    with pytest.raises(NoLayerMatched, match="'typo' matches 0 of"):
        inject(model, AdapterConfig.create("lora", exclude=("typo",)))


@pytest.mark.parametrize("method", METHODS)
def test_modules_to_save_are_trained_merged_and_saved(model, frames, tmp_path, method):
    """A readout, the energy shift and the E0s, which are no parameters of the base model."""
    base = deepcopy(model)
    saved = ("readouts", r"scale_shift\.shift", "atomic_energies")
    adapted(model, method, modules_to_save=saved)
    full = {"readouts.0.linear", "readouts.1.linear_1", "readouts.1.linear_2"}
    full |= {"scale_shift.shift", "atomic_energies_fn.atomic_energies"}
    own = adapter_parameters(model)
    for name in full:
        factors = [n for n in own if n.startswith(name)]
        assert factors == [f"{name}.D"]
        assert own[f"{name}.D"].requires_grad
    before = outputs(model, frames)
    save_adapter(model, tmp_path / "adapter")
    assert worst(before, outputs(load_adapter(base, tmp_path / "adapter"), frames)) <= 1e-12
    effective = {c.name: c.effective.clone() for c in changes(model)}
    merged = merge(model, keep_gates=True)
    assert worst(before, outputs(merged, frames)) <= 1e-10
    assert torch.equal(merged.scale_shift.shift, effective["scale_shift.shift"])
    assert not torch.equal(merged.scale_shift.shift, base.scale_shift.shift)
    constants = {"scale_shift.shift", "atomic_energies_fn.atomic_energies"}
    assert constants <= {n for n, _ in merged.named_buffers()}


def test_gradients_reach_what_is_trained_in_full(model, frames):
    from mace_lora.testing import loss_of
    from mace_lora.upstream.predicting import frames_to_batch

    adapted(model, modules_to_save=("scale_shift", "atomic_energies"))
    loss_of(model, frames_to_batch(frames, model)).backward()
    for name in ("scale_shift.scale", "scale_shift.shift", "atomic_energies_fn.atomic_energies"):
        assert adapter_parameters(model)[f"{name}.D"].grad.abs().max() > 0


def test_unloading_restores_constants_and_biases(build, frames):
    model = build("nonlinear")
    before, state = outputs(model, frames), deepcopy(model.state_dict())
    adapted(model, modules_to_save=("scale_shift",), bias="all")
    assert worst(before, outputs(model, frames)) > 1e-6
    unload(model)
    assert worst(before, outputs(model, frames)) == 0
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_biases(build):
    model = build("nonlinear")
    every = {n for n, p in model.named_parameters() if n.endswith(".bias") and p.numel()}
    targets = (r"readouts\.1",)
    some = names(adapted(deepcopy(model), targets=targets, bias="adapted"))
    layers = {site.name for site in find_sites(model)[0] if site.name.startswith("readouts.1")}
    assert some == layers | {n for n in every if n.removesuffix(".bias") in layers}
    assert some > layers
    assert names(adapted(model, targets=targets, bias="all")) == layers | every


def test_biases_that_are_not_there(model):
    with pytest.raises(NoLayerMatched, match="bias=adapted"):
        inject(model, AdapterConfig.create("lora", bias="adapted"))


@pytest.mark.parametrize("method", LOW_RANK)
def test_dropout_leaves_out_whole_copies_in_training_alone(model, method):
    adapted(model, method, dropout=0.5)
    adapter = next(a for n, a in adapters(model) if n == "interactions.0.linear")
    whole = adapter.updates()
    again = adapter.updates()
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    adapter.train()
    torch.manual_seed(0)
    mean = [torch.zeros_like(u) for u in whole]
    for _ in range(4000):
        some = adapter.updates()
        for full, left, sums in zip(whole, some, mean, strict=True):
            dropped = (left == 0).all(dim=1)
            assert torch.allclose(left[~dropped], 2 * full[~dropped])  # rows of all or nothing
            sums += left / 4000
    for full, average in zip(whole, mean, strict=True):
        assert torch.allclose(full, average, atol=0.1 * full.abs().max().item())


def test_dropout_respects_symmetries(model, frames):
    """Of one draw: energies invariant and forces covariant while copies are left out."""
    from mace_lora.testing import symmetry_errors

    adapted(model, dropout=0.5)
    dropped = deepcopy(model)
    for _, adapter in adapters(dropped):
        adapter.train()
        torch.manual_seed(1)
        drawn = adapter.updates()
        adapter.eval()
        with torch.no_grad():
            for a, update in zip(adapter.lora_A, drawn, strict=True):
                a *= 2 * (update != 0).any(dim=-1, keepdim=True)
        assert all(map(torch.allclose, adapter.updates(), drawn))
    assert worst(outputs(model, frames), outputs(dropped, frames)) > 1e-6
    assert max(symmetry_errors(dropped, frames, seed=1).values()) < 1e-10


def test_scaling_by_the_root_of_the_rank(model):
    plain, stable = deepcopy(model), deepcopy(model)
    adapted(plain, rank=4, alpha=2.0)
    adapted(stable, rank=4, alpha=2.0, rslora=True)
    for a, b in zip(changes(plain), changes(stable), strict=True):
        assert torch.allclose(2 * a.update, b.update, atol=1e-12)


@pytest.mark.parametrize("method", LOW_RANK)
def test_rank_and_alpha_patterns(model, method):
    patterns = {"rank_pattern": (r"interactions\.0\.linear$=2", "interactions=3")}
    adapted(model, method, rank=4, alpha=1.0, alpha_pattern=("products=10",), **patterns)
    low_rank = [(n, adapter) for n, adapter in adapters(model) if hasattr(adapter, "lora_A")]
    ranks = {n: max(a.shape[1] for a in adapter.lora_A) for n, adapter in low_rank}
    assert ranks["interactions.0.linear"] == 2
    assert ranks["interactions.1.linear"] == 3
    assert ranks["products.0.linear"] == 4
    scale = {n: adapter.parts[0].scale for n, adapter in low_rank}
    norm = 4**-0.5 if method != "elora" else 1.0
    assert scale["products.0.linear"] == pytest.approx(10 / 4 * norm)


def test_patterns_survive_saving(model, frames, tmp_path):
    base = deepcopy(model)
    adapted(model, rank_pattern=("readouts=1",), alpha_pattern=("radial|conv=3",), rslora=True)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(base, tmp_path / "adapter")
    assert worst(outputs(model, frames), outputs(loaded, frames)) <= 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "--lora_dropout=1.0: a number from 0 to below 1"),
        ({"dropout": -0.1}, "--lora_dropout=-0.1"),
        ({"lr_ratio": 0.0}, "--lora_lr_ratio=0.0: a finite number above 0"),
        ({"rank_pattern": ("readouts",)}, "--lora_rank_pattern=readouts: PATTERN=NUMBER"),
        ({"rank_pattern": ("readouts=0",)}, "--lora_rank_pattern=readouts=0: a whole number of 1"),
        ({"rank_pattern": ("(=2",)}, r"--lora_rank_pattern=\(=2: PATTERN=NUMBER"),
        ({"alpha_pattern": ("readouts=0",)}, "--lora_alpha_pattern=readouts=0.0: a finite"),
        ({"bias": "some"}, "--lora_bias=some: known: adapted, all, none"),
        ({"modules_to_save": ("",)}, "--lora_modules_to_save"),
        ({"preset": "best"}, "has no preset 'best'; known: balanced"),
    ],
)
def test_values_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig.create("lora", **options)


def test_a_pattern_must_match_an_adapted_layer(model):
    with pytest.raises(NoLayerMatched, match="'typo' matches 0"):
        inject(model, AdapterConfig.create("lora", rank_pattern=("typo=2",)))


def test_learning_rate_of_b(model):
    adapted(model, lr_ratio=8.0)
    args = cli.parse(["--name=x", "--train_file=t.xyz", "--lr=0.01"])[0]
    groups = parameter_groups(args, model)["params"]
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in adapter_parameters(model).items():
        assert rates[id(parameter)] == pytest.approx(0.08 if "lora_B" in name else 0.01), name


def test_warm_up_is_a_straight_line_and_restarts_keep_their_place():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.Adam([weight], lr=0.1)

    def step(optimizer, model):
        seen.append(optimiser.param_groups[0]["lr"])
        weight.grad = torch.ones(1)
        optimizer.step()
        return 0.0, {}

    seen = []
    steps = Steps(RunOptions(warmup_steps=4), 10)
    for _ in range(3):
        steps.take(step, optimizer=optimiser, model=torch.nn.Module())
    assert steps_done(optimiser) == 3
    again = Steps(RunOptions(warmup_steps=4), 10)  # a restart, with the optimiser's state
    for _ in range(3):
        again.take(step, optimizer=optimiser, model=torch.nn.Module())
    assert seen == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert optimiser.param_groups[0]["lr"] == 0.1


# ---------------------------------------------------------------------------- the real command


def factors(folder: Path) -> dict[str, torch.Tensor]:
    from mace_lora.model import artefact

    return artefact.read(folder / "run_adapter").tensors


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path, train_flags, foundation):
    """Frames of one molecule, so that a mean of means is the mean; the last step is a short one."""
    flags = [*train_flags, f"--foundation_model={foundation}", "--lora=True", "--ema"]
    for name, extra in (
        ("whole", ["--batch_size=5"]),
        ("parts", ["--batch_size=1", "--accumulate=5"]),
    ):
        (tmp_path / name).mkdir()
        run_command(*flags, *extra, cwd=tmp_path / name)
    one, other = factors(tmp_path / "whole"), factors(tmp_path / "parts")
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=1e-6, atol=1e-9), name
    assert any(t.abs().max() > 1e-3 for n, t in one.items() if "lora_B" in n)


def test_all_options_in_one_run(tmp_path, train_flags, foundation, frames):
    """Trained, merged with proof, saved; then another run goes on from it."""
    flags = [*train_flags, f"--foundation_model={foundation}"]
    options = [
        "--lora=True",
        "--lora_dropout=0.2",
        "--lora_lr_ratio=4",
        "--lora_rslora=True",
        "--lora_exclude=readouts",
        "--lora_modules_to_save",
        "scale_shift.shift",
        "atomic_energies",
        "--lora_rank_pattern",
        "interactions=2",
        "--warmup_steps=3",
    ]
    done = run_command(*flags, *options, cwd=tmp_path)
    assert "excluded" in (tmp_path / "logs/run_run-1.log").read_text()
    assert "Merged; largest difference" in done.stdout
    merged = torch.load(tmp_path / "run.model", weights_only=False)
    adapter = load_adapter(foundation, tmp_path / "run_adapter")
    assert worst(outputs(adapter, frames), outputs(merged, frames)) <= 1e-10

    (tmp_path / "more").mkdir()
    start = str(tmp_path / "run_adapter")
    more = run_command(
        *flags,
        f"--adapter_start={start}",
        "--lr=1e-12",
        "--lora_dropout=0.0",
        cwd=tmp_path / "more",
    )
    assert f"The adapter starts as {start} has it" in more.stdout
    before, after = factors(tmp_path), factors(tmp_path / "more")
    assert all(torch.allclose(before[n], after[n], atol=1e-9) for n in before)


def test_starting_from_an_adapter_of_another_run(tmp_path, build, train_flags, foundation):
    base = build("foundation").float()
    folder = make_adapter(base, tmp_path / "whole")  # of all elements; the run has three
    flags = ["--name=x", "--train_file=t.xyz", "--foundation_model=mini"]
    _, config, options = cli.parse([*flags, f"--adapter_start={folder}"])
    assert config == AdapterConfig.create("lora")
    assert options.adapter_start == str(folder)
    _, config, _ = cli.parse([*flags, f"--adapter_start={folder}", "--lora_dropout=0.5"])
    assert config.options.dropout == 0.5
    for extra, message in (
        (["--lora_rank=2"], r"--lora_rank=2 contradicts --adapter_start=.*rank=4"),
        (["--adapter=dora"], "is of method 'lora', not 'dora'"),
        (["--lora_preset=balanced"], "--lora_preset contradicts --adapter_start"),
    ):
        with pytest.raises(ConfigError, match=message):
            cli.parse([*flags, f"--adapter_start={folder}", *extra])
    with pytest.raises(ArtefactError, match=r"is .* an adapter directory"):
        cli.parse([*flags, f"--adapter_start={tmp_path}"])
    failed = run_command(
        *train_flags,
        f"--foundation_model={foundation}",
        f"--adapter_start={folder}",
        cwd=tmp_path,
        check=False,
    )
    assert failed.returncode == 1
    assert "its run started from another model than this one" in failed.stderr


def test_presets_fill_what_is_not_given():
    flags = ["--name=x", "--train_file=t.xyz", "--foundation_model=mini", "--lora=True"]
    for name, values in options_of("lora").presets.items():
        config = cli.parse([*flags, f"--lora_preset={name}", "--lora_rank=7"])[1]
        found = config.options.to_json()
        expected = {**AdapterConfig.create("lora", **values).options.to_json(), "rank": 7}
        assert found == expected
        assert expected != {**AdapterConfig.create("lora").options.to_json(), "rank": 7}
    with pytest.raises(ConfigError, match="--lora_preset belongs to --adapter=lora"):
        cli.parse([*flags[:3], "--adapter=dora", "--lora_preset=balanced"])


@pytest.mark.parametrize(
    "flag",
    [
        "--warmup_steps=5",
        "--accumulate=2",
        "--protect",
        "--schedule=cosine",
        "--defaults=mace-torch",
    ],
)
def test_run_options_need_an_adapter(flag):
    with pytest.raises(ConfigError, match="needs an adapter"):
        cli.parse(["--name=x", "--train_file=t.xyz", "--foundation_model=mini", flag])


def test_the_rate_falls_as_a_cosine_over_the_run():
    """With accumulation too, where an epoch of 5 batches has 3 steps; 2 epochs are 6 steps."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser, seen = torch.optim.SGD([weight], lr=0.1), []

    def step(optimizer, model, loss_fn, **_):
        seen.append(optimiser.param_groups[0]["lr"])
        return 0.0, {"loss": 0.0}

    steps = Steps(RunOptions(schedule="cosine", accumulate=2))
    steps.begin(5, 0, epochs=2)
    for _ in range(10):
        steps.take(step, optimizer=optimiser, model=torch.nn.Module(), loss_fn=None)
    numbers = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert seen == pytest.approx([0.05 * (1 + math.cos(math.pi * n / 6)) for n in numbers])
    assert optimiser.param_groups[0]["lr"] == 0.1
