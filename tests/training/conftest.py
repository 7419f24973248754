"""A short run, for tests of what comes after it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.running import here, short_run


@pytest.fixture(scope="module")
def flags(small_data, foundation) -> list[str]:
    return short_run(small_data, foundation)


@pytest.fixture(scope="module")
def done(tmp_path_factory, flags) -> Path:
    """A run of two epochs that ended well."""
    folder = tmp_path_factory.mktemp("done")
    assert here(folder, *flags, "--max_num_epochs=2") == ""
    return folder
