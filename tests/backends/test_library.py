"""Compiled kernels: where they are kept."""

from __future__ import annotations

from mace_lora.backends import library


def test_a_cache_that_can_not_be_written_to(tmp_path, monkeypatch, caplog):
    """As in a container whose home is read-only: the run needs a place all the same."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MACE_LORA_CACHE", str(tmp_path / "file" / "cache"))
    folder = library.cache_folder()
    (folder / "kernel.so").write_text("")
    assert library.cache_folder() == folder  # the same one throughout the process
    assert folder.stat().st_mode & 0o077 == 0  # what is loaded from it can't be another user's
    assert caplog.text.count("file/cache can't be written to") == 1
    assert "MACE_LORA_CACHE" in caplog.text
