"""Upstream's names: checked, substituted, restored, and told in a table."""

import re
from pathlib import Path

import pytest

import mace_lora
from mace_lora.errors import UnsupportedUpstream
from mace_lora.upstream import names as upstream
from mace_lora.upstream.substitutions import ROWS

SUBSTITUTED = {key: row for key, row in ROWS.items() if row.why or row.until}
IN_RUN = [key for key, row in SUBSTITUTED.items() if not row.when]


def test_the_installed_mace_torch_is_as_we_rely_on_it():
    assert upstream.problems() == []
    upstream.check()


def test_every_name_has_its_use_and_every_substitute_its_reason_and_its_end():
    assert len(IN_RUN) > 30
    for key, row in ROWS.items():
        assert row.use, key
    for key, row in SUBSTITUTED.items():
        assert row.why, key
        assert row.until, key


def test_no_key_stands_twice():
    page = (Path(mace_lora.__file__).parent / "upstream" / "README.md").read_text(encoding="utf-8")
    keys = re.findall(r"^\| (\w+) \| `", page, flags=re.MULTILINE)
    assert keys == list(ROWS)


def test_names_are_restored_even_after_an_error():
    before = {key: upstream.original(key) for key in IN_RUN}
    with (
        pytest.raises(RuntimeError),
        upstream.substituted({key: object() for key in IN_RUN}),
    ):
        raise RuntimeError("training broke off")
    for key in IN_RUN:
        assert upstream.current(key) is before[key]


def test_originals_are_reachable_while_substituted():
    original = upstream.original("take_step")
    with upstream.substituted({"take_step": len}):
        with upstream.substituted({"take_step": max, "train": min}):
            assert upstream.original("take_step") is original
            assert upstream.current("take_step") is max
        assert upstream.original("take_step") is original
        assert upstream.current("take_step") is len
    assert upstream.current("take_step") is original


def test_a_changed_signature_is_named(monkeypatch):
    holder, name = upstream.holder("params_options")
    monkeypatch.setattr(holder, name, lambda model, everything: None)
    with pytest.raises(UnsupportedUpstream, match="get_params_options has no parameter args"):
        upstream.check()


@pytest.mark.parametrize("key", ["batch", "elements", "hdf5"])
def test_a_missing_name_is_told_wherever_it_stands(monkeypatch, key):
    """In a class or a module; only called, or changed in part."""
    holder, name = upstream.holder(key)
    monkeypatch.delattr(holder, name)
    row = ROWS[key]
    with pytest.raises(UnsupportedUpstream, match=f"{row.module}.{row.attribute} does not exist"):
        upstream.check()


def test_packages_that_a_run_may_do_without_are_checked_on_demand(monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("config = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert upstream.problems() == []  # asked of those alone that a run needs
    with pytest.raises(UnsupportedUpstream, match=r"wandb\.log does not exist"):
        upstream.check("wandb")
