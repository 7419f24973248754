"""Charges, spins and whatever else a model reads: values that it can't take, and missing ones."""

from __future__ import annotations

import numpy as np
import pytest

from mace_lora.errors import DataError
from mace_lora.frames.inputs import InputCheck
from mace_lora.upstream.inputs import Input, inputs_of

CHARGE = Input("total_charge", "total_charge", 0.0, lowest=-2, highest=2)


def said(*values: object, item: Input = CHARGE) -> list[str]:
    check = InputCheck("a.xyz", {item.name: item}, {item.name: "charge"})
    for i, value in enumerate(values):
        check.see(str(i), 2, {item.name: value})
    return check.gaps()


def test_the_inputs_of_models(build):
    assert inputs_of(build("residual")) == {}
    found = inputs_of(build("charge_spin"))
    assert found["total_charge"] == Input("total_charge", "total_charge", 0.0, False, -2, 2)
    assert found["total_spin"] == Input("total_spin", "total_spin", 1.0, False, 0, 4)


@pytest.mark.parametrize("value", [-2, 2, np.int64(1), 1.0])
def test_values_that_the_model_knows(value):
    assert said(0, value) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "the model knows -2 to 2"),
        (0.5, "whole numbers alone"),
        ("1+", "a number is needed"),
        (np.nan, "a finite number is needed"),
    ],
)
def test_values_that_it_does_not_know(value, expected):
    """mace-torch cuts 0.5 to 0, and fails in an embedding for 3."""
    with pytest.raises(DataError, match=r"a.xyz, frame 1: total charge \(key 'charge'\) is") as e:
        said(0, value)
    assert expected in str(e.value)


def test_gaps_are_told():
    assert said(0, None, 1, None) == [
        "a.xyz: 2 of 4 frames, frame 1 the first, have no total charge (key 'charge'): the model "
        "takes 0 for them"
    ]
    assert said(None, None) == [
        "a.xyz has no total charge (key 'charge'): the model takes 0 for every frame"
    ]
    assert said(None, item=Input("external_field", "external_field", 0.0)) == []


def test_an_input_without_a_default_must_be_there():
    temperature = Input("temperature", "T", None)
    assert said(300.5, item=temperature) == []
    with pytest.raises(DataError, match="frame 1 has no temperature"):
        said(300.5, None, item=temperature)


def test_an_input_of_each_atom():
    item = Input("charges", "charges", 0.0, per_atom=True)
    assert said(np.zeros(2), item=item) == []
    with pytest.raises(DataError, match="one for each of the 2 atoms"):
        said(0.0, item=item)
