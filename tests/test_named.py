"""Several adapters of one model in memory, by name."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.adapter_folders import make_adapter

from mace_lora import (
    AdapterConfig,
    active_adapters,
    adapter_parameters,
    add_adapter,
    combine_adapters,
    delete_adapter,
    load_adapter,
    merge,
    set_adapter,
    unload,
)
from mace_lora.adapters.registry import METHODS
from mace_lora.errors import ArtefactError, ConfigError, NotMergeable
from mace_lora.testing import outputs, worst

SAME = 1e-14  # up to rounding


@pytest.fixture
def folders(base, tmp_path):
    """Adapters of two runs, with E0s 0.5 eV apart."""
    one = make_adapter(base, tmp_path / "one", shift=1.0)
    return one, make_adapter(base, tmp_path / "two", "elora", seed=1, shift=0.5, rank=2)


@pytest.fixture
def model(base, folders):
    loaded = load_adapter(base, folders[0])
    add_adapter(loaded, "water", folders[1])
    return loaded


def test_adding_changes_nothing_and_choosing_does(base, frames, folders, model):
    one, two = (outputs(load_adapter(base, folder), frames) for folder in folders)
    assert active_adapters(model) == {"default": 1.0}
    assert worst(outputs(model, frames), one) < SAME
    assert set_adapter(model, "water") is model
    assert active_adapters(model) == {"water": 1.0}
    assert worst(outputs(model, frames), two) < SAME
    set_adapter(model, "default")
    assert worst(outputs(model, frames), one) < SAME


@pytest.mark.parametrize("method", METHODS)
def test_what_was_learnt_is_kept(base, frames, tmp_path, folders, method):
    """Training one, while the other is put away and comes back, for every method."""
    model = load_adapter(base, make_adapter(base, tmp_path / "any", method))
    add_adapter(model, "water", folders[1])
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.01)
    learnt = outputs(model, frames)
    set_adapter(model, "water")
    set_adapter(model, "default")
    assert worst(outputs(model, frames), learnt) < SAME
    assert all(p.requires_grad for p in adapter_parameters(model).values())


def test_weights_per_adapter(base, frames, folders, model):
    """As `combine_adapters` has it; several names are a plain sum."""
    set_adapter(model, {"default": 0.7, "water": 0.3})
    assert active_adapters(model) == {"default": 0.7, "water": 0.3}
    wanted = combine_adapters(base, dict(zip(folders, (0.7, 0.3), strict=True)))
    assert worst(outputs(model, frames), outputs(wanted, frames)) < 1e-12
    set_adapter(model, {"water": 0.5})
    half = merge(load_adapter(base, folders[1]), scale=0.5)
    assert worst(outputs(model, frames), outputs(half, frames)) < 1e-12
    set_adapter(model, ["default", "water"])
    assert active_adapters(model) == {"default": 1.0, "water": 1.0}
    set_adapter(model, "water")
    assert worst(outputs(model, frames), outputs(load_adapter(base, folders[1]), frames)) < SAME


def test_a_fresh_adapter_changes_no_prediction(base, frames, model, folders):
    add_adapter(model, "fresh", AdapterConfig.create("dora", rank=3))
    assert active_adapters(model) == {"default": 1.0}
    set_adapter(model, "fresh")
    start = unload(load_adapter(base, folders[0]))
    assert worst(outputs(model, frames), outputs(start, frames)) < 1e-12


def test_a_plain_model_takes_adapters_too(base, frames, folders):
    model = unload(load_adapter(base, folders[0]))
    add_adapter(model, "water", folders[1])
    assert active_adapters(model) == {}
    set_adapter(model, "water")
    assert worst(outputs(model, frames), outputs(load_adapter(base, folders[1]), frames)) < SAME


def test_deleting(base, frames, folders, model):
    delete_adapter(model, "default")
    assert active_adapters(model) == {}
    assert (
        worst(outputs(model, frames), outputs(unload(load_adapter(base, folders[0])), frames)) == 0
    )
    with pytest.raises(ConfigError, match="no adapter 'default'"):
        set_adapter(model, {"default": 1.0})
    set_adapter(model, "water")
    delete_adapter(model, "water")
    assert not adapter_parameters(model)


def test_a_copy_has_adapters_of_its_own(frames, model):
    twin = copy.deepcopy(model)
    before = outputs(twin, frames)
    delete_adapter(model, "water")
    set_adapter(twin, "water")
    set_adapter(twin, "default")
    assert worst(outputs(twin, frames), before) < SAME


def test_a_directory_leaves_those_in_memory_alone(base, frames, folders, model):
    before = outputs(model, frames)
    set_adapter(model, folders[1])
    assert active_adapters(model) == {}
    add_adapter(model, "fresh", AdapterConfig.create("lora"))
    assert worst(outputs(model, frames), outputs(load_adapter(base, folders[1]), frames)) < SAME
    set_adapter(model, "default")
    assert worst(outputs(model, frames), before) < SAME


def test_mistakes_are_named(base, frames, folders, model, tmp_path):
    before = outputs(model, frames)
    with pytest.raises(ConfigError, match="already"):
        add_adapter(model, "water", folders[0])
    with pytest.raises(ConfigError, match=r"no adapter 'watre': .*water"):
        set_adapter(model, ["watre"])
    with pytest.raises(ConfigError, match="finite number"):
        set_adapter(model, {"water": float("nan")})
    with pytest.raises(ArtefactError, match="does not fit"):
        add_adapter(model, "few", make_adapter(base, tmp_path / "few", elements=(1, 6)))
    add_adapter(model, "gates", make_adapter(base, tmp_path / "gates", "mmea"))
    with pytest.raises(NotMergeable):
        set_adapter(model, {"gates": 0.5, "water": 0.5})
    assert active_adapters(model) == {"default": 1.0}
    assert worst(outputs(model, frames), before) < SAME
