"""The method that the README of the adapters adds: registered, it keeps the contract."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import mace_lora
from mace_lora import AdapterConfig, cli
from mace_lora.adapters.registry import METHODS
from mace_lora.errors import ConfigError
from mace_lora.testing import AdapterContract

README = Path(mace_lora.__file__).parent / "adapters" / "README.md"


@pytest.fixture(autouse=True)
def _registered(tmp_path, monkeypatch):
    """The code of the page as a module of the folder, and its line in the registry."""
    section = README.read_text(encoding="utf-8").split("## Add a method")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    [line] = re.findall(r'`"gains": (\(.*?\))` to `registry.py`', section)
    (tmp_path / "gains.py").write_text(code, encoding="utf-8")
    name = "mace_lora.adapters.gains"
    spec = importlib.util.spec_from_file_location(name, tmp_path / "gains.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "gains", ast.literal_eval(line))


class TestNewMethod(AdapterContract):
    @pytest.fixture
    def config(self) -> AdapterConfig:
        return AdapterConfig.create("gains", targets=("all",), strength=2.0)


def test_its_options_are_flags():
    flags = ["--name=x", "--train_file=t.xyz", "--foundation_model=mini", "--adapter=gains"]
    config = cli.parse([*flags, "--gains_strength=2", "--gains_targets", "all"])[1]
    assert config == AdapterConfig.create("gains", strength=2.0, targets=("all",))
    with pytest.raises(ConfigError, match=r"--gains_strength=0\.0: a number above 0"):
        cli.parse([*flags, "--gains_strength=0"])
