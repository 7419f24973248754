"""The Python interface as people use it: names and paths, wrong arguments, quiet loading."""

from __future__ import annotations

import warnings
from pathlib import Path

import jedi
import numpy as np
import pytest
import torch
from helpers.adapter_folders import make_adapter

import mace_lora
from mace_lora import (
    AdapterConfig,
    MaceLoraCalculator,
    MaceLoraError,
    combine_adapters,
    extract,
    inject,
    load_adapter,
    load_foundation,
    merge,
    save_adapter,
    set_adapter,
)


@pytest.fixture
def folder(base, tmp_path) -> Path:
    return make_adapter(base, tmp_path / "adapter", std=0.02)


def test_a_base_may_be_a_path(base_file, folder):
    plain = merge(load_adapter(base_file, folder))
    assert load_foundation(base_file).state_dict().keys() == plain.state_dict().keys()
    combined = combine_adapters(base_file, {folder: np.float32(1.0)})
    extracted = extract(base_file, plain).layers
    assert extracted
    assert MaceLoraCalculator(base=base_file, adapter=folder).adapter == folder
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, combined.state_dict()[name], rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda f: load_foundation(None), "found NoneType"),
        (lambda f: load_foundation(torch.nn.Linear(2, 2)), "found Linear"),
        (lambda f: load_foundation("mini", dtype="float64"), "torch.float32 or torch.float64"),
        (lambda f: load_adapter("mini", None), "path of its directory, found NoneType"),
        (lambda f: load_adapter(f, "mini"), "is mini an adapter directory"),
        (lambda f: inject("mini", AdapterConfig.create("lora")), "found 'mini': load one"),
        (lambda f: inject(torch.nn.Linear(2, 2), {"rank": 4}), "AdapterConfig.create"),
        (lambda f: save_adapter("mini", f), "found 'mini': load one"),
        (lambda f: set_adapter("mini", f), "found 'mini': load one"),
        (lambda f: AdapterConfig.create("lora", targets=None), "--lora_targets=None"),
        (lambda f: combine_adapters("mini", [f]), '{"a_adapter": 0.5'),
        (lambda f: MaceLoraCalculator(base=None), "found NoneType"),
        (lambda f: MaceLoraCalculator(base="mini", device="gpu"), "no kind of device"),
        (lambda f: MaceLoraCalculator(base="mini", default_dtype="half"), "float32 or float64"),
    ],
)
def test_wrong_arguments_are_named(folder, mistake, words):
    with pytest.raises(MaceLoraError) as raised:
        mistake(folder)
    assert words in str(raised.value)


def test_patterns_may_be_a_dictionary():
    given = AdapterConfig.create("lora", rank_pattern={"interactions.0": 2, "readouts": 1})
    assert given == AdapterConfig.create("lora", rank_pattern=("interactions.0=2", "readouts=1"))


def test_loading_is_quiet(base, tmp_path):
    """TorchScript has a warning for each of e3nn's layers, on which nobody can act."""
    folder = make_adapter(base, tmp_path / "adapter", elements=(1, 6))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_foundation("mini")
        load_adapter(base, folder)  # builds a model for its elements
    assert not [w for w in seen if "TorchScript" in str(w.message)]


def test_editors_see_every_name():
    """By jedi, which reads the package and runs nothing."""
    offered = jedi.Script("import mace_lora\nmace_lora.").complete(2, len("mace_lora."))
    assert set(mace_lora.__all__) <= {completion.name for completion in offered}


def test_editors_see_signatures():
    script = jedi.Script("import mace_lora\nmace_lora.inject(")
    (signature,) = script.get_signatures(2, len("mace_lora.inject("))
    assert [parameter.name for parameter in signature.params] == ["model", "config"]
    assert "InjectionReport" in signature.to_string()
