"""Adapters that travel: their card, zip files, the hub; and what can't be pickled."""

from __future__ import annotations

import pickle
import shutil
import sys
from types import ModuleType

import pytest
import torch
from helpers.adapter_folders import make_adapter

from mace_lora import load_adapter, merge
from mace_lora.errors import ArtefactError, NotPicklable
from mace_lora.testing import outputs, worst

SAME = 1e-14  # up to rounding


@pytest.fixture
def folder(base, tmp_path):
    return make_adapter(base, tmp_path / "water_adapter", "elora", rank=2)


@pytest.mark.parametrize("inside", ["", "water_adapter"])
def test_a_zip_file_is_loaded_as_the_directory_is(base, frames, folder, tmp_path, inside):
    """Zipped with its folder, or the files alone."""
    root = tmp_path if inside else folder
    packed = shutil.make_archive(str(tmp_path / "sent"), "zip", root, inside or None)
    loaded = load_adapter(base, packed)
    assert worst(outputs(loaded, frames), outputs(load_adapter(base, folder), frames)) < SAME


def test_a_zip_file_of_something_else_is_named(base, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no adapter")
    packed = shutil.make_archive(str(tmp_path / "notes"), "zip", tmp_path / "notes")
    with pytest.raises(ArtefactError, match=r"notes\.zip holds 0 files adapter_config\.json"):
        load_adapter(base, packed)
    (tmp_path / "half.zip").write_bytes(b"PK half")
    with pytest.raises(ArtefactError, match=r"half\.zip can't be read"):
        load_adapter(base, tmp_path / "half.zip")


def test_the_hub(base, frames, folder, monkeypatch):
    """Asked for by owner and name; the download itself is huggingface_hub's."""
    hub, asked = ModuleType("huggingface_hub"), []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        if name == "me/none":
            raise OSError("offline")
        return str(folder)

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    loaded = load_adapter(base, "hf://me/water@v1")
    assert asked == [("me/water", "v1")]
    assert worst(outputs(loaded, frames), outputs(load_adapter(base, folder), frames)) < SAME
    with pytest.raises(ArtefactError, match=r"hf://me/none can't be downloaded: OSError: offline"):
        load_adapter(base, "hf://me/none")
    with pytest.raises(ArtefactError, match="hf://owner/name"):
        load_adapter(base, "hf://water")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ArtefactError, match="pip install huggingface_hub"):
        load_adapter(base, "hf://me/water")


def test_the_card_says_what_it_belongs_to_and_a_users_own_is_kept(base, folder):
    card = folder / "README.md"
    text = card.read_text()
    for words in (
        "base_model: ",
        "rank=2",
        "MaceLoraCalculator",
    ):
        assert words in text
    card.write_text("# My notes\n")
    make_adapter(base, folder, "elora", rank=3)
    assert card.read_text() == "# My notes\n"


def test_a_model_with_adapters_says_what_to_do_instead_of_pickling(base, frames, folder, tmp_path):
    model = load_adapter(base, folder)
    with pytest.raises(NotPicklable, match="save_adapter"):
        torch.save(model, tmp_path / "a.model")
    with pytest.raises(NotPicklable, match="merge"):
        pickle.dumps(model)
    plain = pickle.loads(pickle.dumps(merge(model)))
    assert worst(outputs(plain, frames), outputs(merge(load_adapter(base, folder)), frames)) < SAME
