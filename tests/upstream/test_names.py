"""Upstream's names: checked, substituted, restored."""

import pytest

from mace_lora.errors import UnsupportedUpstream
from mace_lora.upstream import names as upstream


def test_the_installed_mace_torch_is_as_we_rely_on_it():
    assert upstream.problems() == []
    upstream.check()


def test_names_are_restored_even_after_an_error():
    before = {key: upstream.original(key) for key in upstream.NAMES}
    with (
        pytest.raises(RuntimeError),
        upstream.substituted({key: object() for key in upstream.NAMES}),
    ):
        raise RuntimeError("training broke off")
    for key, name in upstream.NAMES.items():
        assert getattr(upstream.module(name.module), name.attribute) is before[key]


def test_originals_are_reachable_while_substituted():
    original = upstream.original("take_step")
    with upstream.substituted({"take_step": len}):
        assert upstream.original("take_step") is original
        assert upstream.module("mace.tools.train").take_step is len
    assert upstream.module("mace.tools.train").take_step is original


def test_a_changed_signature_is_named(monkeypatch):
    script = upstream.module("mace.cli.run_train")
    monkeypatch.setattr(script, "get_params_options", lambda model, everything: None)
    with pytest.raises(UnsupportedUpstream, match="get_params_options has no parameter args"):
        upstream.check()
