"""Thousands of broken adapters and nonsensical flags: only our own errors come out.

FUZZ_EXAMPLES sets how many of each kind are tried; the default keeps the test suite quick.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mace_lora import AdapterConfig, cli, inject, load_adapter, save_adapter
from mace_lora.adapters.registry import METHODS, options_of
from mace_lora.errors import ArtefactError, MaceLoraError
from mace_lora.model import artefact
from mace_lora.model.artefact import CONFIG, TENSORS
from mace_lora.model.injection import adapter_parameters
from mace_lora.testing import randomise_
from mace_lora.upstream.known import build_parser

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
quickly = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["lora", "float32", "all", "default", "(", "radial"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def adapter(_built, tmp_path_factory):
    """(base, folder, its two files)"""
    from helpers import zoo

    base = zoo.build("residual")
    model = copy.deepcopy(base)
    inject(model, AdapterConfig.create("lora"))
    randomise_(model)
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    save_adapter(model, folder)
    config = json.loads((folder / CONFIG).read_text())
    return _Quiet((base, folder, (folder / TENSORS).read_bytes(), config))


class _Quiet(tuple):
    """Hypothesis prints the arguments of a failing example: not a whole model, please."""

    def __repr__(self) -> str:
        return "adapter"


def loads_or_says_why(base: torch.nn.Module, folder: Path) -> bool:
    """Whether the adapter loads, with finite factors; anything but our errors goes through."""
    try:
        model = load_adapter(base, folder)
    except MaceLoraError:
        return False
    assert all(torch.isfinite(p).all() for p in adapter_parameters(model).values())
    return True


def test_the_sound_one_loads(adapter):
    base, folder, *_ = adapter
    assert loads_or_says_why(base, folder)


def _damaged(data: st.DataObject, content: bytes) -> bytes:
    """Bytes changed, cut, put in or doubled; the header of safetensors is hit more often."""
    end = data.draw(st.sampled_from([16, 400, len(content) - 1]))
    at = data.draw(st.integers(0, end))
    kind = data.draw(st.sampled_from(["change", "cut", "insert", "repeat", "length"]))
    noise = data.draw(st.binary(min_size=1, max_size=16))
    if kind == "change":
        return content[:at] + noise + content[at + len(noise) :]
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + noise + content[at:]
    if kind == "repeat":
        return content + content[at:]
    return struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + content[8:]


@quickly
@given(data=st.data())
def test_damaged_tensors(adapter, data):
    base, folder, content, config = adapter
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / TENSORS).write_bytes(_damaged(data, content))
    try:
        tensors = artefact.read(folder).tensors
    except ArtefactError:
        return
    model = copy.deepcopy(base)
    inject(model, AdapterConfig.create("lora"))
    try:
        artefact.load_factors(model, tensors)
    except ArtefactError:
        return
    assert all(torch.isfinite(p).all() for p in adapter_parameters(model).values())


sizes = st.integers(-(2**70), 2**70) | st.sampled_from([0, 2**31, 2**62, 2**63 - 1, 2**64 - 1])


@quickly
@given(
    shape=st.lists(sizes, max_size=4),
    offsets=st.lists(sizes, max_size=3),
    kind=st.sampled_from(["F32", "F64", "I64", "BOOL", "F8_E4M3", "X", 3, None]),
)
def test_absurd_sizes(adapter, shape, offsets, kind):
    """A header that promises terabytes costs no memory and is refused."""
    base, folder, content, config = adapter
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = next(k for k in header if k != "__metadata__")
    header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(ArtefactError):
        load_adapter(base, folder)


def _places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


@quickly
@given(data=st.data(), new=values)
def test_a_configuration_with_one_wrong_value(adapter, data, new):
    base, folder, content, config = adapter
    config = copy.deepcopy(config)
    path = data.draw(st.sampled_from([p for p in _places(config) if p]))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[path[-1]] = new
    elif isinstance(inner, dict):
        del inner[path[-1]]
        inner[data.draw(st.text(max_size=6))] = new
    else:
        inner.append(new)
    (folder / TENSORS).write_bytes(content)
    (folder / CONFIG).write_text(json.dumps(config))
    loads_or_says_why(base, folder)


@quickly
@given(text=st.binary(max_size=200) | st.just(b"[" * 5000) | st.just(b'{"format": 1' + b"0" * 5000))
def test_a_configuration_that_is_none(adapter, text):
    base, folder, content, _ = adapter
    (folder / TENSORS).write_bytes(content)
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(ArtefactError):
        load_adapter(base, folder)


OURS = [f"--{m}_{f.name}" for m in METHODS for f in options_of(m).fields()]
THEIRS = [a.option_strings[-1] for a in build_parser()._actions if a.option_strings]
flags = st.sampled_from([*OURS, "--adapter", "--lora", "--accumulate", "--warmup_steps"])
words = (
    st.text(max_size=6)
    | st.floats().map(str)
    | st.integers().map(str)
    | st.sampled_from(["True", "lora", "elora", "dora", "mmea", "default", "(", "1e400", "--"])
)


@quickly
@given(
    parts=st.lists(st.tuples(flags | st.sampled_from(THEIRS), words, st.booleans()), max_size=6),
)
def test_flags(parts, capsys, monkeypatch):
    """Nonsense ends in our errors or in argparse's usage message, never in a traceback."""
    monkeypatch.delenv("MACE_CONFIG", raising=False)
    arguments = ["--name=x", "--foundation_model=mini"]
    for flag, word, joined in parts:
        arguments += [f"{flag}={word}"] if joined else [flag, word]
    code = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli.parse(arguments)
    except MaceLoraError:
        return
    except SystemExit as stop:
        code = stop.code
    assert code in (0, 2)
    capsys.readouterr()
