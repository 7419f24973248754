"""The record of a run: what is known, and what is not yet."""

from __future__ import annotations

import pytest

from mace_lora import cli
from mace_lora.training.record import Asked, Run, StageNotReached


@pytest.fixture
def run() -> Run:
    flags = ["--name=x", "--train_file=t.xyz", "--foundation_model=mini", "--lora=True"]
    return Run(Asked(*cli.parse(flags)))


def test_a_stage_is_read_once_it_is_reached(run, base):
    assert not hasattr(run, "foundation")
    run.foundation = base
    assert run.foundation is base


def test_a_stage_that_has_not_come_yet_is_a_fault_in_words(run, base):
    run.foundation = base
    with pytest.raises(StageNotReached, match=r"not come to 'saved'.*knows asked, .*foundation"):
        _ = run.saved


def test_flags_are_kept_as_they_were_given(run):
    run.asked.args.E0s = "filled in by mace-torch"
    assert run.asked.given["E0s"] is None
    assert run.asked.given["name"] == "x"
