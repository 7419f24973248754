"""Adapter directories: round trip in another process, broken and foreign ones refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mace_lora import AdapterConfig, inject, load_adapter, save_adapter
from mace_lora.errors import ArtefactError, ConfigError
from mace_lora.model.artefact import CONFIG, TENSORS
from mace_lora.model.fingerprint import fingerprint
from mace_lora.testing import outputs, randomise_, worst


@pytest.fixture
def saved(build, tmp_path):
    """(base, adapted model, folder)"""
    base, model = build("residual"), build("residual")
    inject(model, AdapterConfig.create("lora", targets=("all",)))
    randomise_(model)
    save_adapter(model, tmp_path / "adapter")
    return base, model, tmp_path / "adapter"


def test_loaded_in_a_new_process(saved, frames, tmp_path):
    base, model, folder = saved
    torch.save(base, tmp_path / "base.model")
    code = f"""
import warnings; warnings.filterwarnings("ignore")
import mace, ase.io, torch
from mace_lora import load_adapter
from mace_lora.testing import outputs
frames = ase.io.read("frames.xyz", index=":")
for frame in frames: frame.pbc = False
torch.save(outputs(load_adapter("base.model", {str(folder)!r}), frames), "outputs.pt")
"""
    import ase.io

    ase.io.write(tmp_path / "frames.xyz", frames, format="extxyz")
    written = ase.io.read(tmp_path / "frames.xyz", index=":")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    there = torch.load(tmp_path / "outputs.pt")
    assert worst(outputs(model, written), there) <= 1e-12


def test_only_safetensors_and_json_and_a_card(saved):
    assert {p.name for p in saved[2].iterdir()} == {TENSORS, CONFIG, "README.md"}


def test_others_may_read_all_of_it_or_nothing(saved):
    modes = {path.name: path.stat().st_mode & 0o777 for path in saved[2].iterdir()}
    assert modes[TENSORS] == modes[CONFIG]


def test_an_older_one_is_replaced_whole(saved, frames):
    base, model, folder = saved
    randomise_(model, seed=7)
    save_adapter(model, folder)
    loaded = load_adapter(base, folder)
    assert worst(outputs(model, frames), outputs(loaded, frames)) <= 1e-12
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_the_older_one_survives_a_failed_write(saved, frames, monkeypatch):
    base, model, folder = saved
    before = outputs(model, frames)
    randomise_(model, seed=7)

    def disk_full(*_args, **_keywords):
        raise OSError("No space left on device")

    monkeypatch.setattr("mace_lora.model.artefact.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(model, folder)
    assert worst(before, outputs(load_adapter(base, folder), frames)) <= 1e-12
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_another_base_is_refused(saved, build):
    base, _, folder = saved
    other = build("residual")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(ArtefactError, match="another base model") as error:
        load_adapter(other, folder)
    assert fingerprint(base)[:12] in str(error.value)
    assert fingerprint(other)[:12] in str(error.value)


def test_the_fingerprint_is_that_of_the_base(saved, build):
    base, model, _ = saved
    assert fingerprint(base) == fingerprint(model) == fingerprint(base.float())


def _edit(folder, **changes):
    path = folder / CONFIG
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": 99}, "format 99"),
        ({"format": None}, "format None"),
        ({"colour": "blue"}, "unknown keys \\['colour'\\]"),
        ({"base": None}, "missing keys \\['base'\\]"),
        ({"method": "lroa"}, "Did you mean 'lora'"),
        ({"options": {"rank": 4, "colour": 1}}, "no option 'colour'"),
        ({"options": {"rank": 0}}, "rank"),
        ({"options": {"rank": 3, "targets": ["all"]}}, "factor .* has shape"),
        ({"options": {"targets": ["skip"]}}, "unknown"),
        ({"base": [1]}, "must be a table"),
        ({"model": {}}, "'fingerprint' is missing"),
    ],
)
def test_a_wrong_configuration_is_refused(saved, changes, expected):
    base, _, folder = saved
    _edit(folder, **changes)
    with pytest.raises(ArtefactError, match=expected):
        load_adapter(base, folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "load"),
        ("fingerprint", 3),
        ("atomic_numbers", [1, 1, 8]),
        ("atomic_numbers", [1, 6, 10**9]),
        ("heads", []),
        ("atomic_energies", [[-1.0]]),
        ("atomic_energies", [[-1.0, float("nan"), 0.0]]),
        ("shift", [0.0, 0.0, 0.0]),
    ],
)
def test_a_wrong_description_of_the_model_is_refused(saved, key, value):
    base, _, folder = saved
    model = json.loads((folder / CONFIG).read_text())["model"]
    _edit(folder, model={**model, key: value})
    with pytest.raises(ArtefactError, match=f"model: '{key}' is missing or wrong"):
        load_adapter(base, folder)


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "extra", "absent", "nan"])
def test_damaged_tensors_are_refused(saved, damage):
    base, _, folder = saved
    path = folder / TENSORS
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("no tensors here")
    else:
        tensors = load_file(path)
        name = next(name for name in tensors if not name.startswith("basis."))
        if damage == "extra":
            tensors["more"] = torch.zeros(2)
        elif damage == "absent":
            del tensors[name]
        else:
            tensors[name][0] = float("nan")
        save_file(tensors, path)
    with pytest.raises(ArtefactError):
        load_adapter(base, folder)


def test_no_directory_and_no_adapters(build, tmp_path):
    with pytest.raises(ArtefactError, match="adapter directory"):
        load_adapter(build("residual"), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no adapters"):
        save_adapter(build("residual"), tmp_path / "x")
